"""A conversation: the messages so far, and the model that answers the next one."""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from jobs.llm.chat.model import ChatModel, InvalidPrompt, Message


@dataclass
class Conversation:
    """The messages so far, and the model that answers the next one."""

    model: ChatModel
    max_tokens: int
    temperature: float  # 0 takes the most likely token, always the same
    system: str | None = None  # how the model should answer, told before the first message
    messages: list[Message] = field(default_factory=list)  # without the system message

    def answer(self, prompt: str) -> Generator[str]:
        """The text of each token as it is generated; empty while a character is incomplete. Raises InvalidPrompt before the first.

        Closing the iterator ends the answer; what was said until then stays part of the conversation.
        """
        earlier = self.messages if self.model.template is not None else []
        messages: list[Message] = [*earlier, {"role": "user", "content": prompt}]
        tokens = self._fit_to_context(messages)
        max_tokens = min(self.max_tokens, self.model.context_tokens - len(tokens))
        answer = ""
        with closing(self.model.generate(tokens, max_tokens, self.temperature)) as generated:
            try:
                for text in generated:
                    answer += text
                    yield text
            finally:
                self.messages = [*messages, {"role": "assistant", "content": answer}]

    def forget(self) -> None:
        """Begin again; the system message stays."""
        self.messages = []

    def check_system(self) -> None:
        """Raise InvalidPrompt for a system message that the model cannot be told."""
        if self.system is None:
            return
        if self.model.template is None:
            raise InvalidPrompt("the model continues texts, so it cannot be told how to answer; leave the system message out")
        self.model.tokenize(self._with_system([{"role": "user", "content": "Hello"}]))

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *messages]

    def _fit_to_context(self, messages: list[Message]) -> list[int]:
        """The messages as tokens; removes the oldest turns when there is no space for an answer."""
        tokens = self.model.tokenize(self._with_system(messages))
        while len(tokens) + self.max_tokens > self.model.context_tokens and len(messages) > 1:
            del messages[:2]
            tokens = self.model.tokenize(self._with_system(messages))
        if len(tokens) >= self.model.context_tokens:
            raise InvalidPrompt(f"the prompt has {len(tokens)} tokens; it must have fewer than {self.model.context_tokens}")
        return tokens
