"""Turns the text of a prompt, as a chat template wrote it, back into what the user wrote: samples are read by people."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.llm.exporters.go_template import FIRST, Role, Turn, TurnPieces
from jobs.llm.exporters.modelfile import make_ollama_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jobs.llm.chat_format import ChatFormat


# The user comes first: a template without system messages of their own puts both into one turn.
FIRST_ROLES: tuple[Role, ...] = ("user", "system")


def make_readable(prompts: Sequence[str], chat_format: "ChatFormat", tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Each prompt without what the chat template wrote around it: a single question as it is, several turns with their roles.

    Where the template's text cannot be told from the messages', only its special tokens are removed.
    """
    pieces = make_ollama_template(chat_format, tokenizer).pieces if chat_format.template is not None else None
    special_tokens = {*tokenizer.all_special_tokens, *(str(tokenizer.convert_ids_to_tokens(n)) for n in chat_format.turn_token_ids)}
    readable: list[str] = []
    for prompt in prompts:
        text = prompt.removeprefix(str(tokenizer.bos_token or ""))
        turns = read_turns(pieces, text) if pieces is not None else None
        if turns is not None:
            readable.append(turns[0][1] if len(turns) == 1 else "\n\n".join(f"{role}: {content}" for role, content in turns))
        elif chat_format.template is None:
            readable.append(text)
        else:
            for token in special_tokens:
                text = text.replace(token, "")
            readable.append(text.strip("\n"))
    return readable


def read_turns(pieces: TurnPieces, text: str) -> list[Turn] | None:
    """The conversation that a template wrote as `text`, without a BOS token and up to the answer; None if it wrote something else."""
    endings = [ending for ending in (pieces.answer_start, pieces.before["user", "assistant"]) if ending and text.endswith(ending)]
    possible: list[Role] = [
        first for first in FIRST_ROLES if (FIRST, first) in pieces.before and text.startswith(pieces.before[FIRST, first])
    ]
    if not endings or not possible:
        return None
    role = possible[0]
    rest = text.removesuffix(max(endings, key=len)).removeprefix(pieces.before[FIRST, role])
    turns: list[Turn] = []
    following: dict[Role, Role] = {"system": "user", "user": "assistant", "assistant": "user"}
    while True:
        separator = pieces.before[role, following[role]]
        content, found, remaining = rest.partition(separator) if separator else (rest, "", "")
        turns.append((role, content))
        if not found:
            return turns if role == "user" else None
        role, rest = following[role], remaining
