"""`python -m jobs.llm.chat --gguf FILE [--prompt TEXT]`: chat with a GGUF model, using the chat template stored in the file.

Without --prompt every line of stdin is the next turn of one conversation. A file without a chat template holds a model that continues
texts: then every line is a text of its own. With --json the lines are JSON: {"prompt": …} in;
{"token": …} for each piece of text, then {"done": true, "tokens": n, "seconds": s} out, or {"error": …} for a turn that
cannot be answered. Answers go to stdout, everything else to stderr; exit code 2 means an invalid file or prompt.
"""

import argparse
import codecs
import json
import os
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.llm.llama_cpp.log import log_errors_only
from jobs.llm.llama_cpp.model import token_to_bytes
from jobs.llm.llama_cpp.vocabulary import ChatPrompt, GgufVocabulary, TemplateRejected
from jobs.runtime.settings import cpu_thread_count

if TYPE_CHECKING:
    from llama_cpp import Llama

CONTEXT_TOKENS = 4096  # of a conversation; Gemma's 32k would take half a gigabyte

# A terminal obeys these instead of printing them: a model must not move the cursor or rename the window.
CONTROL_CHARACTERS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])


class InvalidPrompt(Exception):
    """This turn cannot be answered; the message says why."""


class InvalidModelFile(Exception):
    """The file cannot be used for chat; the message says why."""


@dataclass(frozen=True)
class Options:
    """The command line's options."""

    gguf: Path
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
        with open_model(options.gguf, cpu_thread_count()) as model:
            if not model.has_template:
                print("the file has no chat template: its model continues each text that you write", file=sys.stderr)
            _run_conversation(Conversation(model, options.max_tokens, options.temperature), options)
    except (InvalidModelFile, InvalidPrompt) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader closed the pipe; without this Python fails again when it flushes stdout at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


# --- the conversation ---


@dataclass
class Conversation:
    """The messages so far, and the model that answers the next one."""

    model: "ChatModel"
    max_tokens: int
    temperature: float  # 0 takes the most likely token, always the same
    messages: list[dict[str, str]] = field(default_factory=list)

    def answer(self, prompt: str) -> Iterator[str]:
        """The text of each token as it is generated; empty while a character is incomplete. Raises InvalidPrompt before the first."""
        earlier = self.messages if self.model.has_template else []
        messages = [*earlier, {"role": "user", "content": prompt}]
        tokens = self._fit_to_context(messages)
        answer = ""
        for text in self.model.generate(tokens, min(self.max_tokens, self.model.context_tokens - len(tokens)), self.temperature):
            answer += text
            yield text
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def _fit_to_context(self, messages: list[dict[str, str]]) -> list[int]:
        """The messages as tokens; removes the oldest turns when there is no space for an answer."""
        tokens = self.model.tokenize(messages)
        while len(tokens) + self.max_tokens > self.model.context_tokens and len(messages) > 1:
            del messages[:2]
            tokens = self.model.tokenize(messages)
        if len(tokens) >= self.model.context_tokens:
            raise InvalidPrompt(f"the prompt has {len(tokens)} tokens; it must have fewer than {self.model.context_tokens}")
        return tokens


def _run_conversation(conversation: Conversation, options: Options) -> None:
    print_answer = _print_json_stream if options.as_json else _print_stream
    if options.prompt is not None:
        print_answer(conversation.answer(options.prompt))
        return
    for line in _read_turns():
        try:
            print_answer(conversation.answer(_parse_prompt(line) if options.as_json else line))
        except InvalidPrompt as error:
            print(json.dumps({"error": str(error)}) if options.as_json else f"error: {error}", flush=True)


