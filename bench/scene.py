"""What every benchmark is given: a folder of its own, and whether the peers are to be measured too."""

from dataclasses import dataclass
from pathlib import Path

from bench.servers import SOURCE

REAL_TRAINER = SOURCE / ".venvs/llm/bin/python"


@dataclass(frozen=True)
class BenchmarkContext:
    """Where one benchmark works."""

    folder: Path  # empty, and removed afterwards
    with_peers: bool = True
