"""`python -m jobs.llama.evaluate QUESTION ANSWER`: load a GGUF file and tell how it speaks. Both arguments are JSON files.

It measures and does not judge. Exits 0 only when the answer is written; a file that crashes the engine ends this process alone.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.llama.fidelity import Comparison, Passage, compare, targets_of
from schema.base import Lenient

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from jobs.llama.model import GgufModel


class Question(Lenient):
    """What to ask of a file. The log probabilities are .npy files of one row for each compared position, in order."""

    file: str
    lora: str | None = None  # an adapter to be used with the file
    threads: int
    texts: list[str]  # to be tokenized
    passages: list[Passage]
    trained_log_probs: str
    base_log_probs: str | None
    sample_ids: list[int]  # to be continued
    sample_tokens: int  # by at most so many tokens


class Answer(Lenient):
    """What a file said."""

    token_ids: list[list[int]]  # of each text
    comparison: Comparison
    sampled: int  # tokens generated, with the one that ends the text
    sample_text: str


def answer(question: Question) -> Answer:
    """Load the file and ask it. Raises LlamaError, and ValueError for logits that cannot be compared."""
    from jobs.llama.model import open_gguf

    longest = max(len(passage.ids) for passage in question.passages)
    context_tokens = max(longest, len(question.sample_ids) + question.sample_tokens)
    most_outputs = max(passage.compared for passage in question.passages)
    lora = Path(question.lora) if question.lora else None
    sizes = {"threads": question.threads, "context_tokens": context_tokens, "most_outputs": most_outputs}
    with open_gguf(Path(question.file), **sizes, lora=lora) as model:
        sampled = model.generate(question.sample_ids, question.sample_tokens)
        return Answer(
            token_ids=[model.tokenize(text) for text in question.texts],
            comparison=_compare(model, question),
            sampled=len(sampled),
            sample_text=model.text(sampled),
        )


def main(question: str, answered: str) -> int:
    """Answer a question; returns the exit code."""
    Path(answered).write_text(answer(Question.load(Path(question).read_bytes())).model_dump_json())
    return 0


def _compare(model: "GgufModel", question: Question) -> Comparison:
    import numpy as np

    trained = np.load(question.trained_log_probs, mmap_mode="r")
    base = np.load(question.base_log_probs, mmap_mode="r") if question.base_log_probs else None
    return compare(_rows(model, question.passages), trained, base, targets_of(question.passages))


def _rows(model: "GgufModel", passages: list[Passage]) -> "Iterator[NDArray[np.float32]]":
    for passage in passages:
        yield from model.logits(passage.ids, passage.compared)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
