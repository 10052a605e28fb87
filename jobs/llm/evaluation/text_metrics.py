"""Metrics that compare answers with their references.

exact_match      fraction of answers equal to the reference, ignoring white space
bleu, chrf       of the whole sample, by sacrebleu, from 0 to 1
rouge_1, _2, _l  mean F1 over the rows, with words of every script, from 0 to 1; equal to rouge-score in English
accuracy_labels  fraction of answers that are the right label, where the references are labels
f1_macro         unweighted mean of the F1 of every label among the references

A metric that cannot be computed, or has no meaning for the rows, is None with a reason.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

# References count as labels when a few short ones repeat.
MAX_LABELS = 20
MAX_LABEL_WORDS = 5
BLEU_ORDER = 4  # BLEU counts sequences of up to four words

# Scripts written without spaces: each character counts as a word.
UNSPACED_SCRIPTS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
WORD_PATTERN = rf"(?V1)[{UNSPACED_SCRIPTS}]\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}]--[{UNSPACED_SCRIPTS}]]+"

Metric = Callable[[Sequence[str], Sequence[str]], float]
MetricResults = tuple[dict[str, float | None], dict[str, str]]  # values, and the reason for each None


class UndefinedMetric(Exception):
    """The metric has no meaning for these rows; the message says why."""


def task_metrics(answers: Sequence[str], references: Sequence[str], metrics: Mapping[str, Metric] | None = None) -> MetricResults:
    """Every metric of the answers, and the reason for each that is None. Raises ValueError for different lengths.

    A metric that fails does not affect the others.
    """
    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers for {len(references)} references")
    values: dict[str, float | None] = {}
    notes: dict[str, str] = {}
    for name, metric in (METRICS if metrics is None else metrics).items():
        values[name] = None
        try:
            if not references:
                raise UndefinedMetric("no held-out row has a prompt and an answer to compare with")
            values[name] = metric(answers, references)
        except UndefinedMetric as reason:
            notes[name] = str(reason)
        # What the metric libraries raise for unusual texts.
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            notes[name] = f"the metric failed: {type(error).__name__}: {error}"
    return values, notes


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Fraction of answers equal to the reference, ignoring white space."""
    return _fraction_true(
        _normalize_whitespace(answer) == _normalize_whitespace(reference) for answer, reference in zip(answers, references, strict=True)
    )


def bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of the whole sample, 0 to 1; over characters where the references are in a script without spaces."""
    from sacrebleu.metrics.bleu import BLEU

    scorer = BLEU(tokenize="char" if _is_unspaced(references) else "13a")
    if max(len(scorer.tokenizer(reference).split()) for reference in references) < BLEU_ORDER:
        raise UndefinedMetric(f"BLEU compares sequences of {BLEU_ORDER} words, and no reference is that long")
    return scorer.corpus_score(answers, [references]).score / 100


def chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """chrF of the whole sample, 0 to 1: sequences of up to six characters, in any language."""
    from sacrebleu.metrics.chrf import CHRF

    if not any(map(_normalize_whitespace, references)):
        raise UndefinedMetric("every reference is empty")
    return CHRF().corpus_score(answers, [references]).score / 100


def rouge_1(answers: Sequence[str], references: Sequence[str]) -> float:
    """F1 of the common words."""
    return _rouge("rouge1", answers, references, min_words=1)


def rouge_2(answers: Sequence[str], references: Sequence[str]) -> float:
    """F1 of the common word pairs."""
    return _rouge("rouge2", answers, references, min_words=2)


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words."""
    from rapidfuzz.distance import LCSseq  # rouge-score takes five seconds for two texts of 4,000 words

    _require_words(1, references)
    tokenize = _UnicodeTokenizer().tokenize
    pairs = [(tokenize(answer), tokenize(reference)) for answer, reference in zip(answers, references, strict=True)]
    return sum(2 * LCSseq.similarity(answer, reference) / max(len(answer) + len(reference), 1) for answer, reference in pairs) / len(pairs)


def accuracy_labels(answers: Sequence[str], references: Sequence[str]) -> float:
    """Fraction of answers that are the right label, ignoring case and punctuation."""
    return _fraction_true(answer == reference for answer, reference in _label_pairs(answers, references))


def f1_macro(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean F1 over the labels among the references. An answer that is no label counts as a miss."""
    pairs = _label_pairs(answers, references)
    answered = Counter(answer for answer, _ in pairs)
    expected = Counter(reference for _, reference in pairs)
    correct = Counter(reference for answer, reference in pairs if answer == reference)
    return sum(2 * correct[label] / (answered[label] + expected[label]) for label in expected) / len(expected)


METRICS: Mapping[str, Metric] = {
    "exact_match": exact_match,
    "bleu": bleu,
    "chrf": chrf,
    "rouge_1": rouge_1,
    "rouge_2": rouge_2,
    "rouge_l": rouge_l,
    "accuracy_labels": accuracy_labels,
    "f1_macro": f1_macro,
}


class _UnicodeTokenizer:
    """Splits text of every script into words; rouge-score's own tokenizer finds only a-z and 0-9."""

    def tokenize(self, text: str) -> list[str]:
        import regex

        return regex.findall(WORD_PATTERN, text.lower())


def _rouge(kind: str, answers: Sequence[str], references: Sequence[str], *, min_words: int) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    _require_words(min_words, references)
    scorer = RougeScorer([kind], tokenizer=_UnicodeTokenizer())
    return sum(scorer.score(reference, answer)[kind].fmeasure for answer, reference in zip(answers, references, strict=True)) / len(answers)


def _require_words(min_words: int, references: Sequence[str]) -> None:
    if max(len(_UnicodeTokenizer().tokenize(reference)) for reference in references) < min_words:
        raise UndefinedMetric("no reference has a word" if min_words == 1 else "no reference has two words")


def _label_pairs(answers: Sequence[str], references: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of answer and reference as normalized labels. Raises UndefinedMetric when the references are not labels."""
    labels = {_normalize_label(reference) for reference in references}
    longest = max(len(reference.split()) for reference in references)
    if longest > MAX_LABEL_WORDS:
        raise UndefinedMetric(f"the references are not labels: one has {longest} words")
    if len(labels) > MAX_LABELS or len(labels) > len(references) / 2:
        raise UndefinedMetric(f"the references are not labels: {len(labels)} different ones in {len(references)} rows")
    return [(_normalize_label(answer), _normalize_label(reference)) for answer, reference in zip(answers, references, strict=True)]


def _normalize_label(text: str) -> str:
    label = _normalize_whitespace(text).casefold()
    return label.strip(" .,;:!?\"'") or label


def _normalize_whitespace(text: str) -> str:
    return " ".join(text.split())


def _fraction_true(matches: Iterable[bool]) -> float:
    outcomes = list(matches)
    return sum(outcomes) / len(outcomes)


def _is_unspaced(references: Sequence[str]) -> bool:
    """Whether most letters belong to scripts without spaces."""
    import regex

    letters = regex.findall(r"\p{L}", "".join(references))
    return 2 * sum(bool(regex.match(f"[{UNSPACED_SCRIPTS}]", letter)) for letter in letters) > len(letters)
