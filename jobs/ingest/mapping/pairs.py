"""What several shapes share: the columns of a prompt and of its answer, and those of a conversation."""

from collections.abc import Collection, Sequence
from itertools import product
from typing import NamedTuple

from jobs.ingest.mapping.headings import (
    ANSWERS,
    CONVERSATIONS,
    HISTORIES,
    INPUTS,
    INSTRUCTIONS,
    PAIRS,
    QUESTIONS,
    REFERENCE_ANSWERS,
    SYSTEMS,
    TOOLS,
    normalize_heading,
)
from jobs.ingest.mapping.sample import Ambiguous, MessageKeys, Sample
from jobs.ingest.rows.messages import ROLES
from schema.ingestion import RowMapping

MAX_EXAMPLES = 3  # meanings that a message shows


class Prompt(NamedTuple):
    """A prompt: a column, or a template with an optional second one."""

    template: str
    columns: tuple[str, ...]


class Conversation(NamedTuple):
    """A column of messages, and their keys."""

    column: str
    keys: MessageKeys


def find_pair(sample: Sample, *, allow_references: bool = False) -> tuple[Prompt, str] | None:
    """The prompt and the answer, which is a column. Raises Ambiguous if there are several.

    Unless references are allowed, `answer` beside `prompt` is no pair: it is what graders compare with.
    """
    prompts, answers = _find_contents(sample, INSTRUCTIONS | QUESTIONS), _find_contents(sample, ANSWERS)
    pairs = list(product(prompts, answers))
    if not pairs:
        named = ((_find_contents(sample, (first,)), _find_contents(sample, (second,))) for first, second in PAIRS)
        pairs = [pair for firsts, seconds in named for pair in product(firsts, seconds)]
    if not allow_references:
        pairs = [(prompt, answer) for prompt, answer in pairs if prompt != "prompt" or normalize_heading(answer) not in REFERENCE_ANSWERS]
    if not pairs:
        return None
    if len(pairs) > 1:
        examples = [RowMapping(prompt=prompt, completion=answer) for prompt, answer in pairs[:MAX_EXAMPLES]]
        raise Ambiguous([column for column in sample.columns if any(column in pair for pair in pairs)], examples)
    prompt, answer = pairs[0]
    return add_input(sample, prompt, completion=answer), answer


def describe_pair(sample: Sample, prompt: Prompt, answer: str) -> dict[str, object]:
    """The fields of a mapping that say where prompt and answer are, and how to read them if they are messages."""
    fields: dict[str, object] = {"prompt": prompt.template, "completion": answer}
    columns = (*prompt.columns, answer)
    found = next(((column, keys) for column in columns if (keys := sample.find_message_keys(column))), None)
    if found is None:
        return fields
    return fields | name_keys(sample, found[1], columns, is_json_text=sample.has_json_text(columns))


def _find_contents(sample: Sample, headings: Collection[str]) -> tuple[str, ...]:
    """The columns with one of these names that have texts or messages."""
    return tuple(column for column in sample.find(headings) if sample.is_text(column) or sample.find_message_keys(column))


def add_input(sample: Sample, prompt: str, **answers: str) -> Prompt:
    """The prompt with the column `input` or `context` of the file, if it has one. Raises Ambiguous if it has both.

    `answers` are the fields of the mapping that have the answers.
    """
    inputs = [column for column in sample.find_texts(INPUTS) if column not in (prompt, *answers.values())]
    if not inputs or not sample.is_text(prompt):
        return Prompt(prompt, (prompt,))
    templates = [f"{{{prompt}}}\n\n{{{column}}}" for column in inputs]
    if len(inputs) > 1:
        raise Ambiguous((prompt, *inputs), [RowMapping.model_validate({"prompt": each, **answers}) for each in templates])
    return Prompt(templates[0], (prompt, inputs[0]))


def find_conversation(sample: Sample, role_keys: Sequence[str] = ("role", "from")) -> Conversation | None:
    """The column of messages. Raises Ambiguous if there are several that say different things."""
    found = [
        (column, keys) for column in sample.find(CONVERSATIONS) if (keys := sample.find_message_keys(column)) and keys.role in role_keys
    ]
    if not found:
        return None
    different = [found[0], *(other for other in found[1:] if not sample.repeats(other[0], [found[0][0]]))]
    if len(different) > 1:
        examples = [
            RowMapping.model_validate({"messages": column, **name_keys(sample, keys, [column])})
            for column, keys in different[:MAX_EXAMPLES]
        ]
        raise Ambiguous([column for column, _ in different], examples)
    column, keys = found[0]
    return Conversation(column, keys)


def find_context(sample: Sample) -> dict[str, str]:
    """The fields `system`, `tools` and `history` of a mapping, of those columns that the file has."""
    fields = {"system": sample.find_texts(SYSTEMS), "tools": sample.find(TOOLS), "history": sample.find(HISTORIES)}
    return {field: columns[0] for field, columns in fields.items() if columns}


def name_keys(sample: Sample, keys: MessageKeys, columns: Sequence[str], *, is_json_text: bool = False) -> dict[str, object]:
    """The fields of a mapping that say how to read the messages in these columns.

    The key of roles is named where its default would not do: JSON text in columns of texts, and other roles than rows have. Roles of a
    column `messages` are what they are: a wrong one is an error of its row.
    """
    named: dict[str, object] = {}
    has_other_roles = any(
        normalize_heading(column) != "messages" and not sample.find_roles(column, keys) <= set(ROLES) for column in columns
    )
    if keys.role != "role" or is_json_text or has_other_roles:
        named["role_key"] = keys.role
    if keys.content != "content":
        named["content_key"] = keys.content
    return named
