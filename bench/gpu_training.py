"""Speed of LoRA training on this machine's GPU, and its share of the peak: `python -m bench.gpu_training [1b] [4b]`.

Runs in the trainer's environment, on a machine with an NVIDIA GPU; `--dry-run` takes the same path with a tiny base on the CPU, to show
that the script works. The bases have the shapes of Gemma 3 1B and 4B and random weights. Nearly all tokens are labeled, so that skipping
unlabeled positions saves nothing. One table compares

    Tunesmith, defaults        what a request without hyperparameters gets: rows that are not packed
    Tunesmith, packed          blocks of 4,096 tokens
    TRL, defaults              the library's own batch size, precision and recomputation, with the same adapter
    TRL, the same flags        what Tunesmith chooses for packed blocks
    Unsloth, packed            if its package is installed, or its Python is given

The trainers take turns. A new round, or a training, starts only if its time is left in `--budget-s`; the table says what was not measured.

The share of the peak counts 4 N operations per token, where N is the number of weights in matrix multiplications, including the head:
2 N in the forward pass and 2 N in the backward pass, because the weights are frozen. Recomputation to save memory is not counted.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.figures import at_least
from bench.peers_training.plan import TrainingPlan, TrainingRecord
from bench.peers_training.rows import SHAPES

SOURCE = Path(__file__).resolve().parent.parent
SIZES = ("1b", "4b")
MEAN_TOKENS = 60  # per row, approximately
MAX_ROWS_PER_STEP = 8  # of a training that is not packed, by the defaults of any trainer
BUDGET_S = 420
# Dense bf16 operations per second, by a part of CUDA's name for the GPU; from NVIDIA's data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
PEAK_SHARE_GOALS = {"H200": at_least(35), "H100": at_least(35)}
SPEED_GOALS = {"TRL, defaults": at_least(2.0), "Unsloth, packed": at_least(0.95)}  # of Tunesmith, packed, as a multiple
OURS = "Tunesmith, packed"


@dataclass(frozen=True)
class Setting:
    """The length of the trainings, and where they run."""

    device: str  # CUDA's name for the GPU, or "CPU"
    sequence_length: int
    blocks_per_step: int  # of a packed training
    steps: int
    warmup_steps: int  # not measured: kernels are selected and memory is allocated
    rounds: int  # at most
    learning_rate: float
    use_fa2: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether the trainings run on a GPU."""
        return self.device != "CPU"

    @property
    def peak_flops(self) -> float | None:
        """Operations per second of the GPU's data sheet; None for an unknown one."""
        return next((flops for kind, flops in PEAK_FLOPS.items() if kind in self.device), None)


DRY_RUN = Setting("CPU", sequence_length=256, blocks_per_step=1, steps=5, warmup_steps=1, rounds=1, learning_rate=2e-2)


@dataclass(frozen=True)
class TrainerScript:
    """A script of bench/peers_training, which trains with several settings in one process."""

    script: str
    python: Path
    flags: Mapping[str, str]  # of the plan, by row of the table
    absent: str = ""  # why it cannot be run


@dataclass
class Result:
    """One row of the table, and the trainings that it is the median of."""

    size: str
    trainer: str
    problem: str = ""  # why it was not measured, or not again
    runs: list[TrainingRecord] = field(default_factory=list[TrainingRecord])
    tokens_per_s: float | None = None
    peak_share_percent: float | None = None
    peak_memory_mb: float | None = None
    goals: dict[str, bool] = field(default_factory=dict[str, bool])

    @property
    def note(self) -> str:
        """What the learning did, what went wrong, and the goals."""
        learned = f"loss {self.runs[0].losses[0]:.2f} → {self.runs[0].losses[-1]:.2f}" if self.runs else ""
        goals = [f"{text}: {'met' if is_met else 'missed'}" for text, is_met in self.goals.items()]
        return "; ".join(filter(None, (learned, self.problem, *goals)))


