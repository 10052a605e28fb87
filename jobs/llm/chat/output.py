"""Answers as text, side by side in a wide terminal, or as JSON lines."""

import json
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from jobs.llm.chat.conversation import Conversation
from jobs.llm.chat.model import InvalidPrompt

MIN_COLUMNS_WIDTH = 100  # characters of a terminal, for two answers beside each other

# A terminal obeys these instead of printing them: a model must not move the cursor or rename the window.
CONTROL_CHARACTERS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])

IsInterrupted = Callable[[], bool]


@dataclass(frozen=True)
class Speaker:
    """A model that answers, and what its answers are labeled with."""

    label: str  # empty for one alone
    conversation: Conversation

    def answer(self, prompt: str) -> Generator[str]:
        """The pieces of the answer, without what a terminal would obey. Raises InvalidPrompt before the first."""
        with closing(self.conversation.answer(prompt)) as pieces:
            for piece in pieces:
                yield piece.translate(CONTROL_CHARACTERS)


def never_interrupted() -> bool:
    """For answers that nobody can interrupt one by one."""
    return False


def answer_once(speakers: Sequence[Speaker], prompt: str, *, as_json: bool) -> None:
    """Print every speaker's answer to one prompt. Raises InvalidPrompt."""
    for speaker in speakers:
        if as_json:
            _print_json_answer(speaker, prompt)
        else:
            _print_labeled(speaker, prompt, never_interrupted)


def answer_lines(speakers: Sequence[Speaker], lines: Iterable[str]) -> None:
    """Answer every line of JSON by lines of JSON. One that cannot be answered does not end the conversation."""
    for line in lines:
        try:
            prompt, begins_again = _parse_turn(line)
        except InvalidPrompt as error:
            _print_json({"error": str(error)})
            continue
        for speaker in speakers:
            if begins_again:
                speaker.conversation.forget()
            try:
                _print_json_answer(speaker, prompt)
            except InvalidPrompt as error:
                _print_json(_name(speaker) | {"error": str(error)})


def answer_line(speakers: Sequence[Speaker], line: str, is_interrupted: IsInterrupted = never_interrupted) -> None:
    """Print every speaker's answer: side by side where the terminal is wide enough, else one after the other."""
    if len(speakers) > 1 and sys.stdout.isatty() and _terminal_width() >= MIN_COLUMNS_WIDTH:
        _print_columns(speakers, line, is_interrupted)
        return
    for speaker in speakers:
        if is_interrupted():
            return
        try:
            _print_labeled(speaker, line, is_interrupted)
        except InvalidPrompt as error:
            print(f"error: {error}", file=sys.stderr, flush=True)


def print_stream(pieces: Iterable[str], is_interrupted: IsInterrupted = never_interrupted) -> None:
    """Print the pieces of an answer as they come, until its end or an interrupt."""
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
        if is_interrupted():
            break
    print(flush=True)


def _print_labeled(speaker: Speaker, prompt: str, is_interrupted: IsInterrupted) -> None:
    with closing(speaker.answer(prompt)) as answer:
        first = next(answer, "")  # raises InvalidPrompt before anything is printed
        if speaker.label:
            print(f"{speaker.label}: ", end="")
        print_stream(_chain(first, answer), is_interrupted)


def _print_columns(speakers: Sequence[Speaker], prompt: str, is_interrupted: IsInterrupted) -> None:
    """Show each answer in a column of its own, as it grows."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    texts = [""] * len(speakers)

    def render() -> Table:
        table = Table(expand=True, show_edge=False, padding=(0, 1))
        for speaker in speakers:
            table.add_column(speaker.label, ratio=1, overflow="fold")
        table.add_row(*map(Text, texts))
        return table

    console = Console(highlight=False)
    try:
        with Live(console=console, get_renderable=render, transient=True, refresh_per_second=12):
            for number, speaker in enumerate(speakers):
                try:
                    with closing(speaker.answer(prompt)) as answer:
                        for piece in answer:
                            texts[number] += piece
                            if is_interrupted():
                                return
                except InvalidPrompt as error:
                    texts[number] = f"error: {error}"
    finally:
        console.print(render())  # the live display shows no more than fits the screen


def _parse_turn(line: str) -> tuple[str, bool]:
    """The prompt, and whether a new conversation begins with it."""
    try:
        turn: object = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidPrompt(f"not JSON: {error}") from error
    if not isinstance(turn, dict) or not isinstance(turn.get("prompt"), str) or not turn["prompt"].strip():
        raise InvalidPrompt('a turn is like {"prompt": "What is a list?"}')
    begins_again = turn.get("reset", False)
    if not isinstance(begins_again, bool):
        raise InvalidPrompt("reset is true or false: whether a new conversation begins")
    return turn["prompt"], begins_again


def _print_json_answer(speaker: Speaker, prompt: str) -> None:
    started, tokens = time.monotonic(), 0
    with closing(speaker.conversation.answer(prompt)) as answer:
        for text in answer:
            tokens += 1
            if text:
                _print_json(_name(speaker) | {"token": text})
    _print_json(_name(speaker) | {"done": True, "tokens": tokens, "seconds": round(time.monotonic() - started, 3)})


def _name(speaker: Speaker) -> dict[str, object]:
    return {"model": speaker.label} if speaker.label else {}


def _print_json(line: dict[str, object]) -> None:
    print(json.dumps(line), flush=True)


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _terminal_width() -> int:
    return shutil.get_terminal_size().columns
