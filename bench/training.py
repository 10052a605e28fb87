"""Speed of the trainer, compared with TRL and LLaMA-Factory: the same rows, base, adapter and learning rate, for one epoch.

There are three comparisons. In each, the trainers take turns, and each training runs in its own process with one thread:

    packed       half of each row is labeled: Tunesmith, TRL with its defaults, TRL with our flags, LLaMA-Factory as in its examples
                 and with packing
    all labeled  the same packed rows, but nearly every token is labeled, so skipping unlabeled positions saves nothing
    unpacked     a quarter of each row is labeled, in padded batches: shows the cost of the LM head at unlabeled positions

A training counts only if its gradients were not zero, its held-out loss fell, and it saw exactly the tokens and labels of the others.
`python -m bench.training --real` uses the real Gemma 3 270M and real questions and answers; with `--rows FILE`, the rows of a file. Those
comparisons have higher goals: speed, peak memory, and the loss on held-out rows.
"""

import argparse
import asyncio
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from bench.context import MISSING_TRAINER_NOTE, REAL_TRAINER, BenchmarkContext
from bench.figures import Measurement, at_least, at_most, median, print_table, write_json
from bench.peers import cache_folder, describe_install_error
from bench.peers_training.plan import TrainingPlan, TrainingRecord
from bench.servers import SOURCE, ServerUnavailable, make_environment

NAME = "training"
ROUNDS = 5
TIMEOUT_S = 1800
LLAMA_FACTORY = "llamafactory==0.9.5"
INSTALL_TIMEOUT_S = 1800


@dataclass(frozen=True)
class TrainerSetup:
    """A trainer, and the part of its plan that differs from the others."""

    name: str
    script: str
    packing: bool
    batch_size: int
    gradient_accumulation_steps: int = 1
    flags: str = "tunesmith"


@dataclass(frozen=True)
class Comparison:
    """Trainers on the same rows; the first is Tunesmith."""

    name: str
    label_share: float
    trainers: tuple[TrainerSetup, ...]
    goals: Mapping[str, float]  # by trainer: how many times as fast Tunesmith must be


# One step takes eight rows, or as many tokens packed into one block.
TUNESMITH = TrainerSetup("Tunesmith", "tunesmith", packing=True, batch_size=1)
TRL_TUNESMITH_FLAGS = TrainerSetup("TRL, our flags", "trl_trainer", packing=True, batch_size=1)
TRL_DEFAULTS = TrainerSetup("TRL, its defaults", "trl_trainer", packing=False, batch_size=8, flags="defaults")
LLAMA_FACTORY_EXAMPLE = TrainerSetup(
    "LLaMA-Factory, as its examples", "llama_factory", packing=False, batch_size=1, gradient_accumulation_steps=8
)
LLAMA_FACTORY_PACKED = TrainerSetup("LLaMA-Factory, packed", "llama_factory", packing=True, batch_size=1)

COMPARISONS = (
    Comparison(
        "packed",
        0.5,
        (TUNESMITH, TRL_DEFAULTS, TRL_TUNESMITH_FLAGS, LLAMA_FACTORY_EXAMPLE, LLAMA_FACTORY_PACKED),
        {TRL_DEFAULTS.name: 2.5, TRL_TUNESMITH_FLAGS.name: 0.98},
    ),
    Comparison("all labeled", 1.0, (TUNESMITH, TRL_TUNESMITH_FLAGS), {TRL_TUNESMITH_FLAGS.name: 0.98}),
    Comparison(
        "unpacked",
        0.25,
        (replace(TUNESMITH, packing=False, batch_size=8), replace(TRL_TUNESMITH_FLAGS, packing=False, batch_size=8)),
        {TRL_TUNESMITH_FLAGS.name: 2.0},
    ),
)


class HeldOutLoss(NamedTuple):
    """Mean loss on the held-out rows, in nats per token."""

    all_tokens: float
    content: float  # without the tokens that end a turn


