"""llama.cpp at arm's length: its converter, quantizer and engine, each run as a process of its own.

Here belong the small programs (`python -m jobs.llm.llama_cpp.quantize`, `.evaluate`), the few calls into the engine that they need
(`model.py`), and the way to start them (`apart.py`). Native code may crash: it must not take the attempt down with it, so
nothing here loads llama.cpp into the process that trains. What the numbers mean is decided in `jobs/llm/exporters/`.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

LLAMA_CPP_FOLDER = Path(sys.prefix) / "share" / "llama.cpp"  # where infra/llama_cpp.sh puts what no wheel holds


def get_converter_path(source: Literal["hf", "lora"] = "hf") -> Path:
    """Where llama.cpp's own converter lies, of whole models or of adapters."""
    return LLAMA_CPP_FOLDER / f"convert_{source}_to_gguf.py"


def find_program(name: Literal["llama-imatrix", "llama-completion"], folder: Path = LLAMA_CPP_FOLDER) -> Path | None:
    """Where one of llama.cpp's own programs lies; None where it was not built."""
    path = folder / "bin" / name
    return path if path.is_file() else None


def is_llama_cpp_available() -> bool:
    """Whether GGUF files can be made and verified here; looks, and loads nothing."""
    return find_spec("llama_cpp") is not None and get_converter_path().is_file()
