"""Models in GGUF files, run by llama.cpp with the chat template that the file holds."""

import codecs
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.llm.chat.model import CONTEXT_TOKENS, MIN_P, TOP_K, TOP_P, InvalidModel, InvalidPrompt, Message
from jobs.llm.llama_cpp.log import log_errors_only
from jobs.llm.llama_cpp.model import token_to_bytes
from jobs.llm.llama_cpp.vocabulary import ChatPrompt, GgufVocabulary, TemplateRejected

if TYPE_CHECKING:
    from llama_cpp import Llama

MAGIC = b"GGUF"


class GgufChatModel:
    """A GGUF file with a chat template, its own or a given one, loaded by llama.cpp into this process."""

    runs_as = "GGUF, llama.cpp"

    def __init__(self, llama: "Llama", vocabulary: GgufVocabulary, template: str | None) -> None:
        self._llama = llama
        self._vocabulary = vocabulary
        self.context_tokens: int = llama.n_ctx()
        self.template = template

    def tokenize(self, messages: Sequence[Message]) -> list[int]:
        """The conversation as tokens up to the start of the answer; without a template, the last message. Raises InvalidPrompt."""
        prompt = ChatPrompt(messages=[dict(m) for m in messages]) if self.template else ChatPrompt(text=messages[-1]["content"])
        try:
            return self._vocabulary.encode_prompt(prompt)
        except TemplateRejected as error:
            raise InvalidPrompt(str(error)) from error

    def generate(self, tokens: list[int], max_tokens: int, temperature: float) -> Generator[str]:
        """The text of each generated token, up to an end token."""
        import llama_cpp

        vocabulary = llama_cpp.llama_model_get_vocab(self._llama.model)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may span several tokens
        options = {"temp": temperature, "top_k": TOP_K, "top_p": TOP_P, "min_p": MIN_P}
        with closing(self._llama.generate(tokens, **options)) as generated:  # pyright: ignore[reportArgumentType]  # its integer is one
            for token, _ in zip(generated, range(max_tokens), strict=False):
                if self._vocabulary.is_end_token(token):
                    return
                yield decoder.decode(token_to_bytes(vocabulary, token))


@contextmanager
def open_gguf(path: Path, threads: int, template: str | None = None) -> Generator[GgufChatModel]:
    """Load a file; `template` is for one without a chat template of its own.

    Raises InvalidModel for one that is damaged or cannot talk, or whose chat template is invalid.
    """
    import llama_cpp

    require_gguf(path)
    errors = log_errors_only()
    try:
        llama = llama_cpp.Llama(str(path), n_ctx=CONTEXT_TOKENS, n_threads=threads, n_threads_batch=threads, verbose=False)
    except (ValueError, RuntimeError) as error:
        problem = errors[0] if errors else str(error)
        raise InvalidModel(_explain_part(path, problem) or f"llama.cpp cannot load {path}: {problem}") from error
    with closing(llama):
        used = llama.metadata.get("tokenizer.chat_template") or template
        try:
            vocabulary = GgufVocabulary(llama_cpp, llama_cpp.llama_model_get_vocab(llama.model), used)
        except TemplateRejected as error:
            raise InvalidModel(f"{path}: {error}") from error
        yield GgufChatModel(llama, vocabulary, used)


def read_gguf_template(path: Path) -> str | None:
    """The chat template that a file holds. Raises InvalidModel."""
    import llama_cpp

    require_gguf(path)
    log_errors_only()
    try:
        with closing(llama_cpp.Llama(str(path), vocab_only=True, verbose=False)) as llama:
            return llama.metadata.get("tokenizer.chat_template")
    except (ValueError, RuntimeError) as error:
        raise InvalidModel(f"llama.cpp cannot load {path}: {error}") from error


def require_gguf(path: Path) -> None:
    """Raise InvalidModel for what is no GGUF file."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(MAGIC))
    except OSError as error:
        raise InvalidModel(f"cannot read {path}: {error.strerror}") from error
    if magic != MAGIC:
        raise InvalidModel(f"{path} is not a GGUF file")


def _explain_part(path: Path, problem: str) -> str | None:
    """Why a file that llama.cpp refuses as a model is only a part of one; None if it is not."""
    if "CLIP" in problem:
        return f"{path.name} is the vision part of a model: it reads images and writes nothing; chat with the model's other GGUF file"
    if "key not found" not in problem:
        return None
    from gguf import GGUFReader  # slow with a vocabulary, which an adapter does not have

    kind = GGUFReader(path).get_field("general.type")
    if kind is None or kind.contents() != "adapter":
        return None
    command = f"llama-cli -m BASE.gguf --lora {path.name}"
    return f"{path.name} is an adapter for the GGUF file of its base ({command}); chat with the artifact adapter or merged, or a GGUF model"
