"""`python -m jobs.llm.llama_cpp.evaluate REQUEST RESPONSE`: load a GGUF file, tokenize, generate and compare. Both are JSON files.

It measures and decides nothing. Exit code 0 means that the response is written; a file that crashes llama.cpp ends only this process.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.llm.llama_cpp.fidelity import Comparison, ComparisonRequest, Passage, compare_with_files
from jobs.llm.llama_cpp.vocabulary import VocabularyReport, VocabularyTexts
from schema.base import ForwardCompatible

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from jobs.llm.llama_cpp.model import GgufModel


class EvalRequest(ComparisonRequest):
    """Which file to run, on which texts and passages, and what to compare it with."""

    model_path: str
    lora_path: str | None = None  # an adapter to apply to the model
    threads: int
    vocabulary: VocabularyTexts  # what to tokenize
    sample_prompt_ids: list[int]  # the prompt of the sample generation
    max_sample_tokens: int  # its maximum length


class EvalResponse(ForwardCompatible):
    """The measurements of a file."""

    vocabulary: VocabularyReport
    comparison: Comparison
    sample_ids: list[int]  # the greedy answer to the sample prompt, including the end token
    sample_text: str


def evaluate_gguf(request: EvalRequest) -> EvalResponse:
    """Load the file and measure it. Raises LlamaError, and ValueError for logits that cannot be compared."""
    from jobs.llm.llama_cpp.model import open_gguf

    longest = max(len(passage.ids) for passage in request.passages)
    context_tokens = max(longest, len(request.sample_prompt_ids) + request.max_sample_tokens)
    max_outputs = max(passage.compared_tokens for passage in request.passages)
    lora = Path(request.lora_path) if request.lora_path else None
    sizes = {"threads": request.threads, "context_tokens": context_tokens, "max_outputs": max_outputs}
    with open_gguf(Path(request.model_path), **sizes, lora=lora) as model:
        sampled = model.generate(request.sample_prompt_ids, request.max_sample_tokens)
        return EvalResponse(
            vocabulary=model.vocabulary.report(request.vocabulary),
            comparison=compare_with_files(_iter_logits(model, request.passages), request),
            sample_ids=sampled,
            sample_text=model.detokenize(sampled),
        )


def main(request_path: str, response_path: str) -> int:
    """Evaluate the request; returns the exit code."""
    Path(response_path).write_text(evaluate_gguf(EvalRequest.load(Path(request_path).read_bytes())).model_dump_json())
    return 0


def _iter_logits(model: "GgufModel", passages: list[Passage]) -> "Iterator[NDArray[np.float32]]":
    for passage in passages:
        yield from model.iter_logits(passage.ids, passage.compared_tokens)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
