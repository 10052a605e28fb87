"""What a trainer is asked to do, and what it says of it. Every environment reads this: no library is asked for unless it trains."""

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RANK = 16
SEED = 3407


@dataclass(frozen=True)
class TrainingPlan:
    """One training: the same rows once, with adapters of the same rank and the same rate, whoever does it."""

    base: str  # folder of the model
    rows_path: str  # JSONL: {"prompt": [message], "completion": [message]}
    output_folder: str  # folder for the adapter
    packing: bool
    batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    max_length: int
    logging_steps: int = 5
    flags: str = "tunesmith"  # of TRL: "tunesmith", or "defaults", where batch size, precision and recomputation are the library's own
    on_gpu: bool = False
    use_fa2: bool = False

    @classmethod
    def read(cls, path: str) -> "TrainingPlan":
        """As `write` wrote it."""
        return cls(**json.loads(Path(path).read_text()))

    def write(self, path: Path) -> None:
        """For a trainer in another environment."""
        path.write_text(json.dumps(asdict(self)))


@dataclass
class TrainingRecord:
    """What was seen of a training."""

    tokens: int = 0  # real ones, not padding
    labels: int = 0
    steps: int = 0
    seconds: float = 0.0  # from the beginning of the first step to the end of the last
    step_ends_s: list[float] = field(default_factory=list)  # of each, since the first began
    peak_gpu_mb: float | None = None
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    peak_rss_mb: float = 0.0
    loaded_rss_mb: float = 0.0  # before the first step
    adapter: str = ""

    @classmethod
    def read(cls, path: Path) -> "TrainingRecord":
        """As `write` wrote it."""
        return cls(**json.loads(path.read_text()))

    def write(self, path: Path) -> None:
        """For the benchmark."""
        path.write_text(json.dumps(asdict(self)))


class Stopwatch:
    """Told by a trainer when it begins and after each step."""

    def __init__(self) -> None:
        self.record = TrainingRecord()
        self._began = 0.0

    def start(self) -> None:
        """The model is there; the steps begin."""
        self.record.loaded_rss_mb = peak_rss_mb()
        self._began = time.perf_counter()

    def record_step(self, step: int) -> None:
        """A step is done. The last call counts."""
        self.record.steps = step
        self.record.seconds = time.perf_counter() - self._began
        self.record.step_ends_s.append(self.record.seconds)
        self.record.peak_rss_mb = peak_rss_mb()

    def record_metrics(self, loss: float | None, grad_norm: float | None) -> None:
        """A point of the curve."""
        if loss is not None and grad_norm is not None:
            self.record.losses.append(float(loss))
            self.record.grad_norms.append(float(grad_norm))


def make_trainer_callback(watch: Stopwatch) -> Any:
    """A callback of transformers' trainer, whichever version is there, that tells the stopwatch."""
    from transformers import TrainerCallback

    class StopwatchCallback(TrainerCallback):
        """Its methods have the library's signatures."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            watch.start()

        def on_step_end(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
            if args.device.type == "cuda":  # what was asked of the GPU may not be done yet
                import torch

                torch.cuda.synchronize()
            watch.record_step(state.global_step)

        def on_log(self, _args: Any, _state: Any, _control: Any, *, logs: dict[str, float], **_: Any) -> None:
            watch.record_metrics(logs.get("loss"), logs.get("grad_norm"))

    return StopwatchCallback()


def peak_rss_mb() -> float:
    """The most memory that this process ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e6 / 1024)


def peak_gpu_mb() -> float:
    """The most memory that tensors of this process ever held on the GPU."""
    import torch

    return torch.cuda.max_memory_allocated() / 1e6


def run_script(train: Callable[[TrainingPlan], TrainingRecord]) -> None:
    """A script's main: read the plan, train, write what was seen beside it."""
    path = sys.argv[1]
    plan = TrainingPlan.read(path)
    seen = train(plan)
    seen.peak_gpu_mb = peak_gpu_mb() if plan.on_gpu else None
    seen.write(Path(path).with_suffix(".record.json"))
