"""What a careful person would say about the rows, one line each, with what would help. Nothing about rows that are as they should be."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from hashlib import blake2b

from jobs.ingest.reports.languages import UNKNOWN
from jobs.ingest.reports.row_texts import RowTexts
from schema.dataset import EVAL_SPLIT
from schema.ingestion import DatasetReport, TokenLengths

FEW_ROWS = 50
FEW_HELD_OUT_ROWS = 20
MIN_COMPARED_ROWS = 20  # in fewer, shares say nothing
# A dataset with few different answers sorts things into classes, where equal answers are meant.
MAX_CLASSES = 50
MIN_ROWS_PER_CLASS = 4
MAX_CLASS_CHARACTERS = 60
MAX_CLASS_SHARE = 0.95
CLASS_LEAK_ROWS = 1000  # whose prompts are searched for the names of classes
MAX_CLASS_PROMPT_CHARACTERS = 4000
LEAK_TO_MISLEAD = 3  # a leak names the right class this many times as often as another one
MAX_ANSWER_SHARE = 0.2
MAX_LEAK_SHARE = 0.3
MIN_LEAKED_CHARACTERS = 20  # a shorter answer may be in a prompt by chance
MAX_LEAK_CHECK_CHARACTERS = 200_000
LONG_TAIL = 8  # the 99th percentile, compared with the median
MIN_TAIL_TOKENS = 1024
CHARACTERS_PER_TOKEN = 4  # about, where tokens were not counted
MIN_MARKUP_SHARE = 0.05
MIN_MOJIBAKE_ROWS = 3
MIN_LANGUAGE_SHARE = 0.1  # of a second language
MIN_LANGUAGE_ROWS = 50

WORD = re.compile(r"\w")
SPACES = re.compile(r"\W+")
MARKUP = re.compile(
    r"</?(?:div|span|p|br|table|tr|td|ul|ol|li|font|strong|em|h[1-6]|a)(?:\s[^<>]{0,200})?/?>|&(?:nbsp|amp|quot|lt|gt|#\d{2,5});",
    re.IGNORECASE,
)
MEANT_MARKUP = re.compile(r"```|\bhtml\b|\bxml\b|\bweb page\b|\bcss\b|`<", re.IGNORECASE)
# UTF-8 that was read as Windows-1252 or Latin-1, and characters that were lost.
MOJIBAKE = re.compile(
    r"\u00c3[\u0080-\u00bf\u0192\u201a\u0178\u0153\u0161\u0160\u0152]|\u00e2\u20ac[\u0153\u009d\u02dc\u2122\u201c\u201d\u00a6\u00a2]|\u00c2[\u00a0\u00a3\u00a9\u00ab\u00bb\u00b0]|\u00ef\u00bb\u00bf|\ufffd"
)


class RowStatistics:
    """What warnings are made of, of the rows of a sample. Memory is bounded by the size of the sample."""

    def __init__(self) -> None:
        self.rows = 0
        self.characters = 0
        self._lengths: list[int] = []
        self._with_answer = self._wordless_prompts = self._empty_systems = self._markup = self._mojibake = self._leaks = 0
        self._answers = Counter[bytes]()
        self._has_long_answers = False
        self._classes: set[str] = set()
        self._class_rows: list[tuple[str, str]] = []  # answers with their prompts

    def add(self, texts: RowTexts) -> None:
        """Add one row."""
        self.rows += 1
        self.characters += texts.characters
        self._lengths.append(texts.characters)
        everything = texts.everything
        self._empty_systems += texts.system is not None and not texts.system.strip()
        self._markup += MARKUP.search(everything) is not None and MEANT_MARKUP.search(everything) is None
        self._mojibake += MOJIBAKE.search(everything) is not None
        self._wordless_prompts += bool(texts.prompt) and WORD.search(texts.prompt) is None
        if texts.answer:
            self._add_answer(texts)

    def _add_answer(self, texts: RowTexts) -> None:
        answer = _normalize(texts.answer)
        self._with_answer += 1
        self._answers[blake2b(answer.encode(), digest_size=16).digest()] += 1
        if len(answer) >= MIN_LEAKED_CHARACTERS and len(texts.prompt) <= MAX_LEAK_CHECK_CHARACTERS:
            self._leaks += _has_phrase(texts.prompt, answer)
        self._has_long_answers |= len(answer) > MAX_CLASS_CHARACTERS
        if self._has_long_answers or len(self._classes) > MAX_CLASSES:
            return
        self._classes.add(answer)
        if len(self._class_rows) < CLASS_LEAK_ROWS:
            self._class_rows.append((answer, texts.prompt[-MAX_CLASS_PROMPT_CHARACTERS:]))

    @property
    def _has_classes(self) -> bool:
        """Whether the answers are the names of classes."""
        return not self._has_long_answers and len(self._answers) <= min(MAX_CLASSES, self._with_answer / MIN_ROWS_PER_CLASS)

    def iter_warnings(self) -> Iterator[str]:
        """What the contents of the rows suggest."""
        yield from self._iter_answer_warnings()
        if self._wordless_prompts:
            yield (
                f"{_count(self._wordless_prompts, self.rows)} a prompt without a single word, from which no answer follows; "
                "drop these rows, or check which column became the prompt"
            )
        if self._empty_systems:
            yield f"{_count(self._empty_systems, self.rows)} an empty system message, which some chat templates still write; leave it out"
        if self._markup > MIN_MARKUP_SHARE * self.rows:
            yield (
                f"{_count(self._markup, self.rows)} HTML tags or entities in the text, which the model will learn to write; "
                "strip them unless they are meant"
            )
        if self._mojibake >= MIN_MOJIBAKE_ROWS:
            yield (
                f"{_count(self._mojibake, self.rows)} characters of a wrong encoding, such as \u00c3\u00a9 for \u00e9; "
                "save the file as UTF-8 from its source, or send its real `encoding`"
            )

    def _iter_answer_warnings(self) -> Iterator[str]:
        if self._with_answer < MIN_COMPARED_ROWS:
            return
        most_frequent = max(self._answers.values()) / self._with_answer
        if len(self._answers) == 1:
            yield "all answers are the same, so the model learns to ignore the prompt; check which column became the answer"
        elif most_frequent > MAX_CLASS_SHARE:
            yield (
                f"{most_frequent:.0%} of the answers are the same, so a model that always gives it looks good; "
                "add rows with other answers, or drop some of these"
            )
        elif most_frequent > MAX_ANSWER_SHARE and not self._has_classes:
            yield f"{most_frequent:.0%} of the rows have one and the same answer; drop most of these rows unless the model should prefer it"
        leaks = self._find_leak_share()
        if leaks > MAX_LEAK_SHARE:
            yield (
                f"in {leaks:.0%} of the rows the prompt already contains the answer, so the model learns to copy; "
                "remove it from the prompt unless copying is the task"
            )

    def _find_leak_share(self) -> float:
        """The share of the rows whose prompt has the answer: of classes, the name of the right one and of no other."""
        if not self._has_classes:
            return self._leaks / self._with_answer
        leaking = misleading = 0
        for answer, prompt in self._class_rows:
            named = {name for name in self._classes if len(name) > 1 and _has_phrase(prompt, name)}
            leaking += named == {answer}
            misleading += len(named) == 1 and named != {answer}
        return leaking / len(self._class_rows) if leaking > LEAK_TO_MISLEAD * misleading else 0.0

    def has_long_tail(self) -> bool:
        """Whether a few rows are many times as long as most, by characters."""
        ordered = sorted(self._lengths)
        if not ordered:
            return False
        return _is_long_tail(
            ordered[len(ordered) // 2] // CHARACTERS_PER_TOKEN,
            ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] // CHARACTERS_PER_TOKEN,
        )


def list_warnings(rows: Mapping[str, int], statistics: RowStatistics, report: DatasetReport) -> tuple[str, ...]:
    """All warnings, the most important ones first. `rows` counts those of each split; the report has everything else."""
    return (
        *_iter_size_warnings(rows),
        *_iter_duplicate_warnings(report),
        *statistics.iter_warnings(),
        *_iter_length_warnings(statistics, report.token_lengths),
        *_iter_language_warnings(report.languages, report.sampled_rows),
        *_iter_finding_warnings(report),
    )


def _iter_size_warnings(rows: Mapping[str, int]) -> Iterator[str]:
    total, held_out = sum(rows.values()), rows.get(EVAL_SPLIT, 0)
    if total < FEW_ROWS:
        yield f"there are only {total} rows; most tasks need at least {FEW_ROWS}, better several hundred"
    elif 0 < held_out < FEW_HELD_OUT_ROWS:
        yield (
            f"only {held_out} rows are held out, so the evaluation varies by chance; "
            f"add rows, or raise `eval_fraction` so that at least {FEW_HELD_OUT_ROWS} are held out"
        )


def _iter_duplicate_warnings(report: DatasetReport) -> Iterator[str]:
    found = report.near_duplicates
    if found and found.held_out_rows_with_a_near_duplicate:
        count = found.held_out_rows_with_a_near_duplicate
        yield (
            f"{_count(count, found.compared_rows, 'held-out row')} a near-duplicate among the training rows, so the evaluation will look "
            "better than it is; drop these rows, or merge their variants before uploading"
        )


def _iter_length_warnings(statistics: RowStatistics, lengths: TokenLengths | None) -> Iterator[str]:
    if lengths is None:
        if statistics.has_long_tail():
            yield "a few rows are many times as long as most, and set the memory that a training needs; split or shorten them"
        return
    if lengths.truncated_rows:
        yield (
            f"{_count(lengths.truncated_rows, lengths.rows)} more than {lengths.max_seq_length:,} tokens, "
            f"and will be cut at the end; raise max_seq_length (the longest row has {lengths.percentiles['100']:,}), or split them"
        )
    if _is_long_tail(lengths.percentiles["50"], lengths.percentiles["99"]):
        yield (
            f"1% of the rows have more than {lengths.percentiles['99']:,} tokens, where half have at most {lengths.percentiles['50']:,}; "
            "a few long rows set the memory that a training needs: split or shorten them, or lower max_seq_length"
        )
    if lengths.note:
        yield lengths.note


def _iter_language_warnings(languages: Mapping[str, float], sampled_rows: int) -> Iterator[str]:
    known = sorted(((share, name) for name, share in languages.items() if name != UNKNOWN), reverse=True)
    if sampled_rows >= MIN_LANGUAGE_ROWS and len(known) > 1 and known[1][0] >= MIN_LANGUAGE_SHARE:
        named = ", ".join(f"{name} {share:.0%}" for share, name in known if share >= MIN_LANGUAGE_SHARE)
        yield f"the rows are in several languages ({named}); make sure that this is meant, and that each has enough rows"


def _iter_finding_warnings(report: DatasetReport) -> Iterator[str]:
    if report.secrets:
        kinds = ", ".join(finding.kind for finding in report.secrets)
        rows = max(finding.rows for finding in report.secrets)
        yield (
            f"{rows:,} or more rows seem to have secrets ({kinds}), which a model can repeat; revoke them, and remove them from the file"
            if rows > 1
            else f"a row seems to have a secret ({kinds}), which a model can repeat; revoke it, and remove it from the file"
        )


def _is_long_tail(median: int, p99: int) -> bool:
    return p99 > LONG_TAIL * median and p99 >= MIN_TAIL_TOKENS


def _count(count: int, total: int, noun: str = "row") -> str:
    """`3 rows (2%) have`."""
    share = count / total if total else 0.0
    percent = "less than 1%" if share < 0.005 else f"{share:.0%}"
    return f"{count:,} {noun} ({percent}) has" if count == 1 else f"{count:,} {noun}s ({percent}) have"


def _normalize(text: str) -> str:
    """Without case, punctuation and the width of spaces."""
    return SPACES.sub(" ", text.casefold()).strip()


def _has_phrase(text: str, phrase: str) -> bool:
    """Whether a text has a normalized phrase, as whole words."""
    return bool(phrase) and f" {phrase} " in f" {_normalize(text)} "
