"""Chats in ShareGPT's form, `{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}`."""

from jobs.ingest.mapping.openai import read_conversation
from jobs.ingest.mapping.pairs import find_conversation
from jobs.ingest.mapping.sample import Reading, Sample


def recognize(sample: Sample) -> Reading | None:
    """Recognize a column of messages with the key `from`."""
    conversation = find_conversation(sample, ("from",))
    return None if conversation is None else read_conversation("sharegpt", sample, conversation)
