"""llama.cpp in child processes: its converter, quantizer, importance matrix and inference.

The programs (`python -m jobs.llm.llama_cpp.convert`, `.quantize`, `.evaluate`, `.vocabulary`), the calls into the library that they need
(`model.py`) and the functions that start them (`runner.py`) belong here. Native code may crash and must not end the attempt, so nothing
here loads llama.cpp into the training process. `jobs/llm/exporters/` decides what the measured numbers mean.
"""

import ast
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

LLAMA_CPP_FOLDER = Path(sys.prefix) / "share" / "llama.cpp"  # infra/llama_cpp.sh installs here what no wheel contains


def get_converter_path(source: Literal["hf", "lora"] = "hf") -> Path:
    """The path of llama.cpp's converter for models, or for LoRA adapters."""
    return LLAMA_CPP_FOLDER / f"convert_{source}_to_gguf.py"


def find_program(name: Literal["llama-imatrix", "llama-completion"], folder: Path = LLAMA_CPP_FOLDER) -> Path | None:
    """The path of one of llama.cpp's programs; None where it is not installed."""
    path = folder / "bin" / name
    return path if path.is_file() else None


def list_convertible_architectures(kind: Literal["TEXT", "MMPROJ"], folder: Path = LLAMA_CPP_FOLDER) -> frozenset[str]:
    """The architectures that the installed converter knows, by the names in config.json; of whole models, or of their vision parts.

    The converter's own table is read and not imported, which would load torch.
    """
    module = ast.parse((folder / "conversion" / "__init__.py").read_text())
    tables = {
        node.target.id: node.value
        for node in module.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None
    }
    return frozenset(ast.literal_eval(tables[f"{kind}_MODEL_MAP"]))


def is_llama_cpp_available() -> bool:
    """Whether GGUF files can be made and verified here. Loads nothing."""
    return find_spec("llama_cpp") is not None and get_converter_path().is_file()
