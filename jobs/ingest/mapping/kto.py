"""Answers with a label that says whether they are good, each beside its prompt or at the end of its conversation."""

from jobs.ingest.mapping.headings import LABELS
from jobs.ingest.mapping.labels import find_label
from jobs.ingest.mapping.pairs import describe_pair, find_context, find_conversation, find_pair, name_keys
from jobs.ingest.mapping.sample import Ambiguous, Reading, Sample
from schema.ingestion import RowMapping


def recognize(sample: Sample) -> Reading | None:
    """Recognize a column of labels beside a prompt and an answer."""
    labels = [column for column in sample.find(LABELS) if _is_label(sample, column)]
    if not labels:
        return None
    conversation = find_conversation(sample)
    context = find_context(sample)
    if conversation is not None:
        context.pop("history", None)
        columns = (conversation.column,)
        fields: dict[str, object] = {"messages": conversation.column, **name_keys(sample, conversation.keys, [conversation.column])}
    elif pair := find_pair(sample, allow_references=True):
        prompt, answer = pair
        columns = (*prompt.columns, answer)
        fields = describe_pair(sample, prompt, answer)
    else:
        return None
    if len(labels) > 1:
        raise Ambiguous((*columns, *labels), [RowMapping.model_validate({**fields, "label": label}) for label in labels])
    mapping = RowMapping.model_validate({**fields, **context, "label": labels[0]})
    return Reading("kto", "unpaired_preference", (*columns, labels[0], *context.values()), mapping)


def _is_label(sample: Sample, column: str) -> bool:
    """Whether most values are labels. The others are errors of their rows: without their labels, bad answers would be learned as good."""
    values = sample.values(column)
    return 2 * sum(find_label(value) is not None for value in values) > len(values)
