"""A shape: a column `call` and a column `reply`."""

from jobs.ingest.mapping.sample import Reading, Sample
from schema.ingestion import RowMapping


def recognize(sample: Sample) -> Reading | None:
    """Recognize files with exactly these columns."""
    if set(sample.columns) != {"call", "reply"}:
        return None
    mapping = RowMapping(prompt="call", completion="reply")
    return Reading("toy", "prompt_completion", ("call", "reply"), mapping)