@dataclass(frozen=True)
class TrainingSize:
    """The base and the rows of a comparison."""

    base: Path | None  # a real base; None makes a small one
    rows: int  # at most
    learning_rate: float
    logging_steps: int
    max_length: int = 512
    rows_file: Path | None = None  # None makes rows


# With the real base. Its head has a larger share of the weights than in most models, and TRL computes it at every position.
REAL_GOALS = {TRL_DEFAULTS.name: 3.8, TRL_TUNESMITH_FLAGS.name: 2.0}
MAX_LOSS_DIFFERENCE = 0.005  # nats above the other's held-out loss: bf16 rounds differently in another order of operations

SMALL_SIZE = TrainingSize(None, rows=96, learning_rate=6e-3, logging_steps=4)


async def measure(context: BenchmarkContext) -> list[Measurement]:
    """Run all comparisons on the small base."""
    return await asyncio.to_thread(compare, context, COMPARISONS, SMALL_SIZE, ROUNDS)


def compare(context: BenchmarkContext, comparisons: Sequence[Comparison], size: TrainingSize, rounds: int) -> list[Measurement]:
    """Run these comparisons. Skips LLaMA-Factory if it cannot be installed."""
    if not REAL_TRAINER.exists():
        return [Measurement(NAME, "training", None, note=MISSING_TRAINER_NOTE)]
    pythons, figures = {"tunesmith": REAL_TRAINER, "trl_trainer": REAL_TRAINER}, []
    try:
        pythons |= {"llama_factory": install_llama_factory()} if context.with_peers else {}
    except ServerUnavailable as error:
        figures.append(Measurement(NAME, "LLaMA-Factory", None, note=str(error)))
    for comparison in comparisons:
        folder = context.folder / comparison.name.replace(" ", "-")
        trainers = tuple(trainer for trainer in comparison.trainers if trainer.script in pythons)
        figures += _run_comparison(replace(comparison, trainers=trainers), folder, size, pythons, rounds)
    return figures


def install_llama_factory() -> Path:
    """Install LLaMA-Factory with our build of torch if necessary; returns its Python. Raises ServerUnavailable."""
    environment = cache_folder() / "llamafactory"
    marker = environment / ".installed"
    if marker.exists() and marker.read_text() == LLAMA_FACTORY:
        return environment / "bin/python"
    pip = [environment / "bin/pip", "--quiet", "--disable-pip-version-check"]
    pinned = ["install", "-c", SOURCE / "jobs/environments/llm/constraints.txt"]
    try:
        for command in (
            ["python3.11", "-m", "venv", environment],
            [*pip, *pinned, "torch"],
            [*pip, *pinned, LLAMA_FACTORY],
            [*pip, "uninstall", "-y", "torchvision"],  # not needed for text, and a build that does not match torch breaks transformers
        ):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise ServerUnavailable(f"{LLAMA_FACTORY} could not be installed: {describe_install_error(error)}") from error
    marker.write_text(LLAMA_FACTORY)
    return environment / "bin/python"


