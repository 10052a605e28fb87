"""The options of `python -m jobs.llm.chat`, and what is done with them.

Without --prompt, a terminal gets an interactive chat, and of anything else every line of stdin is the next turn of one conversation. A
model without a chat template continues texts: then every line is a text of its own. With --json the lines are JSON: {"prompt": …} in;
{"token": …} for each piece of text, then {"done": true, "tokens": n, "seconds": s} out, or {"error": …} for a turn that cannot be
answered; with --compare each has also "model", "base" or "tuned". Answers go to stdout, everything else to stderr; exit code 2 means an
unusable model or prompt.
"""

import argparse
import os
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jobs.llm.chat.bases import find_path
from jobs.llm.chat.conversation import Conversation
from jobs.llm.chat.model import ChatModel, InvalidModel, InvalidPrompt
from jobs.llm.chat.opening import open_both, open_model
from jobs.llm.chat.output import Speaker, answer_line, answer_lines, answer_once
from jobs.llm.chat.terminal import TerminalChat
from jobs.runtime.settings import cpu_thread_count

INTERRUPTED = 130


@dataclass(frozen=True)
class Options:
    """The command line's options."""

    model: str
    base: str | None
    compare: bool
    template_of: Path | None
    downloads: Path | None
    title: str | None
    history: Path | None
    system: str | None
    prompt: str | None
    max_tokens: int
    temperature: float
    as_json: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the conversation; returns the exit code."""
    options = _parse_args(arguments)
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]  # the interpreter's own are text wrappers
    try:
        with _open_models(options) as models:
            speakers = [
                Speaker(label, Conversation(model, options.max_tokens, options.temperature, options.system))
                for label, model in models.items()
            ]
            for speaker in speakers:
                speaker.conversation.check_system()
            return _converse(speakers, options)
    except (InvalidModel, InvalidPrompt) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader closed the pipe; without this Python fails again when it flushes stdout at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _converse(speakers: list[Speaker], options: Options) -> int:
    if options.prompt is None and not options.as_json and sys.stdin.isatty():
        return TerminalChat(speakers, options.title or options.model, options.history).run()
    for speaker in speakers:
        if speaker.conversation.model.template is None:
            owner = f"{speaker.label} has" if speaker.label else "the model has"
            print(f"{owner} no chat template: it continues each text that you write", file=sys.stderr)
    if options.prompt is not None:
        answer_once(speakers, options.prompt, as_json=options.as_json)
        return 0
    lines = (line.strip() for line in sys.stdin)
    if options.as_json:
        answer_lines(speakers, filter(None, lines))
        return 0
    for line in filter(None, lines):
        answer_line(speakers, line)
    return 0


@contextmanager
def _open_models(options: Options) -> Generator[dict[str, ChatModel]]:
    """The models that answer, by the label of their answers; one alone has no label. Raises InvalidModel."""
    if sys.stdin.isatty() and options.prompt is None:
        print("loading the model …", file=sys.stderr, flush=True)
    threads, path = cpu_thread_count(), find_path(options.model, options.downloads)
    base = None if options.base is None else find_path(options.base, options.downloads)
    if options.compare:
        if base is None:
            raise InvalidModel("--compare needs the base that the model was trained from: name its folder with --base")
        with open_both(path, base=base, threads=threads) as (base_model, tuned):
            yield {"base": base_model, "tuned": tuned}
    else:
        with open_model(path, base=base, template_of=options.template_of, threads=threads) as model:
            yield {"": model}


def _parse_args(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="python -m jobs.llm.chat", description="Chat with a model on this machine.")
    parser.add_argument(
        "--model", required=True, help="a GGUF file, or the folder of a model or an adapter; or the URL of a model's folder in a store"
    )
    parser.add_argument("--base", help="the base of an adapter, or of --compare: a folder, or its URL in a store")
    parser.add_argument("--compare", action="store_true", help="the base answers each question as well")
    parser.add_argument("--template-of", type=Path, help="the model whose chat template asks --model if that has none")
    parser.add_argument("--downloads", type=Path, help="the folder for copies of models in a remote store")
    parser.add_argument("--title", help="what the banner calls the model")
    parser.add_argument("--history", type=Path, help="the file with the questions of earlier chats")
    parser.add_argument("--system", type=_text, help="how the model should answer; some chat templates have no place for it")
    parser.add_argument("--prompt", type=_text, help="one prompt; without it, every line of stdin is the next turn of a conversation")
    parser.add_argument("--max-tokens", type=_positive, default=256, help="maximum length of an answer (%(default)s)")
    parser.add_argument("--temperature", type=_temperature, default=0.7, help="0 is deterministic (%(default)s)")
    parser.add_argument("--json", action="store_true", dest="as_json", help="read and write JSON lines")
    return Options(**vars(parser.parse_args(arguments)))


def _text(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; write a text")
    return text


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def _temperature(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 2:  # false for NaN, too
        raise argparse.ArgumentTypeError(f"must be from 0 to 2, not {number}")
    return number
