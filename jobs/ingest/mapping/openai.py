"""Chats as OpenAI's API has them, `{"messages": [{"role", "content"}]}`, with more keys than rows may have, or as JSON text in a table."""

from jobs.ingest.mapping.pairs import Conversation, find_context, find_conversation, name_keys
from jobs.ingest.mapping.sample import Reading, Sample
from schema.ingestion import RowMapping


def recognize(sample: Sample) -> Reading | None:
    """Recognize a column of messages with the key `role`."""
    conversation = find_conversation(sample, ("role",))
    return None if conversation is None else read_conversation("openai", sample, conversation)


def read_conversation(shape: str, sample: Sample, conversation: Conversation) -> Reading:
    """The reading of a column of messages, with the system message and the tools that stand beside it."""
    context = {field: column for field, column in find_context(sample).items() if field != "history"}
    mapping = RowMapping.model_validate(
        {"messages": conversation.column, **context, **name_keys(sample, conversation.keys, [conversation.column])}
    )
    return Reading(shape, "messages", (conversation.column, *context.values()), mapping)