def _run_comparison(
    comparison: Comparison, folder: Path, size: TrainingSize, pythons: Mapping[str, Path], rounds: int
) -> list[Measurement]:
    """Train with each trainer in turn, for several rounds, and evaluate the adapters."""
    real = [*(("--base", size.base) if size.base else ()), *(("--file", size.rows_file) if size.rows_file else ())]
    _run_script(REAL_TRAINER, folder, "rows", folder, "--rows", str(size.rows), "--label-share", str(comparison.label_share), *real)
    records: dict[str, list[TrainingRecord]] = {trainer.name: [] for trainer in comparison.trainers}
    for number in range(rounds):
        for trainer in comparison.trainers:
            plan = _make_plan(trainer, folder, size, number)
            path = Path(plan.output_folder).with_suffix(".json")
            plan.write(path)
            _run_script(pythons[trainer.script], folder, trainer.script, path)
            records[trainer.name].append(TrainingRecord.read(path.with_suffix(".record.json")))
            print(
                f"  {comparison.name}, {trainer.name}: {_tokens_per_second(records[trainer.name][-1]):.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )
    _check_comparable(records)
    adapters = [runs[0].adapter for runs in records.values()]
    output = _run_script(REAL_TRAINER, folder, "evaluate", folder / "base", folder / "held-out.jsonl", *adapters)
    base_loss, *losses = [HeldOutLoss(*map(float, line.split())) for line in output.splitlines()]
    by_name = dict(zip(records, losses, strict=True))
    _check_learned(base_loss, by_name)
    figures = _figures(comparison, records, base_loss, by_name)
    return figures + (_real_figures(comparison, records, by_name) if size.base else [])


def _make_plan(trainer: TrainerSetup, folder: Path, size: TrainingSize, number: int) -> TrainingPlan:
    return TrainingPlan(
        base=str(folder / "base"),
        rows_path=str(folder / "train.jsonl"),
        output_folder=str(folder / f"{trainer.name.lower().replace(',', '').replace(' ', '-')}-{number}"),
        packing=trainer.packing,
        batch_size=trainer.batch_size,
        gradient_accumulation_steps=trainer.gradient_accumulation_steps,
        learning_rate=size.learning_rate,
        max_length=size.max_length,
        logging_steps=size.logging_steps,
        flags=trainer.flags,
    )


def _run_script(python: Path, home: Path, script: str, *arguments: str | Path) -> str:
    """Run a script of bench/peers_training; returns its output. Raises RuntimeError with the end of its stderr."""
    home.mkdir(parents=True, exist_ok=True)
    command = [python, "-m", f"bench.peers_training.{script}", *arguments]
    variables = make_environment(home, PYTHONPATH=str(SOURCE), TOKENIZERS_PARALLELISM="false")
    done = subprocess.run(command, cwd=SOURCE, env=variables, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"{script} failed: {' / '.join(done.stderr.strip().splitlines()[-3:])}")
    return done.stdout


def _check_comparable(records: Mapping[str, Sequence[TrainingRecord]]) -> None:
    """Raises RuntimeError if a training had a step without gradients, or saw other tokens or labels than the rest."""
    counts = {name: {(run.tokens, run.labels) for run in runs} for name, runs in records.items()}
    if len(set.union(*counts.values())) > 1:
        raise RuntimeError(f"the trainers did not see the same tokens and labels: {counts}")
    for name, runs in records.items():
        for run in runs:
            if not run.has_gradients:
                raise RuntimeError(f"{name} had no gradients: losses {run.losses}, gradient norms {run.grad_norms}")


def _check_learned(base_loss: HeldOutLoss, losses: Mapping[str, HeldOutLoss]) -> None:
    """Raises RuntimeError unless every training lowered the held-out loss: those of single steps depend on their rows."""
    for name, loss in losses.items():
        if not loss.all_tokens < base_loss.all_tokens:
            raise RuntimeError(f"{name} learned nothing: held-out loss {base_loss.all_tokens:.3f} → {loss.all_tokens:.3f}")


def _figures(
    comparison: Comparison, records: Mapping[str, Sequence[TrainingRecord]], base_loss: HeldOutLoss, losses: Mapping[str, HeldOutLoss]
) -> list[Measurement]:
    ours, *others = records
    figures = [
        Measurement(
            NAME,
            f"{comparison.name}: {name}",
            median([_tokens_per_second(run) for run in runs]),
            "tokens/s",
            note=f"{median([run.peak_rss_mb for run in runs]):,.0f} MB peak, {runs[0].steps} steps of {runs[0].tokens:,} tokens, "
            f"{runs[0].labels:,} labeled; held-out loss {base_loss.all_tokens:.3f} → {losses[name].all_tokens:.3f}, "
            f"without ends of turn {base_loss.content:.3f} → {losses[name].content:.3f}",
        )
        for name, runs in records.items()
    ]
    for name in others:
        ratios = [_tokens_per_second(mine) / _tokens_per_second(theirs) for mine, theirs in zip(records[ours], records[name], strict=True)]
        goal = at_least(comparison.goals[name]) if name in comparison.goals else None
        note = f"median of {len(ratios)}, from {min(ratios):.2f} to {max(ratios):.2f}"
        figures.append(Measurement(NAME, f"{comparison.name}: times as fast as {name}", median(ratios), "×", goal, note))
    final = [loss.all_tokens for loss in losses.values()]
    difference = 100 * (max(final) / min(final) - 1)
    is_same_length = len({run.steps for runs in records.values() for run in runs}) == 1
    goal = at_most(1) if is_same_length else None  # fewer, larger steps end elsewhere
    figures.append(Measurement(NAME, f"{comparison.name}: difference of final losses", difference, "%", goal))
    return figures


def _real_figures(
    comparison: Comparison, records: Mapping[str, Sequence[TrainingRecord]], losses: Mapping[str, HeldOutLoss]
) -> list[Measurement]:
    """Peak memory and held-out loss beside those of each other trainer."""
    ours, *others = records
    figures: list[Measurement] = []
    for name in others:
        memory = median([mine.peak_rss_mb / theirs.peak_rss_mb for mine, theirs in zip(records[ours], records[name], strict=True)])
        figures.append(Measurement(NAME, f"{comparison.name}: share of the peak memory of {name}", memory, "×", at_most(1)))
        for label, mine, theirs in (
            ("held-out loss", losses[ours].all_tokens, losses[name].all_tokens),
            ("held-out loss without ends of turn", losses[ours].content, losses[name].content),
        ):
            is_same_length = {run.steps for run in records[ours]} == {run.steps for run in records[name]}
            goal = at_most(MAX_LOSS_DIFFERENCE) if is_same_length else None
            figures.append(Measurement(NAME, f"{comparison.name}: {label} above {name}", mine - theirs, "nats", goal))
    return figures


def _tokens_per_second(run: TrainingRecord) -> float:
    return run.tokens / run.seconds


def main() -> int:
    """Run chosen comparisons, or one on the real base. Returns 1 if a goal was missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", metavar="COMPARISON", help=", ".join(comparison.name for comparison in COMPARISONS))
    parser.add_argument("--real", action="store_true", help="train the real Gemma 3 270M on questions and answers about Python")
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", help="with --real: JSONL rows of your own (messages, or prompt and completion)"
    )
    parser.add_argument("--max-length", type=int, default=288, help="with --real: tokens per block, and of the longest row; default: 288")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--no-peers", action="store_true", help="skip LLaMA-Factory")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if unknown := set(args.names) - {comparison.name for comparison in COMPARISONS}:
        parser.error(f"no comparison {', '.join(sorted(unknown))}")
    if args.rows and not args.real:
        parser.error("--rows needs --real")
    comparisons = [comparison for comparison in COMPARISONS if not args.names or comparison.name in args.names]
    size = SMALL_SIZE
    if args.real:
        command = [REAL_TRAINER, "infra/gemma_270m.py", "--cache-only"]
        base = Path(subprocess.run(command, cwd=SOURCE, check=True, capture_output=True, text=True).stdout.split()[-1])
        # 288 tokens are about eight of these rows.
        size = TrainingSize(
            base, rows=96, learning_rate=2e-4, logging_steps=1, max_length=args.max_length, rows_file=args.rows and args.rows.resolve()
        )
        comparisons = [replace(comparison, goals=REAL_GOALS) for comparison in (comparisons if args.names else COMPARISONS[:1])]
    with tempfile.TemporaryDirectory(prefix="bench-training-") as folder:
        figures = compare(BenchmarkContext(Path(folder), not args.no_peers), comparisons, size, args.rounds)
    print_table(figures)
    if args.json:
        write_json(figures, args.json)
    return 1 if any(figure.is_goal_met is False for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
