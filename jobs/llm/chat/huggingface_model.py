"""Models in Hugging Face folders, run by transformers: a base, a merged model, or an adapter with its base.

Torch, transformers and peft are imported inside the functions that use them.
"""

import json
import logging
import warnings
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from jobs.llm.adapter_sum import CONFIG_FILE, WEIGHTS_FILE, AdapterMismatch, check_readable, copy_adapter_config
from jobs.llm.base_files import copy_base_files
from jobs.llm.chat.model import CONTEXT_TOKENS, MIN_P, TOP_K, TOP_P, InvalidModel, InvalidPrompt, Message
from jobs.llm.chat_format import read_template
from jobs.llm.chat_rendering import render
from jobs.llm.exporters.model_files import TOKENIZER_FILES, copy_files, link_or_copy, measure_weights_bytes, read_precision, to_torch_dtype
from jobs.llm.model_kinds import AUTO_CLASSES, ModelKind
from jobs.runtime.errors import JobFailed

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer writes for a character of which tokens are missing
MAX_MEMORY_SHARE = 0.5  # of the available memory, for weights in a wider precision than their file has
PROBE = "MarkText"  # a question whose text a template must render


@dataclass(frozen=True)
class HuggingFaceChatModel:
    """A model of transformers or peft with its tokenizer."""

    runs_as: str
    model: Any  # any model of transformers or peft
    tokenizer: "PreTrainedTokenizerBase"
    template: str | None
    adapter_is_used: bool = True  # False: a model with an adapter answers without it, as its base
    stop_ids: frozenset[int] = field(init=False)  # tokens that end an answer

    def __post_init__(self) -> None:
        """Find the tokens that end an answer."""
        listed = self.model.generation_config.eos_token_id
        known = {*(listed if isinstance(listed, list) else [listed]), self.tokenizer.eos_token_id}
        ids = {token for token in known if isinstance(token, int)} | self._find_turn_ends()
        object.__setattr__(self, "stop_ids", frozenset(ids))

    @property
    def context_tokens(self) -> int:
        """The longest conversation with its answer, in tokens."""
        trained = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)  # not every architecture has positions
        return min(CONTEXT_TOKENS, trained or CONTEXT_TOKENS)

    def tokenize(self, messages: Sequence[Message]) -> list[int]:
        """The conversation as tokens up to the start of the answer; without a template, the last message. Raises InvalidPrompt."""
        if self.template is None:
            return list(self.tokenizer(messages[-1]["content"])["input_ids"])
        try:
            text = self._render(messages, add_generation_prompt=True)
        except JobFailed as error:
            raise InvalidPrompt(error.failure.message) from error
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def generate(self, tokens: list[int], max_tokens: int, temperature: float) -> Generator[str]:
        """The text of each generated token, up to the end of the answer."""
        generated: list[int] = []
        shown = ""
        with closing(_generate_tokens(self, tokens, self._make_config(max_tokens, temperature))) as stream:
            for token in stream:
                if token in self.stop_ids:
                    return
                generated.append(token)
                text = str(self.tokenizer.decode(generated, skip_special_tokens=True, clean_up_tokenization_spaces=False))
                if text.endswith(INCOMPLETE):
                    yield ""
                    continue
                yield text[len(shown) :]
                shown = text

    def _make_config(self, max_tokens: int, temperature: float) -> "GenerationConfig":
        """Every field that would otherwise come from the model's own config."""
        from transformers import GenerationConfig

        sampling: dict[str, Any] = {"temperature": temperature, "top_k": TOP_K, "top_p": TOP_P, "min_p": MIN_P}
        greedy: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}  # the library's own; others would cause warnings
        return GenerationConfig(
            max_new_tokens=max_tokens,
            do_sample=temperature > 0,
            **(sampling if temperature > 0 else greedy),
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=sorted(self.stop_ids) or None,
            pad_token_id=self.tokenizer.pad_token_id or 0,
            use_cache=True,
        )

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation as text. Raises JobFailed for one that the template rejects."""
        assert self.template is not None
        special_tokens = self.tokenizer.special_tokens_map
        options: dict[str, Any] = {"owner": "the chat template", "add_generation_prompt": add_generation_prompt}
        question = [{"role": "user", "content": PROBE}]
        try:
            reads_parts = PROBE not in render(self.template, question, None, special_tokens, owner="the chat template")[0]
        except JobFailed:  # some templates fail on a text where they expect parts
            reads_parts = True
        return render(self.template, messages, None, special_tokens, content_parts=reads_parts, **options)[0]

    def _find_turn_ends(self) -> set[int]:
        """The first control token after an answer in a rendered conversation: a base's own settings know only the end of a text."""
        if self.template is None:
            return set()
        answer = "Good day"
        try:
            text = self._render([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": answer}])
        except JobFailed:  # a template that requires a system message, for example
            return set()
        control_ids = {number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        after = self.tokenizer(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
        return {next((token for token in after if token in control_ids), -1)} - {-1}


def _generate_tokens(model: HuggingFaceChatModel, tokens: list[int], config: "GenerationConfig") -> Generator[int]:
    """Each token as a thread generates it. Closing the iterator ends the thread after its current token."""
    import torch
    from transformers.generation.streamers import BaseStreamer

    stop = Event()
    queue: SimpleQueue[int | BaseException | None] = SimpleQueue()  # None: the end

    class TokenStreamer(BaseStreamer):
        """Passes tokens on; the library sends the prompt first."""

        is_prompt = True

        def put(self, value: torch.Tensor) -> None:
            if not self.is_prompt:
                queue.put(int(value.item()))
            self.is_prompt = False

        def end(self) -> None:
            """The thread says so itself, also after an error."""

    def should_stop(ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return torch.full((len(ids),), stop.is_set(), device=ids.device)

    def generate() -> None:
        try:
            ids = torch.tensor([tokens], device=model.model.device)
            options = {"generation_config": config, "streamer": TokenStreamer(), "stopping_criteria": [should_stop]}
            with _use_adapter(model):
                model.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            queue.put(None)
        except BaseException as error:  # noqa: BLE001  # raised again where the tokens are read
            queue.put(error)

    thread = Thread(target=generate, name="generate", daemon=True)
    thread.start()
    try:
        while (item := queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


@contextmanager
def _use_adapter(model: HuggingFaceChatModel) -> Generator[None]:
    if model.adapter_is_used:
        yield
    else:
        with model.model.disable_adapter():
            yield


# --- loading -------------------------------------------------------------------------------------------------------------


@contextmanager
def open_folder(folder: Path, template: str | None = None) -> Generator[HuggingFaceChatModel]:
    """Load a base or a merged model; `template` is for one without a chat template of its own. Raises InvalidModel."""
    with TemporaryDirectory(prefix="tunesmith-chat-") as scratch:
        model, tokenizer = _load(folder, Path(scratch))
        yield HuggingFaceChatModel("Hugging Face folder, transformers", model, tokenizer, _read_template(tokenizer, folder) or template)


@contextmanager
def open_adapter(adapter: Path, base: Path) -> Generator[tuple[HuggingFaceChatModel, HuggingFaceChatModel]]:
    """Load a base once, and its adapter; yields the two as models, the base first. Raises InvalidModel."""
    _silence_libraries()
    from peft import PeftModel

    with TemporaryDirectory(prefix="tunesmith-chat-") as scratch:
        model, base_tokenizer = _load(base, Path(scratch))
        own = Path(scratch) / "adapter"
        copy_files(adapter, own, TOKENIZER_FILES)
        try:
            link_or_copy(adapter / WEIGHTS_FILE, own / WEIGHTS_FILE)
            link_or_copy(adapter / CONFIG_FILE, own / CONFIG_FILE)
            copy_adapter_config(own / CONFIG_FILE)
            check_readable(own)
            adapted = PeftModel.from_pretrained(model, own, torch_device=str(model.device))
        except (AdapterMismatch, OSError, ValueError, RuntimeError, KeyError) as error:  # the last three: peft's, of another base
            reason = str(error).partition("\n")[0][:200]
            raise InvalidModel(f"the adapter {adapter} cannot be applied to the base {base}: {reason}") from error
        adapted.eval()
        tokenizer = _load_tokenizer(own)
        template = _read_template(tokenizer, adapter)
        base_template = _read_template(base_tokenizer, base) or template
        runs_as = "adapter with its base, transformers"
        yield (
            HuggingFaceChatModel("Hugging Face folder, transformers", adapted, base_tokenizer, base_template, adapter_is_used=False),
            HuggingFaceChatModel(runs_as, adapted, tokenizer, template),
        )


def _load(folder: Path, scratch: Path) -> tuple[Any, "PreTrainedTokenizerBase"]:
    """The model in a folder, with what names code left out of its configs, and its tokenizer. Raises InvalidModel."""
    import transformers

    _silence_libraries()
    kind = _find_kind(folder)
    try:
        checked = copy_base_files(folder, scratch / "model", str(folder))
        options: dict[str, Any] = {"trust_remote_code": False, "use_safetensors": True, "local_files_only": True}
        model = getattr(transformers, AUTO_CLASSES[kind]).from_pretrained(checked, dtype=_choose_dtype(checked), **options)
    except JobFailed as error:
        raise InvalidModel(error.failure.message) from error
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise InvalidModel(f"transformers cannot load {folder}: {reason}") from error
    model.to(_choose_device())
    model.eval()
    return model, _load_tokenizer(checked)


def _silence_libraries() -> None:
    """Leave the terminal to the conversation: these libraries report progress, advice and deprecations on stderr."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # which peft imports
    warnings.filterwarnings("ignore", module="(transformers|peft|torch|bitsandbytes)")


def _find_kind(folder: Path) -> ModelKind:
    """What the model computes. Raises InvalidModel for one that writes no text."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        architectures, has_vision = [str(name) for name in config.get("architectures") or []], "vision_config" in config
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InvalidModel(f"{folder} has no config.json that can be read") from error
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        raise InvalidModel(f"{folder} is a reward model: it rates answers and writes none; use it as a grader of trainer_type grpo")
    return "image_text" if has_vision else "causal"


def _choose_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _choose_dtype(folder: Path) -> Any:  # torch.dtype
    """On a GPU the precision of the weights. On a CPU float32, which generates four times as fast as bf16, where memory allows it."""
    import psutil
    import torch

    precision = read_precision(folder)
    if _choose_device() == "cuda" and precision == "bf16" and not torch.cuda.is_bf16_supported():
        return torch.float16
    width_bytes = 4 if precision == "f32" else 2
    float32_bytes = measure_weights_bytes(folder) * 4 // width_bytes
    if _choose_device() == "cpu" and float32_bytes < MAX_MEMORY_SHARE * psutil.virtual_memory().available:
        return torch.float32
    return to_torch_dtype(precision)


def _load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise InvalidModel(f"the tokenizer in {folder} cannot be loaded: {reason}") from error


def _read_template(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> str | None:
    try:
        return read_template(tokenizer, None)
    except JobFailed as error:
        raise InvalidModel(f"{folder} has several chat templates and no default") from error
