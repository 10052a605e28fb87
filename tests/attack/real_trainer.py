"""The real trainer's environment and a tiny base model, for rows whose attack needs the libraries themselves."""

import os
import shutil
import subprocess
from pathlib import Path

from tests.attack.target import Target
from tests.chaos.service import SOURCE, TRAINER_PYTHON

BASE = "tests/tiny-gemma"
BUILD_TIMEOUT_S = 180


def build_base(folder: Path) -> Path:
    """Build the tiny Gemma; return its folder."""
    return _build("tests.tiny_gemma", folder)


def build_glm(folder: Path, tokenizer: Path) -> Path:
    """Build a tiny Glm4 with the tokenizer of another base; return its folder."""
    return _build("tests.attack.tiny_glm", tokenizer, folder)


def _build(module: str, *folders: Path) -> Path:
    """Run a builder in the trainer's environment; the last folder is the one that it writes."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(TRAINER_PYTHON), "-m", module, *map(str, folders)]
    subprocess.run(command, check=True, cwd=SOURCE, env=environment, capture_output=True, timeout=BUILD_TIMEOUT_S)
    return folders[-1]


def install_base(target: Target, base: Path, name: str = BASE) -> Path:
    """Copy a base into the model store; return its folder there."""
    folder = target.objects / "pretrained_weights/huggingface" / name
    shutil.copytree(base, folder)
    return folder
