"""The questions of some rows, as a user asks them: every exported file must give the model the same tokens as the training did."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from jobs.llm.data.text_encoder import TextEncoder
from jobs.llm.data.tokenize import RowTokenizer, read_rows
from jobs.llm.data.turns import Turns
from jobs.llm.trained_model import UserPrompt
from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT
from schema.types import DatasetType

if TYPE_CHECKING:
    from jobs.llm.training_context import TrainingContext

NUM_USER_PROMPTS = 8
ROWS_READ = 64  # of which the first suitable ones are taken
MAX_PROMPT_TOKENS = 2048  # longer ones are not among them: a file reads every prompt when it is verified


def make_user_prompts(training: "TrainingContext") -> tuple[UserPrompt, ...]:
    """The questions of the first held-out rows, or training rows without those. Raises JobFailed for a row that cannot be rendered.

    Questions with earlier answers are left out where there are others: a template may rewrite those, such as their reasoning.
    """
    path = training.splits.get(EVAL_SPLIT) or training.splits[TRAIN_SPLIT]
    rows = islice(read_rows(path), ROWS_READ)
    prompts = list(iter_user_prompts(rows, training.context.spec.dataset.dataset_type, training.row_tokenizer))
    first_questions = [prompt for prompt in prompts if all(message["role"] != "assistant" for message in prompt.messages)]
    return tuple((first_questions or prompts)[:NUM_USER_PROMPTS])


def iter_user_prompts(rows: Iterable[dict[str, Any]], dataset_type: DatasetType, row_tokenizer: RowTokenizer) -> Iterator[UserPrompt]:
    """The questions of those rows that hold text alone and are not too long.

    Rows that hold the text of a special token are left out: in training it is text, and a program that tokenizes a rendered conversation
    cannot know that.
    """
    encoder = TextEncoder(row_tokenizer.tokenizer)
    for row in rows:
        if not _has_text_alone(row) or encoder.hide_control_tokens(row) is not row:
            continue
        prompt = _make_user_prompt(row, dataset_type, row_tokenizer)
        if prompt is not None and prompt.prompt_tokens <= MAX_PROMPT_TOKENS:
            yield prompt


def _make_user_prompt(row: dict[str, Any], dataset_type: DatasetType, row_tokenizer: RowTokenizer) -> UserPrompt | None:
    """The question of a row; None for a row without an answer to learn."""
    if dataset_type == "prompt":
        return _make_question_alone(row, row_tokenizer)
    if dataset_type in ("preference", "unpaired_preference"):
        answer = row["chosen"] if dataset_type == "preference" else row["completion"]
        row, dataset_type = row | {"completion": answer}, "prompt_completion"
    turns, tokens = row_tokenizer.read_turns(row, dataset_type), row_tokenizer.tokenize(row, dataset_type)
    if not isinstance(turns, Turns):
        if row_tokenizer.chat_format.template is not None:  # a text of turns, which says nothing about a question
            return None
        if turns:
            return UserPrompt((), (), turns, tuple(tokens.input_ids), tokens.prompt_tokens)
        text = row["text"] if dataset_type == "text" else row["completion"]
        ends_with_eos = tokens.input_ids[-1:] == [row_tokenizer.tokenizer.eos_token_id]
        return UserPrompt((), (), text, tuple(tokens.input_ids), len(tokens.input_ids) - ends_with_eos)
    answers = [n for n in range(turns.first, len(turns.messages)) if _is_learned(turns.messages[n])]
    if not answers or not tokens.has_labels:
        return None
    # The tokens of these count as the prompt those before the last answer.
    first = answers[-1] if row_tokenizer.last_turn_only or row_tokenizer.train_on_inputs else answers[0]
    return _make_conversation(turns.messages[:first], turns.tools, tokens.input_ids, tokens.prompt_tokens)


def _make_question_alone(row: dict[str, Any], row_tokenizer: RowTokenizer) -> UserPrompt:
    """The question of a row that has no answer: a trainer that generates answers reads it to its end."""
    empty_answer = "" if isinstance(row["prompt"], str) else [{"role": "assistant", "content": ""}]
    turns = row_tokenizer.read_turns(row | {"completion": empty_answer}, "prompt_completion")
    if not isinstance(turns, Turns):
        ids = row_tokenizer.tokenize_prompt(row["prompt"]).input_ids
        return UserPrompt((), (), str(row["prompt"]), tuple(ids), len(ids))
    ids = row_tokenizer.tokenize_prompt(row["prompt"], turns.tools).input_ids
    return _make_conversation(turns.messages[: turns.first], turns.tools, ids, len(ids))


def _make_conversation(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[dict[str, Any]] | None, ids: Sequence[int], prompt_tokens: int
) -> UserPrompt:
    """The messages as a user sends them: with a text, and without what only training reads."""
    sent = tuple(
        {name: value for name, value in message.items() if name != "weight"} | {"content": message.get("content") or ""}
        for message in messages
    )
    return UserPrompt(sent, tuple(tools or ()), None, tuple(ids), prompt_tokens)


def _is_learned(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def _has_text_alone(row: Mapping[str, Any]) -> bool:
    messages = [message for name in ("messages", "prompt") if isinstance(row.get(name), list) for message in row[name]]
    return not row.get("images") and all(isinstance(message.get("content"), str | None) for message in messages)
