"""An interactive chat: banner, commands, history of questions, and what Ctrl-C means.

Ctrl-C while an answer is generated ends the answer; at the prompt it clears the line, and a second one leaves, as Ctrl-D does.
"""

import signal
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from jobs.llm.chat.model import InvalidPrompt
from jobs.llm.chat.output import IsInterrupted, Speaker, answer_line

MAX_HISTORY_LINES = 1000
HELP = """\
/system TEXT   tell the model how to answer, and begin again; without TEXT, tell it nothing
/reset         forget what was said
/exit          leave; so do Ctrl-D, and Ctrl-C twice
Ctrl-C         ends an answer; what was said so far stays part of the chat
A space before / asks the model the line as it is."""


class TerminalChat:
    """A chat with a person at a terminal. Answers go to stdout, everything else to stderr."""

    def __init__(self, speakers: Sequence[Speaker], title: str, history: Path | None) -> None:
        self._speakers = speakers
        self._title = title
        self._history = history

    def run(self) -> int:
        """Answer lines until the person leaves; returns the exit code."""
        self._print_banner()
        with _keep_history(self._history):
            was_interrupted = False
            while True:
                try:
                    line = input("> ")
                    was_interrupted = False
                    if line.strip() == "/exit":
                        return 0
                    self._take(line)
                except EOFError:
                    print()
                    return 0
                except KeyboardInterrupt:
                    print()
                    if was_interrupted:
                        return 0
                    was_interrupted = True
                    _say("Ctrl-C again, Ctrl-D or /exit leaves")

    def _take(self, line: str) -> None:
        if line.startswith("/"):
            self._obey(line)
        elif line.strip():
            self._answer(line.strip())

    def _print_banner(self) -> None:
        _say(f"{self._title} ({self._describe()})")
        for speaker in self._speakers:
            if speaker.conversation.model.template is None:
                owner = f"{speaker.label} has" if speaker.label else "it has"
                _say(f"{owner} no chat template: it continues each text that you write")
        system = self._speakers[0].conversation.system
        if system:
            _say(f"system: {system}")
        _say("/help lists the commands; Ctrl-C ends an answer; Ctrl-D leaves")

    def _describe(self) -> str:
        """What answers, in words."""
        return "; ".join(
            f"{speaker.label}: {speaker.conversation.model.runs_as}" if speaker.label else speaker.conversation.model.runs_as
            for speaker in self._speakers
        )

    def _obey(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        match command:
            case "/help":
                _say(HELP)
            case "/reset":
                self._begin_again("forgotten")
            case "/system":
                self._set_system(rest.strip() or None)
            case _:
                _say(f"no command {command}; /help lists them; with a space before it the model is asked the line")

    def _set_system(self, system: str | None) -> None:
        before = [speaker.conversation.system for speaker in self._speakers]
        try:
            for speaker in self._speakers:
                speaker.conversation.system = system
                speaker.conversation.check_system()
        except InvalidPrompt as error:
            for speaker, earlier in zip(self._speakers, before, strict=True):
                speaker.conversation.system = earlier
            _say(f"error: {error}")
            return
        self._begin_again(f"system: {system}" if system else "no system message")

    def _begin_again(self, notice: str) -> None:
        for speaker in self._speakers:
            speaker.conversation.forget()
        _say(notice)

    def _answer(self, line: str) -> None:
        with _note_interrupt() as is_interrupted:
            try:
                answer_line(self._speakers, line, is_interrupted)
            except KeyboardInterrupt:  # a second one, before the model reached its next token
                print(flush=True)


@contextmanager
def _note_interrupt() -> Generator[IsInterrupted]:
    """Makes a first Ctrl-C a fact to ask for, so that no library is left in the middle of something; a second one raises."""
    interrupted = False

    def note(_: int, __: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: interrupted
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _keep_history(path: Path | None) -> Generator[None]:
    """Line editing, with the questions of earlier chats in a file that only its owner reads."""
    import readline

    if path is None:
        yield
        return
    try:
        readline.read_history_file(path)
    except OSError:  # the first chat, or a file of somebody else
        readline.clear_history()
    readline.set_history_length(MAX_HISTORY_LINES)
    try:
        yield
    finally:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            path.chmod(0o600)
            readline.write_history_file(path)
            path.chmod(0o600)  # the library may replace the file
        except OSError as error:
            _say(f"the history was not saved: {error}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
