"""The plan that a trainer gets, and the record that it writes. Every environment loads this module, so libraries are imported lazily."""

import gc
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RANK = 16
SEED = 3407
MAX_LEFT_MB = 256  # of an earlier training: far less than a model


@dataclass(frozen=True)
class TrainingPlan:
    """One training: over the same rows, with the same adapter rank and learning rate for every trainer."""

    base: str  # folder of the model
    rows_path: str  # JSONL: {"prompt": [message], "completion": [message]}
    output_folder: str  # folder for the adapter
    packing: bool
    batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    max_length: int
    logging_steps: int = 5
    flags: str = "tunesmith"  # as in this plan, or "defaults": the trainer's own batch size, precision and recomputation
    max_steps: int = -1  # instead of one epoch
    on_gpu: bool = False
    use_fa2: bool = False

    @classmethod
    def read(cls, path: str) -> "TrainingPlan":
        """Read what `write` wrote."""
        return cls(**json.loads(Path(path).read_text()))

    def write(self, path: Path) -> None:
        """Write the plan for a trainer in another environment."""
        path.write_text(json.dumps(asdict(self)))


@dataclass
class TrainingRecord:
    """Measurements of one training."""

    tokens: int = 0  # without padding
    labels: int = 0
    steps: int = 0
    seconds: float = 0.0  # from the beginning of the first step to the end of the last
    step_ends_s: list[float] = field(default_factory=list)  # per step, since the first step began
    step_tokens: list[int] = field(default_factory=list)  # tokens without padding until the end of each step; empty if unknown
    peak_gpu_mb: float | None = None
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    peak_rss_mb: float = 0.0
    loaded_rss_mb: float = 0.0  # before the first step
    adapter: str = ""

    @property
    def has_gradients(self) -> bool:
        """Whether every logged step had a gradient."""
        return bool(self.grad_norms) and min(self.grad_norms) > 0

    @property
    def has_learned(self) -> bool:
        """Whether every logged step had a gradient and the loss fell, from the first quarter of them to the last."""
        quarter = max(1, len(self.losses) // 4)
        return self.has_gradients and statistics.fmean(self.losses[-quarter:]) < statistics.fmean(self.losses[:quarter])

    @classmethod
    def read(cls, path: Path) -> "TrainingRecord":
        """Read what `write` wrote."""
        return cls(**json.loads(path.read_text()))

    def write(self, path: Path) -> None:
        """Write the record for the benchmark."""
        path.write_text(json.dumps(asdict(self)))


class Stopwatch:
    """Fills a record; the trainer calls it at the start and after each step."""

    def __init__(self) -> None:
        self.record = TrainingRecord()
        self._began = 0.0

    def start(self) -> None:
        """Start timing: the model is loaded and the first step begins."""
        self.record.loaded_rss_mb = peak_rss_mb()
        self._began = time.perf_counter()

    def record_step(self, step: int) -> None:
        """Record the end of a step."""
        self.record.steps = step
        self.record.seconds = time.perf_counter() - self._began
        self.record.step_ends_s.append(self.record.seconds)
        self.record.peak_rss_mb = peak_rss_mb()

    def record_metrics(self, loss: float | None, grad_norm: float | None) -> None:
        """Record loss and gradient norm, if both are known."""
        if loss is not None and grad_norm is not None:
            self.record.losses.append(float(loss))
            self.record.grad_norms.append(float(grad_norm))


def make_trainer_callback(watch: Stopwatch) -> Any:
    """A callback for transformers' Trainer, of any version, that calls the stopwatch."""
    from transformers import TrainerCallback

    class StopwatchCallback(TrainerCallback):
        """Forwards the events of the Trainer."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            watch.start()

        def on_step_end(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
            if args.device.type == "cuda":  # the GPU may still be working
                import torch

                torch.cuda.synchronize()
            watch.record_step(state.global_step)

        def on_log(self, _args: Any, _state: Any, _control: Any, *, logs: dict[str, float], **_: Any) -> None:
            watch.record_metrics(logs.get("loss"), logs.get("grad_norm"))
            if "num_tokens" in logs:  # of the whole training so far
                watch.record.step_tokens.append(int(logs["num_tokens"]))

    return StopwatchCallback()


def peak_rss_mb() -> float:
    """Peak memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e6 / 1024)


def run_script(train: Callable[[TrainingPlan], TrainingRecord]) -> None:
    """The main function of each trainer's script: read each plan, train, write the record next to the plan."""
    for path in sys.argv[1:]:
        plan = TrainingPlan.read(path)
        if plan.on_gpu:
            reset_gpu_memory()
        record = train(plan)
        record.peak_gpu_mb = peak_gpu_mb() if plan.on_gpu else None
        record.write(Path(path).with_suffix(".record.json"))


def reset_gpu_memory() -> None:
    """Free what an earlier plan left on the GPU, and measure the peak anew. Raises RuntimeError if its model is still there."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    if (left_mb := torch.cuda.memory_allocated() / 1e6) > MAX_LEFT_MB:
        raise RuntimeError(f"the training before this one left {left_mb:,.0f} MB on the GPU, so the peak cannot be measured")
    torch.cuda.reset_peak_memory_stats()


def peak_gpu_mb() -> float:
    """Peak GPU memory of this process's tensors."""
    import torch

    return torch.cuda.max_memory_allocated() / 1e6
