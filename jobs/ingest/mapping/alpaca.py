"""Alpaca's form: an instruction, an optional input and an output, with an optional system message and earlier turns."""

from jobs.ingest.mapping.headings import INSTRUCTIONS
from jobs.ingest.mapping.pairs import describe_pair, find_context, find_pair
from jobs.ingest.mapping.sample import Reading, Sample
from schema.ingestion import RowMapping


def recognize(sample: Sample) -> Reading | None:
    """Recognize a column `instruction`, or a question with an input or a context, beside an answer."""
    pair = find_pair(sample)
    if pair is None:
        return None
    prompt, answer = pair
    if prompt.columns[0] not in sample.find(INSTRUCTIONS) and len(prompt.columns) == 1:
        return None
    context = find_context(sample)
    mapping = RowMapping.model_validate(describe_pair(sample, prompt, answer) | context)
    return Reading("alpaca", "prompt_completion", (*prompt.columns, answer, *context.values()), mapping)
