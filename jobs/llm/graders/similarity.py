"""Grades the similarity of answer and reference: by characters, words or embeddings. Every metric is scaled to 0..1."""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jobs.llm.graders.base import FailedGrade, Grade, Grader, GradingInput, extract_answer, get_reference, make_comparison_grader
from jobs.llm.graders.embeddings import Embedder, endpoint_embedder, stored_embedder
from schema.training.llm_graders import TextSimilarityGrader

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext

# The API's name → rouge-score's.
ROUGE_TYPES = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}


def similarity_grader(config: TextSimilarityGrader, context: "JobContext") -> Grader:
    """The grader with the configured metric."""
    if config.embedding_model is None:
        return make_comparison_grader(config.answer_tag, config.reference_field, METRICS[config.metric](config.metric))
    embedder = endpoint_embedder(config, context) if config.base_url else stored_embedder(config.embedding_model, context)
    return CosineGrader(config, embedder)


def _fuzzy_match(_: str) -> Callable[[str, str], Grade]:
    from rapidfuzz import fuzz

    return lambda answer, reference: fuzz.ratio(answer, reference) / 100


def _bleu(_: str) -> Callable[[str, str], Grade]:
    from sacrebleu import BLEU

    bleu = BLEU(effective_order=True)  # an answer of three words has no 4-grams, and must not get 0 for that
    # Two equal texts have a BLEU of 100.00000000000004.
    return lambda answer, reference: min(1.0, bleu.sentence_score(answer, [reference]).score / 100)


def _rouge(metric: str) -> Callable[[str, str], Grade]:
    from rouge_score.rouge_scorer import RougeScorer

    key = ROUGE_TYPES[metric]
    scorer = RougeScorer([key], tokenizer=UnicodeTokenizer())
    return lambda answer, reference: float(scorer.score(reference, answer)[key].fmeasure)


METRICS: dict[str, Callable[[str], Callable[[str, str], Grade]]] = {
    "fuzzy_match": _fuzzy_match,
    "bleu": _bleu,
    "rouge_1": _rouge,
    "rouge_2": _rouge,
    "rouge_l": _rouge,
}


class UnicodeTokenizer:
    """Splits text of any language into words. rouge-score's own tokenizer finds only a-z and 0-9, so nothing in Russian."""

    def tokenize(self, text: str) -> list[str]:
        """The words in lower case."""
        return re.findall(r"\w+", text.lower())


class CosineGrader:
    """Grades the cosine similarity of the embeddings of answer and reference; a negative one is 0."""

    def __init__(self, config: TextSimilarityGrader, embedder: Embedder) -> None:
        self._config = config
        self._embedder = embedder

    def check(self, _cases: Sequence[GradingInput], /) -> None:
        """Raise JobFailed when the embedding model does not answer."""
        self._embedder.check()

    def grade(self, cases: Sequence[GradingInput]) -> list[Grade]:
        """Embed each distinct text once, in as few calls as possible: the completions of a prompt share their reference."""
        pairs = [self._answer_and_reference(case) for case in cases]
        texts = sorted({text for pair in pairs if isinstance(pair, tuple) for text in pair})
        if not texts:
            return [pair if isinstance(pair, FailedGrade) else 0.0 for pair in pairs]
        vectors = dict(zip(texts, self._embedder.embed(texts), strict=True))
        return [_grade_cosine(pair, vectors) for pair in pairs]

    def close(self) -> None:
        """Close the embedder."""
        self._embedder.close()

    def _answer_and_reference(self, case: GradingInput) -> tuple[str, str] | FailedGrade | None:
        reference = get_reference(case, self._config.reference_field)
        if isinstance(reference, FailedGrade):
            return reference
        answer = extract_answer(case.completion, self._config.answer_tag)
        return (answer, reference) if answer else None  # endpoints reject an empty text


def _grade_cosine(pair: tuple[str, str] | FailedGrade | None, vectors: dict[str, Any]) -> Grade:
    import numpy

    if isinstance(pair, FailedGrade):
        return pair
    if pair is None:
        return 0.0
    answer, reference = vectors[pair[0]], vectors[pair[1]]
    for vector in (answer, reference):
        if isinstance(vector, FailedGrade):
            return vector
    if len(answer) != len(reference):
        return FailedGrade("the embeddings have different lengths")
    norms = float(numpy.linalg.norm(answer) * numpy.linalg.norm(reference))
    cosine = float(numpy.dot(answer, reference)) / norms if norms else float("nan")
    return FailedGrade("the embedding is zero or not finite") if cosine != cosine else min(1.0, max(0.0, cosine))
