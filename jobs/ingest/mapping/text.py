"""Plain text in one column."""

from jobs.ingest.mapping.headings import SECOND_HALVES, TEXTS
from jobs.ingest.mapping.sample import Ambiguous, Reading, Sample
from schema.ingestion import RowMapping


def recognize(sample: Sample) -> Reading | None:
    """Recognize the only column of text. Raises Ambiguous beside a column such as `label`, which may be what is to be learned."""
    texts = [column for column in sample.find_texts(TEXTS) if sample.values(column)]
    if not texts:
        return None
    different = [texts[0], *(other for other in texts[1:] if not sample.repeats(other, [texts[0]]))]
    if len(different) > 1:
        raise Ambiguous(different, [RowMapping(text=column) for column in different[:3]])
    halves = sample.find_texts(SECOND_HALVES)
    if halves:
        pairs = [RowMapping(prompt=texts[0], completion=half) for half in halves[:2]]
        raise Ambiguous((texts[0], *halves), [*pairs, RowMapping(text=texts[0])])
    return Reading("text", "text", (texts[0],), RowMapping(text=texts[0]))
