"""What every benchmark receives: its own folder, and whether to measure the peers too."""

from dataclasses import dataclass
from pathlib import Path

from bench.servers import SOURCE

REAL_TRAINER = SOURCE / ".venvs/llm/bin/python"
MISSING_TRAINER_NOTE = "the trainer's environment is not installed: make setup"


@dataclass(frozen=True)
class BenchmarkContext:
    """The folder and options of one benchmark."""

    folder: Path  # empty; removed afterwards
    with_peers: bool = True
