"""Which labels end a turn instead of being part of an answer.

A chat template writes the end of a turn after each answer: a stop token, often a newline, sometimes more special tokens. A base model that
never saw a chat cannot expect them, so learning to write them can make up most of the gain in perplexity. Metrics without these labels
show what the model learned about the answers themselves.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.llm.training_context import TrainingContext


class TurnEnds:
    """Finds the labels that end a turn: stop tokens, and the special tokens and whitespace that directly follow one."""

    def __init__(self, stop_ids: Sequence[int], tokenizer: Any) -> None:
        self._stop_ids = list(stop_ids)
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._special_ids = {*tokenizer.all_special_ids, *(token_id for token_id, token in added.items() if token.special)}
        self._separators: dict[int, bool] = {}  # whether a token that follows a stop token belongs to the end of the turn

    def find(self, labels: Any) -> Any:
        """Where `labels` (B, T) end a turn, as booleans (B, T). What follows a label of IGNORE_INDEX begins a new run of labels."""
        import torch

        found = torch.isin(labels, torch.tensor(self._stop_ids, dtype=labels.dtype, device=labels.device))
        last = found
        while True:  # one more token after each end of turn each time; the templates write one or two
            follows = torch.zeros_like(found)
            follows[:, 1:] = last[:, :-1]
            follows &= ~found
            separators = [token for token in labels[follows].unique().tolist() if self._is_separator(token)]
            last = follows & torch.isin(labels, torch.tensor(separators, dtype=labels.dtype, device=labels.device))
            if not last.any():
                return found
            found = found | last

    def _is_separator(self, token: int) -> bool:
        if token not in self._separators:
            self._separators[token] = token >= 0 and (token in self._special_ids or not self._tokenizer.decode([token]).strip())
        return self._separators[token]


def get_turn_ends(training: "TrainingContext") -> TurnEnds:
    """The ends of turns of the model in training."""
    return TurnEnds(training.chat_format.stop_token_ids, training.tokenizer)
