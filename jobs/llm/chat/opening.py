"""What is at a location, and whether it can talk: GGUF file, merged model, adapter with its base, base alone."""

import json
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from jobs.llm.adapter_sum import CONFIG_FILE as ADAPTER_CONFIG_FILE
from jobs.llm.chat.gguf_model import open_gguf, read_gguf_template
from jobs.llm.chat.model import ChatModel, InvalidModel
from jobs.llm.exporters.model_files import TOKENIZER_CONFIG_FILE

MODEL_CONFIG_FILE = "config.json"
TEMPLATE_FILE = "chat_template.jinja"


@contextmanager
def open_model(path: Path, *, base: Path | None, template_of: Path | None, threads: int) -> Generator[ChatModel]:
    """Load the model at a path; an adapter with its `base`. Raises InvalidModel.

    A model without a chat template is asked with that of `template_of`, a model that was trained from it.
    """
    if is_adapter(path):
        from jobs.llm.chat.huggingface_model import open_adapter

        with open_adapter(path, require_base(path, base)) as (_, tuned):
            yield tuned
        return
    template = None if template_of is None else read_template_of(template_of)
    with _open_whole(path, template, threads) as model:
        yield model


@contextmanager
def open_both(path: Path, *, base: Path, threads: int) -> Generator[tuple[ChatModel, ChatModel]]:
    """Load a base and the model that was trained from it, the base first. Raises InvalidModel."""
    if is_adapter(path):
        from jobs.llm.chat.huggingface_model import open_adapter

        with open_adapter(path, base) as both:
            yield both
        return
    with ExitStack() as opened:
        tuned = opened.enter_context(_open_whole(path, None, threads))
        yield opened.enter_context(_open_whole(base, tuned.template, threads)), tuned


def is_adapter(path: Path) -> bool:
    """Whether a path is the folder of an adapter, which needs its base."""
    return (path / ADAPTER_CONFIG_FILE).is_file()


def require_base(adapter: Path, base: Path | None) -> Path:
    """The base of an adapter. Raises InvalidModel without one."""
    if base is None:
        raise InvalidModel(f"{adapter} is an adapter, which needs its base: name the base's folder with --base")
    return base


def read_template_of(path: Path) -> str | None:
    """The chat template of a model. Raises InvalidModel."""
    if path.is_file():
        return read_gguf_template(path)
    if (path / TEMPLATE_FILE).is_file():
        return (path / TEMPLATE_FILE).read_text(encoding="utf-8")
    try:
        template = json.loads((path / TOKENIZER_CONFIG_FILE).read_bytes()).get("chat_template")
    except (OSError, ValueError, AttributeError) as error:
        raise InvalidModel(f"{path} has no {TOKENIZER_CONFIG_FILE} that can be read") from error
    return template if isinstance(template, str) else None


@contextmanager
def _open_whole(path: Path, template: str | None, threads: int) -> Generator[ChatModel]:
    """Load anything but an adapter."""
    if path.is_dir() and (path / MODEL_CONFIG_FILE).is_file() and not _list_names(path, ".onnx"):
        from jobs.llm.chat.huggingface_model import open_folder

        with open_folder(path, template) as model:
            yield model
    else:
        with open_gguf(_find_gguf(path), threads, template) as model:
            yield model


def _find_gguf(path: Path) -> Path:
    """The GGUF file that a path is, or that its folder holds. Raises InvalidModel for another folder."""
    if not path.is_dir():
        return path
    if _list_names(path, ".onnx"):
        raise InvalidModel(
            f"{path} is an ONNX graph without a key-value cache, made for scoring and short answers; "
            "chat with the artifact merged, adapter or a GGUF model"
        )
    names = _list_names(path, ".gguf")
    if len(names) == 1:
        return path / names[0]
    if names:
        raise InvalidModel(f"{path} has several GGUF files: name one of {', '.join(names)}")
    raise InvalidModel(f"{path} holds no model: neither a .gguf file, nor config.json with safetensors, nor an adapter")


def _list_names(folder: Path, suffix: str) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(suffix))
