"""The real trainer's environment and a tiny base model, for rows whose attack needs the libraries themselves."""

import os
import shutil
import subprocess
from pathlib import Path

from tests.attack.target import Target
from tests.chaos.service import SOURCE, TRAINER_PYTHON

BASE = "tests/tiny-gemma"
BUILD_TIMEOUT_S = 120


def build_base(folder: Path) -> Path:
    """Build the tiny base in the trainer's environment; return its folder."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(TRAINER_PYTHON), "-m", "tests.tiny_gemma", str(folder)]
    subprocess.run(command, check=True, cwd=SOURCE, env=environment, capture_output=True, timeout=BUILD_TIMEOUT_S)
    return folder


def install_base(target: Target, base: Path, name: str = BASE) -> Path:
    """Copy a base into the model store; return its folder there."""
    folder = target.objects / "pretrained_weights/huggingface" / name
    shutil.copytree(base, folder)
    return folder
