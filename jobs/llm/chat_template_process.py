"""`python -m jobs.llm.chat_template_process REQUEST RESPONSE`: render a chat template within limits. Both are JSON files.

A chat template is a program of the base model's author. transformers renders it in jinja's sandbox, which limits what it can reach, but
not how long it runs or how much memory it takes. Exit code 0 means that the response is written.
"""

import resource
import sys
from collections.abc import Callable
from pathlib import Path

from jobs.llm.chat_templates import TEMPLATE_ERRORS, RenderRequest, RenderResponse, find_output_problem

MEMORY_BYTES = 512 << 20  # beside what the imports take
CPU_S = 15  # below the parent's timeout, which also counts waiting


def main(request_path: Path, response_path: Path) -> None:
    """Render every conversation, with and without the start of an answer."""
    import psutil
    from transformers.utils.chat_template_utils import render_jinja_template

    memory_bytes = psutil.Process().memory_info().vms + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    request = RenderRequest.load(request_path.read_bytes())
    response_path.write_text(RenderResponse(problem=_find_problem(request, render_jinja_template)).model_dump_json())


def _find_problem(request: RenderRequest, render: Callable[..., tuple[list[str], object]]) -> str | None:
    for conversation in request.conversations:
        for add_generation_prompt in (False, True):
            try:
                rendered, _ = render(
                    conversations=[conversation.messages],
                    tools=conversation.tools,
                    chat_template=request.template,
                    add_generation_prompt=add_generation_prompt,
                    **request.special_tokens,
                )
            except MemoryError:
                return f"it takes more than {MEMORY_BYTES >> 20} MB of memory"
            except TEMPLATE_ERRORS:  # it rejects this conversation; the rows that it rejects are reported when they are tokenized
                continue
            if problem := find_output_problem(rendered[0], [*conversation.messages, *(conversation.tools or [])]):
                return problem
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
