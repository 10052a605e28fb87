"""Speed of LoRA training on this machine's GPU, and its share of the peak: `python -m bench.gpu_training [1b] [4b]`.

Runs in the trainer's environment, on a machine with an NVIDIA GPU; elsewhere it exits with a message. The bases have the shapes of
Gemma 3 1B and 4B and random weights. Rows are packed into 4,096 tokens, and nearly all tokens are labeled, so that skipping unlabeled
positions saves nothing. TRL is measured too, with its defaults and with our flags, and Unsloth if its Python is given.

The share of the peak counts 4 N operations per token, where N is the number of weights in matrix multiplications, including the head:
2 N in the forward pass and 2 N in the backward pass, because the weights are frozen. Recomputation to save memory is not counted.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from bench.figures import Measurement, at_least, median, print_table, write_json
from bench.peers_training.plan import TrainingPlan, TrainingRecord
from bench.peers_training.rows import SHAPES

NAME = "gpu training"
SOURCE = Path(__file__).resolve().parent.parent
SEQUENCE_LENGTH = 4096
MEAN_TOKENS = 60  # per row, approximately
STEPS = 24
WARMUP_STEPS = 4  # not measured: kernels are selected and memory is allocated
ROUNDS = 3
# Dense bf16 operations per second, by a part of CUDA's name for the GPU; from NVIDIA's data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
GOAL_MFU_PERCENT = {"H200": 35, "H100": 35}


def main() -> int:
    """Measure and print. Returns 1 if a goal was missed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_training", description="Measures LoRA training on this machine's GPU.")
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help="1b or 4b; default: both")
    parser.add_argument("--batch", type=int, default=2, help=f"blocks of {SEQUENCE_LENGTH} tokens per step")
    parser.add_argument("--unsloth", type=Path, metavar="PYTHON", help="a Python with Unsloth; default: this one, if Unsloth is installed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements as JSON")
    args = parser.parse_args()
    if unknown := set(args.sizes) - {"1b", "4b"}:
        parser.error(f"no size {', '.join(sorted(unknown))}; known: 1b, 4b")
    gpu = get_gpu_name()
    if gpu is None:
        print("torch finds no GPU on this machine; `python -m bench training` measures without one", file=sys.stderr)
        return 2
    unsloth = args.unsloth or (Path(sys.executable) if find_spec("unsloth") else None)
    figures: list[Measurement] = []
    for size in args.sizes or ("1b", "4b"):
        with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
            figures += measure(size, gpu, args.batch, Path(folder), unsloth)
        print_table(figures)
    if args.json:
        write_json(figures, args.json)
    return 1 if any(figure.is_goal_met is False for figure in figures) else 0


