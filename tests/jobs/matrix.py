"""Train, resume and export every trainer type with every method and modality on a tiny model, and every architecture.

`python -m tests.jobs.matrix --write docs/training.md` runs every combination and every architecture (`architectures.py`), and writes the
two tables between the page's markers. With `--real`, text trains on the real Gemma 3 270M, and architectures are left out.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.llm.exporters import export_all
from jobs.llm.trained_model import TrainedModel
from schema.job import Artifact
from schema.spec import JobSpec
from schema.training import TRAINER_TYPES
from tests.jobs.architectures import ArchitectureOutcome, render_architectures, run_architecture
from tests.jobs.conftest import BASE, WORDS, EventRecorder, load_trainer, load_weights, make_context, make_spec, messages
from tests.tiny_models import ARCHITECTURES

STEPS, PAUSE_AT_STEP = 4, 2
QUANTIZATIONS = ("f16", "q8_0")
VISION_BASE = "tiny/gemma-vision"
REAL_BASE = "google/gemma-3-270m"
FIRST_MARK, LAST_MARK = "<!-- matrix: begin -->", "<!-- matrix: end -->"
ARCHITECTURE_MARKS = "<!-- architectures: begin -->", "<!-- architectures: end -->"


@dataclass(frozen=True)
class Cell:
    """One combination of trainer type, method and modality."""

    trainer_type: str
    method: str
    modality: str

    def __str__(self) -> str:
        return f"{self.trainer_type}-{self.method}-{self.modality}"


@dataclass(frozen=True)
class Outcome:
    """The result of one combination."""

    gradient_norm: float  # the smallest of all steps
    weights_changed: bool  # the published weights differ from the base
    resumes_exactly: bool  # pausing and resuming gave the same weights bit for bit
    metrics_match: bool  # and the same logged metrics
    artifacts: dict[str, Artifact]

    def describe_fidelity(self, name: str) -> str:
        """How close an artifact is to the trained model, as text for the table."""
        if name not in self.artifacts:
            return "–"
        fidelity = self.artifacts[name].fidelity
        return "exported" if fidelity is None else f"{fidelity['argmax_agreement']:.0%}, KL {fidelity['mean_kl_to_merged']:.0e}"


def all_cells() -> list[Cell]:
    """All combinations that a request may have."""
    return [
        Cell(name, method, modality)
        for name, config in TRAINER_TYPES.items()
        for modality in config.modalities
        for method in config.learning_rates
    ]


def run_cell(
    cell: Cell, store: Path, workdir: Path, base: str | None = None, quantizations: Sequence[str] = QUANTIZATIONS, *, export: bool = True
) -> Outcome:
    """Train without and with an interruption, compare them, and export the model if `export` is true."""
    from tests.jobs.test_continuation import TrainingRun

    spec = make_cell_spec(cell, store, base, quantizations if export else ())
    record = EventRecorder()
    context = make_context(spec, workdir / "uninterrupted", record)
    model: TrainedModel = load_trainer(spec)(spec.training_config, context)
    interrupted = TrainingRun(make_cell_spec(cell, store, base, ()), workdir / "interrupted")
    assert interrupted.run_attempt(stop_after=PAUSE_AT_STEP) == "pause"
    resumed = interrupted.finish()
    artifacts = {artifact.name: artifact for artifact in export_all(model, context)} if export else {}
    context.checkpoints.wait_until_uploaded()
    context.checkpoints.close()
    return Outcome(
        gradient_norm=min(point.values["grad_norm"] or 0.0 for point in record.points),
        weights_changed=_has_changed_weights(model),
        resumes_exactly=_are_weights_equal(load_weights(model.folder), load_weights(resumed.folder)),
        metrics_match=_curve(record) == _curve(*interrupted.recorders),
        artifacts=artifacts,
    )


def make_cell_spec(cell: Cell, store: Path, base: str | None, quantizations: Sequence[str]) -> JobSpec:
    """A small job of the combination, on `base` or the tiny base of its modality; without GGUF files if there are no quantizations."""
    generates_text = cell.trainer_type != "reward"
    dataset_type, train, held_out = make_cell_rows(cell)
    config: dict[str, Any] = {"trainer_type": cell.trainer_type, "method": cell.method, "modality": cell.modality}
    config["base_model_id"] = base or (VISION_BASE if cell.modality == "vision" else BASE)
    config["export_config"] = {"format": ["merged"] if cell.method == "Full" else ["adapter", "merged"]}
    config["export_config"] |= {"include_gguf": True, "gguf_quantization": list(quantizations)} if generates_text and quantizations else {}
    hyperparameters: dict[str, Any] = {"max_steps": STEPS, "batch_size": 4, "learning_rate": 1e-3, "max_seq_length": 512}
    if cell.trainer_type == "grpo":
        grader = {"type": "string_check", "name": "says_it", "operation": "ilike", "reference_field": "answer"}
        config["reward_config"] = [
            grader,
            {"type": "python", "name": "length", "source": "def grade(completion, row):\n    return len(completion) / 100\n"},
        ]
        hyperparameters |= {"num_generations": 4, "max_completion_length": 8}
    columns = ("answer",) if cell.trainer_type == "grpo" else ()
    return make_spec(
        store, train=train, held_out=held_out, dataset_type=dataset_type, columns=columns, hyperparameters=hyperparameters, **config
    )


def make_cell_rows(cell: Cell) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
    """The dataset type, training rows and held-out rows of a combination."""
    if cell.modality == "vision":
        from tests.jobs.test_vision import make_square_rows

        return "messages", make_square_rows(16), make_square_rows(4, first=100)
    conversations = messages(16), messages(4, first=100)
    match cell.trainer_type:
        case "sft":
            return "messages", *conversations
        case "kto":
            return "unpaired_preference", *[[_to_unpaired_preference(row, n) for n, row in enumerate(rows)] for rows in conversations]
        case "grpo":
            return "prompt", *[[_to_prompt(row) for row in rows] for rows in conversations]
        case _:
            return "preference", *[[_to_preference(row, n) for n, row in enumerate(rows)] for rows in conversations]


def _to_preference(row: dict[str, Any], n: int) -> dict[str, Any]:
    *prompt, answer = row["messages"]
    return {"prompt": prompt, "chosen": [answer], "rejected": [{"role": "assistant", "content": f"no {WORDS[n % 13]}"}]}


def _to_unpaired_preference(row: dict[str, Any], n: int) -> dict[str, Any]:
    pair = _to_preference(row, n)
    return {"prompt": pair["prompt"], "completion": pair["chosen" if n % 2 else "rejected"], "label": bool(n % 2)}


def _to_prompt(row: dict[str, Any]) -> dict[str, Any]:
    *prompt, answer = row["messages"]
    return {"prompt": prompt, "answer": answer["content"].split()[-1]}


def _are_weights_equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(bool((tensor == other[name]).all()) for name, tensor in one.items())


def _has_changed_weights(model: TrainedModel) -> bool:
    trained = load_weights(model.folder)
    if model.is_adapter:
        return any(bool(tensor.abs().max() > 0) for name, tensor in trained.items() if "lora_B" in name)
    base = load_weights(model.base_folder)
    return any(bool((tensor.float() != base[name].float()).any()) for name, tensor in trained.items() if name in base)


def _curve(*records: EventRecorder) -> dict[int, dict[str, float | None]]:
    """All logged metrics by step, without speed and system metrics."""
    excluded = ("per_second", "_bytes", "percent", "gpu", "_s")
    return {
        point.step: {name: value for name, value in point.values.items() if not name.endswith(excluded) and "time" not in name}
        for record in records
        for point in record.points
    }


def render_table(outcomes: dict[Cell, Outcome]) -> str:
    """The outcomes as a Markdown table."""
    lines = [
        "| trainer type | method | modality | trained | resumed exactly | adapter | merged | GGUF f16 | GGUF q8_0 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell, outcome in outcomes.items():
        trained = "yes" if outcome.weights_changed and outcome.gradient_norm > 0 else "no"
        exact = "yes" if outcome.resumes_exactly and outcome.metrics_match else "no"
        fidelities = [outcome.describe_fidelity(name) for name in ("adapter", "merged", "gguf-f16", "gguf-q8_0")]
        lines.append(" | ".join([f"| `{cell.trainer_type}`", cell.method, cell.modality, trained, exact, *fidelities]) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all combinations and architectures, and write their tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.jobs.matrix")
    parser.add_argument("--write", type=Path, help="the page to write the table into")
    parser.add_argument("--real", action="store_true", help="train text on the real Gemma 3 270M: takes most of an hour")
    parser.add_argument("names", nargs="*", help="run only these combinations and architectures, such as dpo-LoRA-text or qwen3_moe")
    options = parser.parse_args(arguments)
    selected = [
        cell
        for cell in all_cells()
        if (not options.names or str(cell) in options.names) and not (options.real and cell.modality == "vision")
    ]
    outcomes: dict[Cell, Outcome] = {}
    for cell in selected:
        with tempfile.TemporaryDirectory() as folder:  # one at a time: the checkpoints of the real model take gigabytes
            store = fetch_real_base(Path(folder) / "objects") if options.real else build_tiny_bases(Path(folder) / "objects")
            outcomes[cell] = run_cell(cell, store, Path(folder) / str(cell), REAL_BASE if options.real else None)
        print(render_table({cell: outcomes[cell]}).splitlines()[-1], flush=True)
    architectures: dict[str, ArchitectureOutcome] = {}
    for name in ARCHITECTURES:
        if options.real or (options.names and name not in options.names):
            continue
        with tempfile.TemporaryDirectory() as folder:
            architectures[name] = run_architecture(name, Path(folder) / "objects", Path(folder) / name)
        print(render_architectures({name: architectures[name]}).splitlines()[-1], flush=True)
    if options.write and outcomes:
        write_table(options.write, (FIRST_MARK, LAST_MARK), render_table(outcomes))
    if options.write and architectures:
        write_table(options.write, ARCHITECTURE_MARKS, render_architectures(architectures))
    cells_pass = all(outcome.weights_changed and outcome.resumes_exactly and outcome.metrics_match for outcome in outcomes.values())
    return 0 if cells_pass and all(outcome.passes for outcome in architectures.values()) else 1


def write_table(page: Path, marks: tuple[str, str], table: str) -> None:
    """Replace what stands between two marks of a page."""
    before, _, rest = page.read_text().partition(marks[0])
    _, _, after = rest.partition(marks[1])
    page.write_text(f"{before}{marks[0]}\n{table}\n{marks[1]}{after}")


def fetch_real_base(store: Path) -> Path:
    """Put the real Gemma 3 270M into an object store."""
    subprocess.run([sys.executable, "infra/gemma_270m.py", "--store", f"file://{store}"], check=True, stdout=subprocess.DEVNULL)
    return store


def build_tiny_bases(store: Path) -> Path:
    """Put the tiny text and vision bases into an object store."""
    from tests.tiny_gemma import build_tiny_gemma
    from tests.tiny_gemma_vision import build_tiny_gemma_vision

    build_tiny_gemma(store / "pretrained_weights/huggingface" / BASE)
    build_tiny_gemma_vision(store / "pretrained_weights/huggingface" / VISION_BASE)
    return store


if __name__ == "__main__":
    sys.exit(main())
