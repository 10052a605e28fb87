"""Prompts without an answer, for trainers whose model generates the completions."""

from dataclasses import dataclass
from typing import Any

from jobs.llm.data.tokenize import IGNORE_INDEX, TokenizedExample
from jobs.llm.graders.base import GradingInput
from jobs.llm.graders.reward import to_text


@dataclass(frozen=True)
class PromptRow:
    """A row: the prompt, and the columns that graders may read."""

    prompt: str | list[dict[str, Any]]
    tokens: TokenizedExample  # of the prompt, and of the row's own completion if it has one
    columns: dict[str, Any]

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens of the prompt."""
        return self.tokens.input_ids[: self.tokens.prompt_tokens]

    def make_grading_input(self, completion: str) -> GradingInput:
        """What graders get for a completion of this prompt."""
        return GradingInput(to_text(self.prompt), completion, self.columns)

    def tokens_with_completion(self, completion: str, tokenizer: Any) -> TokenizedExample:
        """The tokens of the prompt with the row's own completion; if it has none, with this completion, without labels."""
        if self.tokens.has_labels:
            return self.tokens
        ids = self.tokens.input_ids + tokenizer(completion, add_special_tokens=False)["input_ids"]
        return TokenizedExample(ids, [IGNORE_INDEX] * len(ids), self.tokens.prompt_text, self.tokens.prompt_tokens)
