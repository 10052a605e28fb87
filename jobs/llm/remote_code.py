"""No code of a model repository ever runs: what names such code is removed from configs, and the libraries' way to load it is closed.

A repository's config may name Python classes (`auto_map`), which transformers downloads and imports when it is told to trust them. The
trainer never does. llama.cpp's converter does in a dozen modules, so the converter runs with both functions below.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

# Keys by which a config names code or kernels to download, at any depth. Everything else is a number, a name or a choice.
CODE_KEYS = frozenset(
    {
        "auto_map",
        "custom_pipelines",
        "custom_generate",
        "trust_remote_code",
        "attn_implementation",  # "owner/repository" names a kernel on the Hub
        "_attn_implementation",
        "_attn_implementation_internal",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
    }
)
AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor", "AutoTokenizer")  # what llama.cpp's converters use


def remove_code_keys(part: Any) -> Any:
    """The JSON value of a config without the keys that name code."""
    if isinstance(part, dict):
        return {name: remove_code_keys(value) for name, value in part.items() if name not in CODE_KEYS}
    if isinstance(part, list):
        return [remove_code_keys(item) for item in part]
    return part


def names_code(part: Any) -> bool:
    """Whether a config names Python code of a repository."""
    if isinstance(part, dict):
        return "auto_map" in part or any(names_code(value) for value in part.values())
    return isinstance(part, list) and any(names_code(item) for item in part)


@cache
def distrust_model_repositories() -> None:
    """Overrule callers in this process that ask transformers to trust a repository's code: the library's own classes are used."""
    import transformers

    for name in AUTO_CLASSES:
        auto_class = getattr(transformers, name)
        auto_class.from_pretrained = staticmethod(_distrust(auto_class.from_pretrained))


def forbid_remote_code() -> None:
    """Make transformers refuse code of model repositories in this process: every such class passes through these two functions, the
    download and the import."""
    from transformers import dynamic_module_utils

    dynamic_module_utils.get_cached_module_file = _refuse  # pyright: ignore[reportAttributeAccessIssue]  # another signature
    dynamic_module_utils.get_class_in_module = _refuse  # pyright: ignore[reportAttributeAccessIssue]


def _distrust(from_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    def from_pretrained_without_code(*args: Any, **kwargs: Any) -> Any:
        return from_pretrained(*args, **kwargs | {"trust_remote_code": False})

    return from_pretrained_without_code


def _refuse(*_: Any, **__: Any) -> Any:
    raise ValueError("the model needs code of its own repository, which is never run")
