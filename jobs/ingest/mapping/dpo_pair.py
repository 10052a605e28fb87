"""A better and a worse answer: as two columns, as one column of pairs, or as two answers of which another column names the better one."""

from collections.abc import Sequence

from jobs.ingest.mapping.headings import (
    ANSWER_ENDS,
    ANSWER_STEMS,
    ANSWERS,
    CHOSEN,
    INPUTS,
    INSTRUCTIONS,
    PICKERS,
    QUESTIONS,
    REJECTED,
)
from jobs.ingest.mapping.labels import find_choice
from jobs.ingest.mapping.pairs import Prompt, add_input, find_context, find_conversation, name_keys
from jobs.ingest.mapping.sample import Ambiguous, MessageKeys, Reading, Sample, as_messages
from schema.ingestion import RowMapping


def recognize(sample: Sample) -> Reading | None:
    """Recognize two answers to one prompt."""
    chosen, rejected = sample.find(CHOSEN), sample.find(REJECTED)
    if len(rejected) == 1 and not chosen:
        return _read_one_rejected(sample, rejected[0])
    if len(chosen) == len(rejected) == 1:
        return _read_answers(sample, chosen[0], rejected[0])
    if chosen and rejected:
        examples = [RowMapping(chosen=chosen[0], rejected=rejected[0]), RowMapping(chosen=chosen[-1], rejected=rejected[-1])]
        raise Ambiguous((*chosen, *rejected), examples)
    return _read_preferred(sample) or _read_pairs(sample)


def _read_one_rejected(sample: Sample, rejected: str) -> Reading | None:
    """A worse answer beside a conversation that ends with the better one, or beside a prompt and its answer."""
    conversation = find_conversation(sample)
    if conversation is not None:
        context = {field: column for field, column in find_context(sample).items() if field != "history"}
        keys = name_keys(sample, conversation.keys, [conversation.column])
        mapping = RowMapping.model_validate({"messages": conversation.column, "rejected": rejected, **context, **keys})
        return Reading("dpo_pair", "preference", (conversation.column, rejected, *context.values()), mapping)
    answers = sample.find_texts(ANSWERS)
    return _read_answers(sample, answers[0], rejected) if len(answers) == 1 else None


def _read_answers(sample: Sample, chosen: str, rejected: str, **picked: str) -> Reading | None:
    """Two columns of answers, each of text or of messages."""
    keys = sample.find_message_keys(chosen)
    if keys != sample.find_message_keys(rejected) or (keys is None and not (sample.is_text(chosen) and sample.is_text(rejected))):
        return None
    fields: dict[str, object] = {"chosen": chosen, "rejected": rejected, **picked}
    columns = (chosen, rejected, *picked.values())
    context = find_context(sample)
    conversation = find_conversation(sample)
    prompt = _find_prompt(sample, columns)
    if _has_whole_conversations(sample, chosen, keys) and (prompt is None or sample.repeats(prompt.columns[0], [chosen])):
        context.pop("history", None)
    elif prompt is not None:
        fields["prompt"], columns = prompt.template, (*prompt.columns, *columns)
        keys = keys or sample.find_message_keys(prompt.columns[0])
    elif conversation is not None:
        context.pop("history", None)
        fields["messages"], columns = conversation.column, (conversation.column, *columns)
        keys = keys or conversation.keys
    else:
        return None
    fields |= context
    if keys is not None:
        fields |= name_keys(sample, keys, columns, is_json_text=sample.has_json_text(columns))
    return Reading("dpo_pair", "preference", (*columns, *context.values()), RowMapping.model_validate(fields))


def _find_prompt(sample: Sample, answers: Sequence[str]) -> Prompt | None:
    """The prompt of two answers. Raises Ambiguous if there are several."""
    named = [column for column in sample.find(INSTRUCTIONS | QUESTIONS) if column not in answers]
    prompts = [column for column in named if sample.is_text(column) or sample.find_message_keys(column)]
    if len(prompts) > 1:
        raise Ambiguous(prompts, [RowMapping(prompt=prompt, chosen=answers[0], rejected=answers[1]) for prompt in prompts[:3]])
    if prompts:
        return (
            add_input(sample, prompts[0], chosen=answers[0], rejected=answers[1])
            if sample.is_text(prompts[0])
            else Prompt(prompts[0], (prompts[0],))
        )
    inputs = [column for column in sample.find(INPUTS) if sample.is_text(column) or sample.find_message_keys(column)]
    return Prompt(inputs[0], (inputs[0],)) if len(inputs) == 1 else None


def _has_whole_conversations(sample: Sample, column: str, keys: MessageKeys | None) -> bool:
    return keys is not None and all(len(as_messages(value)) > 1 for value in sample.values(column))


def _read_preferred(sample: Sample) -> Reading | None:
    """Two answers such as response_0 and response_1, and a column that names the better one."""
    for stem in sorted(ANSWER_STEMS):
        for ends in ANSWER_ENDS:
            found = [sample.find((f"{stem}_{end}", f"{stem}{end}")) for end in ends]
            if all(len(columns) == 1 for columns in found):
                first, second = (columns[0] for columns in found)
                return _read_picker(sample, first, second)
    return None


def _read_picker(sample: Sample, first: str, second: str) -> Reading | None:
    pickers = [
        column
        for column in sample.find(PICKERS)
        if (values := sample.values(column)) and any(find_choice(value, first, second) is not None for value in values)
    ]
    prompt = _find_prompt(sample, (first, second))
    if len(pickers) > 1:
        fields = {"chosen": first, "rejected": second} | ({"prompt": prompt.template} if prompt else {})
        examples = [RowMapping.model_validate({**fields, "preferred": picker}) for picker in pickers]
        raise Ambiguous((first, second, *pickers), examples)
    return _read_answers(sample, first, second, preferred=pickers[0]) if pickers else None


def _read_pairs(sample: Sample) -> Reading | None:
    """A column of answers that has lists of two texts, the better one first."""
    pairs = [column for column in sample.find(ANSWERS) if (values := sample.values(column)) and all(_is_pair(value) for value in values)]
    if len(pairs) != 1 or (prompt := _find_prompt(sample, (pairs[0], pairs[0]))) is None:
        return None
    context = find_context(sample)
    mapping = RowMapping.model_validate({"prompt": prompt.template, "chosen": pairs[0], "rejected": pairs[0], **context})
    note = ": lists of two answers, the better one first"
    return Reading("dpo_pair", "preference", (*prompt.columns, pairs[0], *context.values()), mapping, note=note)


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(answer, str) for answer in value)
