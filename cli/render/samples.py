"""Renders answers to held-out prompts: each prompt once, the base's answer beside the trained model's."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from textwrap import indent

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cli.http_client import Json

MAX_LINES, MAX_CHARS = 12, 800  # of a prompt or an answer; the job's events have more
MIN_SIDE_BY_SIDE_WIDTH = 80
INDENT = 4


@dataclass(frozen=True)
class SampleBook:
    """The samples of a job as they come: of each prompt the base's answer and the newest answers."""

    prompts: tuple[str, ...] = ()
    base: tuple[Json, ...] = ()  # samples of the model before training
    tuned: tuple[Json, ...] = ()  # the newest samples of the model that is being trained

    def add(self, body: Json) -> "SampleBook":
        """The book with the samples of an event."""
        samples = tuple(body["samples"])
        prompts = tuple(dict.fromkeys([*self.prompts, *(sample["prompt"] for sample in samples)]))
        book = replace(self, prompts=prompts)
        return replace(book, base=samples) if body["when"] == "before" else replace(book, tuned=samples)


def render_samples(book: SampleBook, body: Json, console: Console) -> Iterator[RenderableType]:
    """The samples of an event that `book` does not have yet. A prompt that it has is not repeated."""
    source = "base" if body["when"] == "before" else f"step {body['step']}"
    known = book.add(body).prompts
    for sample in body["samples"]:
        number = known.index(sample["prompt"]) + 1
        if sample["prompt"] not in book.prompts:
            yield Text(f"sample {number}", "bold")
            yield _indent(sample["prompt"], console)
        yield Text(f"sample {number}, {source}", "dim")
        yield _indent(sample["text"], console)


def render_comparison(book: SampleBook, console: Console) -> Iterator[RenderableType]:
    """The trained model's answers, and the base's to the same prompts: side by side on a terminal that is wide enough."""
    base = {sample["prompt"]: sample["text"] for sample in book.base}
    for sample in book.tuned:
        prompt = sample["prompt"]
        yield Text(f"sample {book.prompts.index(prompt) + 1}", "bold")
        yield _indent(prompt, console)
        answers = {"base": base[prompt], "tuned": sample["text"]} if prompt in base else {"tuned": sample["text"]}
        if console.is_terminal and console.width >= MIN_SIDE_BY_SIDE_WIDTH and len(answers) == 2:
            table = Table(box=None, padding=(0, 2, 0, 2), expand=True, header_style="dim")
            table.add_column("base", ratio=1)
            table.add_column("→ tuned", ratio=1)
            table.add_row(*(Padding(_shorten(text), (0, 0, 0, 2)) for text in answers.values()))
            yield table
            continue
        for name, text in answers.items():
            yield Text(f"  {name}", "dim")
            yield _indent(text, console)


def _indent(text: str, console: Console) -> RenderableType:
    """A text with its own line breaks and indentation, moved to the right."""
    if console.is_terminal:
        return Padding(_shorten(text), (0, 0, 0, INDENT), expand=False)
    return Text(indent(_shorten(text).plain, " " * INDENT))


def _shorten(text: str) -> Text:
    """A text without the end of a long one."""
    lines = text[:MAX_CHARS].strip("\n").splitlines() or ["(nothing)"]
    is_cut = len(lines) > MAX_LINES or len(text) > MAX_CHARS
    return Text("\n".join(lines[:MAX_LINES]) + (" …" if is_cut else ""))