class Budget:
    """The time that is left, and how long each process took."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self._clock = seconds, clock
        self._ends_at = clock() + seconds
        self._durations_s: dict[tuple[str, ...], float] = {}

    @property
    def left_s(self) -> float:
        """Seconds until the budget is used up."""
        return self._ends_at - self._clock()

    @property
    def used_up(self) -> str:
        """Why something was not measured."""
        return f"not measured: the budget of {self.seconds:g} s was used up"

    def allows(self, *process: str) -> bool:
        """Whether enough time is left for this process, as long as it took before."""
        return self.left_s > self._durations_s.get(process, 0.0)

    def run(self, command: Sequence[str | Path], *process: str) -> str:
        """Run a command for as long as time is left; returns why it failed, or nothing."""
        started_at = self._clock()
        try:
            done = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True, check=False, timeout=max(self.left_s, 1))
        except subprocess.TimeoutExpired:
            return f"stopped: the budget of {self.seconds:g} s ended before it did"
        except OSError as error:
            return f"failed: {error}"
        self._durations_s[process] = self._clock() - started_at
        return f"failed: {' / '.join(done.stderr.strip().splitlines()[-3:])}" if done.returncode else ""


def main() -> int:
    """Measure and print. Returns 1 if a trainer failed or a goal was missed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_training", description="Measures LoRA training on this machine's GPU.")
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help="1b or 4b; default: both")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help=f"seconds for all of it; default: {BUDGET_S}")
    parser.add_argument("--batch", type=int, default=2, help="packed blocks per step")
    parser.add_argument("--dry-run", action="store_true", help="a tiny base on the CPU, to try the script")
    parser.add_argument("--unsloth", type=Path, metavar="PYTHON", help="a Python with Unsloth; default: this one, if Unsloth is installed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    args = parser.parse_args()
    if unknown := set(args.sizes) - set(SIZES):
        parser.error(f"no size {', '.join(sorted(unknown))}; known: {', '.join(SIZES)}")
    budget = Budget(args.budget_s)
    setting = DRY_RUN if args.dry_run else detect_setting(args.batch)
    if setting is None:
        print("torch finds no GPU on this machine; `python -m bench training` measures without one, and --dry-run tries", file=sys.stderr)
        return 2
    sizes = ["tiny"] if args.dry_run else args.sizes or SIZES
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        results = measure(sizes, setting, list_scripts(setting, args.unsloth), budget, Path(folder))
    print_results(results, setting, budget)
    if args.json:
        args.json.write_text(json.dumps([asdict(result) | {"note": result.note} for result in results], indent=1) + "\n")
    return 1 if any(result.problem.startswith("failed") or False in result.goals.values() for result in results) else 0


def detect_setting(blocks_per_step: int) -> Setting | None:
    """The setting for this machine's GPU; None without one."""
    import torch
    from transformers.utils import is_flash_attn_2_available

    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_name()
    return Setting(
        device,
        sequence_length=4096,
        blocks_per_step=blocks_per_step,
        steps=24,
        warmup_steps=6,
        rounds=3,
        learning_rate=1e-3,
        use_fa2=is_flash_attn_2_available(),
    )


def list_scripts(setting: Setting, unsloth: Path | None) -> list[TrainerScript]:
    """The scripts to run, in this order, and those that cannot be run."""
    here = Path(sys.executable)
    is_installed = find_spec("unsloth") is not None
    absent = "absent: it needs a GPU" if is_installed and not setting.on_gpu else "absent: the package unsloth is not installed"
    absent = "" if unsloth or (is_installed and setting.on_gpu) else absent
    return [
        TrainerScript("tunesmith", here, {"Tunesmith, defaults": "defaults", OURS: "tunesmith"}),
        TrainerScript("trl_trainer", here, {"TRL, defaults": "defaults", "TRL, the same flags": "tunesmith"}),
        TrainerScript("unsloth_trainer", unsloth or here, {"Unsloth, packed": "tunesmith"}, absent),
    ]


def measure(sizes: Sequence[str], setting: Setting, scripts: Sequence[TrainerScript], budget: Budget, folder: Path) -> list[Result]:
    """Train with each trainer in turn, on each base, for as many rounds as the budget allows."""
    rows = {(size, script.script): [Result(size, row, script.absent) for row in script.flags] for size in sizes for script in scripts}
    for size in sizes:
        if problem := _make_base_and_rows(size, setting, budget, folder / size):
            for result in chain(*(rows[size, script.script] for script in scripts)):
                result.problem = result.problem or problem
    for number in range(setting.rounds):
        for size in sizes:
            for script in scripts:
                results = [result for result in rows[size, script.script] if not result.problem]
                if not results:
                    continue
                if budget.allows(size, script.script):
                    _train(results, setting, script, budget, folder / size / f"{script.script}-{number}")
                elif number == 0:
                    for result in results:
                        result.problem = budget.used_up
    for result in chain(*rows.values()):
        _summarize(result, setting)
    for size in sizes:
        _check_goals({result.trainer: result for script in scripts for result in rows[size, script.script]}, setting)
    return list(chain(*rows.values()))


def count_matmul_parameters(size: str) -> int:
    """The number of weights in matrix multiplications: all linear layers, including the head."""
    shape = SHAPES[size]
    width, heads = shape["hidden_size"], shape["head_dim"]
    attention = width * heads * (2 * shape["num_attention_heads"] + 2 * shape["num_key_value_heads"])
    return shape["num_hidden_layers"] * (attention + 3 * width * shape["intermediate_size"]) + width * shape["vocab_size"]


def tokens_per_second(run: TrainingRecord, warmup_steps: int) -> float:
    """Real tokens per second after the warmup steps. A trainer that does not count the tokens of a step sees equally many in each."""
    seconds = run.step_ends_s[-1] - run.step_ends_s[warmup_steps - 1]
    if len(run.step_tokens) == run.steps:
        return (run.step_tokens[-1] - run.step_tokens[warmup_steps - 1]) / seconds
    return run.tokens * (run.steps - warmup_steps) / run.steps / seconds


def _make_base_and_rows(size: str, setting: Setting, budget: Budget, folder: Path) -> str:
    """Make a base and its rows; returns why that failed, or nothing."""
    if budget.left_s <= 0:
        return budget.used_up
    rows = setting.steps * max(MAX_ROWS_PER_STEP, setting.blocks_per_step * setting.sequence_length // MEAN_TOKENS)
    options = ["--shape", size, "--rows", str(rows), "--label-share", "1.0"]
    return budget.run([sys.executable, "-m", "bench.peers_training.rows", folder, *options], size, "rows")


def _train(results: Sequence[Result], setting: Setting, script: TrainerScript, budget: Budget, folder: Path) -> None:
    """Run a script once, and add its trainings to the rows of the table, or why there are none."""
    folder.mkdir()
    plan = TrainingPlan(
        base=str(folder.parent / "base"),
        rows_path=str(folder.parent / "train.jsonl"),
        output_folder="",
        packing=True,
        batch_size=setting.blocks_per_step,
        gradient_accumulation_steps=1,
        learning_rate=setting.learning_rate,
        max_length=setting.sequence_length,
        logging_steps=1,
        max_steps=setting.steps,
        on_gpu=setting.on_gpu,
        use_fa2=setting.use_fa2,
    )
    paths = [folder / f"{number}.json" for number in range(len(results))]
    for path, result in zip(paths, results, strict=True):
        replace(plan, flags=script.flags[result.trainer], output_folder=str(path.with_suffix(""))).write(path)
    pending = dict(zip(paths, results, strict=True))
    while pending:
        command = [script.python, "-m", f"bench.peers_training.{script.script}", *pending]
        problem = budget.run(command, results[0].size, script.script) if budget.left_s > 0 else budget.used_up
        finished = [path for path in pending if path.with_suffix(".record.json").exists()]
        for path in finished:
            _add_run(pending.pop(path), TrainingRecord.read(path.with_suffix(".record.json")))
        if not finished:  # the first one failed; one that failed after others gets a process of its own
            pending.pop(next(iter(pending))).problem = problem
    shutil.rmtree(folder)  # its files are as large as the base


def _add_run(result: Result, record: TrainingRecord) -> None:
    if record.has_learned:
        result.runs.append(record)
    else:
        result.problem = f"failed: it learned nothing; losses {record.losses}, gradient norms {record.grad_norms}"


def _summarize(result: Result, setting: Setting) -> None:
    """Add the medians of a trainer's rounds."""
    if not result.runs:
        return
    result.tokens_per_s = statistics.median(tokens_per_second(run, setting.warmup_steps) for run in result.runs)
    result.peak_memory_mb = statistics.median(run.peak_rss_mb if run.peak_gpu_mb is None else run.peak_gpu_mb for run in result.runs)
    if setting.peak_flops is not None:
        result.peak_share_percent = 100 * result.tokens_per_s * 4 * count_matmul_parameters(result.size) / setting.peak_flops


def _check_goals(results: Mapping[str, Result], setting: Setting) -> None:
    """Add the goals to the results of a base. A dry run has none."""
    ours = results[OURS]
    if ours.tokens_per_s is None or not setting.on_gpu:
        return
    for kind, goal in PEAK_SHARE_GOALS.items():
        if kind in setting.device and ours.peak_share_percent is not None:
            ours.goals[f"goal {goal.direction} {goal.value:g} %"] = goal.is_met_by(ours.peak_share_percent)
    for trainer, goal in SPEED_GOALS.items():
        theirs = results[trainer].tokens_per_s
        if theirs is not None:
            ratio = ours.tokens_per_s / theirs
            ours.goals[f"{ratio:.2f}× {trainer}, goal {goal.direction} {goal.value:g}×"] = goal.is_met_by(ratio)


def print_results(results: Sequence[Result], setting: Setting, budget: Budget) -> None:
    """Print the table."""
    rounds = max((len(result.runs) for result in results), default=0)
    title = f"LoRA on {setting.device}: {setting.steps} steps, {rounds} of at most {setting.rounds} rounds in {budget.seconds:g} s"
    table = Table("base", "trainer", "tokens/s", "share of the peak", "peak memory", "rounds", "note", title=title)
    for result in results:
        table.add_row(
            result.size,
            result.trainer,
            _format(result.tokens_per_s, ",.0f"),
            _format(result.peak_share_percent, ".1f", " %"),
            _format(result.peak_memory_mb, ",.0f", " MB"),
            str(len(result.runs)),
            escape(result.note),
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    if rounds < setting.rounds:
        print(f"No further round was started: the budget of {budget.seconds:g} s was used up.")
    if not setting.on_gpu:
        print("A dry run on the CPU: its figures say nothing about a GPU.")


def _format(value: float | None, pattern: str, unit: str = "") -> str:
    return "–" if value is None else format(value, pattern) + unit


if __name__ == "__main__":
    sys.exit(main())
