"""A program for tests: an interactive chat with models that talk until they are interrupted. Arguments: the history file, labels."""

import fcntl
import sys
import termios
import time
from collections.abc import Generator, Sequence
from pathlib import Path

from jobs.llm.chat.conversation import Conversation
from jobs.llm.chat.model import InvalidPrompt, Message
from jobs.llm.chat.output import Speaker
from jobs.llm.chat.terminal import TerminalChat


class EndlessModel:
    """Says how many messages it was sent, and `word` for ever; has no place for the system message `no`."""

    runs_as = "a test"
    context_tokens = 1 << 30
    template = "any"

    def tokenize(self, messages: Sequence[Message]) -> list[int]:
        if messages[0] == {"role": "system", "content": "no"}:
            raise InvalidPrompt("System role not supported")
        return [len(messages)]

    def generate(self, tokens: list[int], max_tokens: int, temperature: float) -> Generator[str]:
        yield f"{tokens[0]} messages"
        while True:
            time.sleep(0.001)
            yield " word"


if __name__ == "__main__":
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that the terminal turns Ctrl-C into a signal
    speakers = [Speaker(label, Conversation(EndlessModel(), 1 << 20, 0.0)) for label in sys.argv[2:] or [""]]
    code = TerminalChat(speakers, "the endless model", Path(sys.argv[1])).run()
    print("bye", flush=True)
    sys.exit(code)