def get_gpu_name() -> str | None:
    """CUDA's name for the GPU; None without one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def measure(size: str, gpu: str, batch: int, folder: Path, unsloth: Path | None) -> list[Measurement]:
    """Train with each trainer in turn, for several rounds, on a base of this size."""
    rows = STEPS * batch * SEQUENCE_LENGTH // MEAN_TOKENS
    _run_trainer(Path(sys.executable), "rows", folder, "--shape", size, "--rows", str(rows), "--label-share", "1.0")
    records: dict[str, list[TrainingRecord]] = {}
    for number in range(ROUNDS):
        for name, (python, script, plan) in _make_trainer_plans(folder, batch, unsloth).items():
            round_plan = replace(plan, output_folder=f"{plan.output_folder}-{number}")
            path = Path(round_plan.output_folder + ".json")
            round_plan.write(path)
            _run_trainer(python, script, path)
            records.setdefault(name, []).append(TrainingRecord.read(Path(round_plan.output_folder + ".record.json")))
    for name, runs in records.items():
        if any(not run.grad_norms or min(run.grad_norms) <= 0 or run.losses[-1] >= run.losses[0] for run in runs):
            raise SystemExit(f"{name} learned nothing: {[(run.losses, run.grad_norms) for run in runs]}")
    return _figures(size, gpu, records, count_matmul_parameters(size))


def count_matmul_parameters(size: str) -> int:
    """The number of weights in matrix multiplications: all linear layers, including the head."""
    shape = SHAPES[size]
    width, heads = shape["hidden_size"], shape["head_dim"]
    attention = width * heads * (2 * shape["num_attention_heads"] + 2 * shape["num_key_value_heads"])
    return shape["num_hidden_layers"] * (attention + 3 * width * shape["intermediate_size"]) + width * shape["vocab_size"]


def tokens_per_second(run: TrainingRecord) -> float:
    """Real tokens per second after the warmup steps."""
    steps = run.steps - WARMUP_STEPS
    return run.tokens * steps / run.steps / (run.step_ends_s[-1] - run.step_ends_s[WARMUP_STEPS - 1])


def _make_trainer_plans(folder: Path, batch: int, unsloth: Path | None) -> dict[str, tuple[Path, str, TrainingPlan]]:
    """By trainer: its Python, its script and its plan. Tunesmith comes first."""
    ours = TrainingPlan(
        base=str(folder / "base"),
        rows_path=str(folder / "train.jsonl"),
        output_folder=str(folder / "tunesmith"),
        packing=True,
        batch_size=batch,
        gradient_accumulation_steps=1,
        learning_rate=1e-3,
        max_length=SEQUENCE_LENGTH,
        on_gpu=True,
        use_fa2=find_spec("flash_attn") is not None,
    )
    python = Path(sys.executable)
    plans = {
        "Tunesmith": (python, "tunesmith", ours),
        "TRL, its defaults": (python, "trl_trainer", replace(ours, output_folder=str(folder / "trl-defaults"), flags="defaults")),
        "TRL, our flags": (python, "trl_trainer", replace(ours, output_folder=str(folder / "trl"))),
    }
    return plans | ({"Unsloth": (unsloth, "unsloth_trainer", replace(ours, output_folder=str(folder / "unsloth")))} if unsloth else {})


def _run_trainer(python: Path, script: str, *arguments: str | Path) -> None:
    """Run a script of bench/peers_training. Raises SystemExit with the end of its stderr."""
    done = subprocess.run(
        [python, "-m", f"bench.peers_training.{script}", *arguments], cwd=SOURCE, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{script} failed: {' / '.join(done.stderr.strip().splitlines()[-3:])}")


def _figures(size: str, gpu: str, records: Mapping[str, Sequence[TrainingRecord]], weights: int) -> list[Measurement]:
    kind = next((kind for kind in PEAK_FLOPS if kind in gpu), None)
    figures: list[Measurement] = []
    for name, runs in records.items():
        tokens_per_s = median([tokens_per_second(run) for run in runs])
        memory = f"{median([run.peak_gpu_mb or 0 for run in runs]):,.0f} MB peak GPU memory"
        figures.append(Measurement(NAME, f"{size}, {name}", tokens_per_s, "tokens/s", note=f"{gpu}, {memory}"))
        if kind is not None:
            goal = at_least(GOAL_MFU_PERCENT[kind]) if name == "Tunesmith" and kind in GOAL_MFU_PERCENT else None
            share = 100 * tokens_per_s * 4 * weights / PEAK_FLOPS[kind]
            figures.append(
                Measurement(NAME, f"{size}, {name}: share of the peak", share, "%", goal, f"4 × {weights / 1e9:.2f}e9 operations per token")
            )
    goals = {"TRL, its defaults": 2.0, "Unsloth": 0.95}
    for name, runs in records.items():
        if name != "Tunesmith":
            ratio = median(
                [tokens_per_second(mine) / tokens_per_second(theirs) for mine, theirs in zip(records["Tunesmith"], runs, strict=True)]
            )
            goal = at_least(goals[name]) if name in goals else None
            figures.append(Measurement(NAME, f"{size}: times as fast as {name}", ratio, "×", goal))
    return figures


if __name__ == "__main__":
    sys.exit(main())
