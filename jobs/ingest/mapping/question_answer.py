"""A question and an answer in two columns, in many spellings: see `headings.py`."""

from jobs.ingest.mapping.pairs import describe_pair, find_context, find_pair
from jobs.ingest.mapping.sample import Reading, Sample
from schema.ingestion import RowMapping


def recognize(sample: Sample) -> Reading | None:
    """Recognize one column of prompts and one of answers."""
    pair = find_pair(sample)
    if pair is None:
        return None
    prompt, answer = pair
    context = find_context(sample)
    mapping = RowMapping.model_validate(describe_pair(sample, prompt, answer) | context)
    return Reading("question_answer", "prompt_completion", (*prompt.columns, answer, *context.values()), mapping)