def _read_turns() -> Iterator[str]:
    """The nonempty lines of stdin; a terminal shows a prompt and supports line editing."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    import readline  # noqa: F401  # input() uses it for line editing

    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line:
            yield line


def _parse_prompt(line: str) -> str:
    try:
        turn: object = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidPrompt(f"not JSON: {error}") from error
    if not isinstance(turn, dict) or not isinstance(turn.get("prompt"), str):
        raise InvalidPrompt('a turn is like {"prompt": "What is a list?"}')
    return turn["prompt"]


def _print_stream(answer: Iterable[str]) -> None:
    for text in answer:
        sys.stdout.write(text.translate(CONTROL_CHARACTERS))
        sys.stdout.flush()
    print(flush=True)


def _print_json_stream(answer: Iterable[str]) -> None:
    started, tokens = time.monotonic(), 0
    for text in answer:
        tokens += 1
        if text:
            print(json.dumps({"token": text}), flush=True)
    print(json.dumps({"done": True, "tokens": tokens, "seconds": round(time.monotonic() - started, 3)}), flush=True)


# --- the model ---


class ChatModel:
    """A GGUF file with its chat template, if it has one, loaded by llama.cpp into this process."""

    def __init__(self, llama: "Llama", vocabulary: GgufVocabulary) -> None:
        self._llama = llama
        self._vocabulary = vocabulary
        self.context_tokens: int = llama.n_ctx()

    @property
    def has_template(self) -> bool:
        """Whether the model was tuned for conversations; else it continues texts."""
        return self._vocabulary.has_template

    def tokenize(self, messages: list[dict[str, str]]) -> list[int]:
        """The conversation, rendered by the chat template, as tokens up to the start of the answer; without one, the last message."""
        prompt = ChatPrompt(messages=messages) if self.has_template else ChatPrompt(text=messages[-1]["content"])
        try:
            return self._vocabulary.encode_prompt(prompt)
        except TemplateRejected as error:
            raise InvalidPrompt(str(error)) from error

    def generate(self, tokens: list[int], max_tokens: int, temperature: float) -> Iterator[str]:
        """The text of each generated token, up to an end token."""
        import llama_cpp

        vocabulary = llama_cpp.llama_model_get_vocab(self._llama.model)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may span several tokens
        with closing(self._llama.generate(tokens, temp=temperature)) as generated:
            for token, _ in zip(generated, range(max_tokens), strict=False):
                if self._vocabulary.is_end_token(token):
                    return
                yield decoder.decode(token_to_bytes(vocabulary, token))


@contextmanager
def open_model(path: Path, threads: int) -> Generator[ChatModel]:
    """Load a file. Raises InvalidModelFile for one that is missing or damaged, or whose chat template is invalid."""
    _require_gguf(path)
    import llama_cpp

    errors = log_errors_only()
    try:
        llama = llama_cpp.Llama(str(path), n_ctx=CONTEXT_TOKENS, n_threads=threads, n_threads_batch=threads, verbose=False)
    except (ValueError, RuntimeError) as error:
        raise InvalidModelFile(f"llama.cpp cannot load {path}: {errors[0] if errors else error}") from error
    with closing(llama):
        try:
            vocabulary = GgufVocabulary(
                llama_cpp, llama_cpp.llama_model_get_vocab(llama.model), llama.metadata.get("tokenizer.chat_template")
            )
        except TemplateRejected as error:
            raise InvalidModelFile(f"{path}: {error}") from error
        yield ChatModel(llama, vocabulary)


def _require_gguf(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise InvalidModelFile(f"cannot read {path}: {error.strerror}") from error
    if magic != b"GGUF":
        raise InvalidModelFile(f"{path} is not a GGUF file")


# --- the command line ---


def _parse_args(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="python -m jobs.llm.chat", description="Chat with a GGUF model.")
    parser.add_argument("--gguf", type=Path, required=True, help="the model file")
    parser.add_argument("--prompt", help="one prompt; without it, every line of stdin is the next turn of a conversation")
    parser.add_argument("--max-tokens", type=_positive, default=256, help="maximum length of an answer (%(default)s)")
    parser.add_argument("--temperature", type=_temperature, default=0.7, help="0 is deterministic (%(default)s)")
    parser.add_argument("--json", action="store_true", dest="as_json", help="read and write JSON lines")
    return Options(**vars(parser.parse_args(arguments)))


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


if __name__ == "__main__":
    sys.exit(main())
