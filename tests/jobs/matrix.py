"""Every trainer type with every method and modality, on a tiny model: trained, resumed exactly, exported, faithful.

`python -m tests.jobs.matrix --write docs/training.md` runs all of it and writes the table between the page's marks; with `--real` the base
is the real Gemma 3 270M, for text.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.exporters import export_all
from jobs.trained import TrainedModel
from schema.job import Artifact
from schema.spec import JobSpec
from schema.training import TRAINER_TYPES
from tests.jobs.conftest import BASE, WORDS, Record, a_context, a_spec, messages, trainer_of

STEPS, PAUSED_AT = 4, 2
QUANTIZATIONS = ("f16", "q8_0")
VISION_BASE = "tiny/gemma-vision"
REAL_BASE = "google/gemma-3-270m"
FIRST_MARK, LAST_MARK = "<!-- matrix: begin -->", "<!-- matrix: end -->"


@dataclass(frozen=True)
class Cell:
    """One combination."""

    trainer_type: str
    method: str
    modality: str

    def __str__(self) -> str:
        return f"{self.trainer_type}-{self.method}-{self.modality}"


@dataclass(frozen=True)
class Outcome:
    """What came of a combination."""

    gradient_norm: float  # the smallest of all steps
    moved: bool  # the weights that were published are not the base's
    is_exact: bool  # paused and resumed, the same bits came out
    points_are_exact: bool  # and the same curves
    artifacts: dict[str, Artifact]

    def fidelity(self, name: str) -> str:
        """How near an artifact is to the model that was trained, for the table."""
        if name not in self.artifacts:
            return "–"
        found = self.artifacts[name].fidelity
        return "exported" if found is None else f"{found.argmax_agreement:.0%}, KL {found.mean_kl_to_merged:.0e}"


def cells() -> list[Cell]:
    """All combinations that a request can ask for."""
    return [
        Cell(name, method, modality)
        for name, config in TRAINER_TYPES.items()
        for modality in config.modalities
        for method in config.learning_rates
    ]


def run(cell: Cell, store: Path, workdir: Path, base: str | None = None, quantizations: Sequence[str] = QUANTIZATIONS) -> Outcome:
    """Train without and with an interruption, compare, and export."""
    from tests.jobs.test_continuation import Story

    spec = spec_of(cell, store, base, quantizations)
    record = Record()
    context = a_context(spec, workdir / "straight", record)
    model: TrainedModel = trainer_of(spec)(spec.training_config, context)
    story = Story(spec_of(cell, store, base, quantizations), workdir / "interrupted")
    assert story.attempt(stop_after=PAUSED_AT) == "pause"
    resumed = story.finish()
    artifacts = {artifact.name: artifact for artifact in export_all(model, context)}
    context.checkpoints.settle()
    context.checkpoints.close()
    return Outcome(
        gradient_norm=min(point.values["grad_norm"] or 0.0 for point in record.points),
        moved=_moved(model),
        is_exact=_same(_weights(model.folder), _weights(resumed.folder)),
        points_are_exact=_curve(record) == _curve(*story.heard),
        artifacts=artifacts,
    )


def spec_of(cell: Cell, store: Path, base: str | None, quantizations: Sequence[str]) -> JobSpec:
    """A small job of that combination, on the tiny base of its modality unless one is named."""
    speaks = cell.trainer_type != "reward"
    form, train, held_out = rows_of(cell)
    config: dict[str, Any] = {"trainer_type": cell.trainer_type, "method": cell.method, "modality": cell.modality}
    config["base_model_id"] = base or (VISION_BASE if cell.modality == "vision" else BASE)
    config["export_config"] = {"format": ["merged"] if cell.method == "Full" else ["adapter", "merged"]}
    config["export_config"] |= {"include_gguf": True, "gguf_quantization": list(quantizations)} if speaks else {}
    knobs: dict[str, Any] = {"max_steps": STEPS, "batch_size": 4, "learning_rate": 1e-3, "max_seq_length": 512}
    if cell.trainer_type == "grpo":
        grader = {"type": "string_check", "name": "says_it", "operation": "ilike", "reference_field": "answer"}
        config["reward_config"] = [
            grader,
            {"type": "python", "name": "length", "source": "def grade(completion, row):\n    return len(completion) / 100\n"},
        ]
        knobs |= {"num_generations": 4, "max_completion_length": 8}
    columns = ("answer",) if cell.trainer_type == "grpo" else ()
    return a_spec(store, train=train, held_out=held_out, dataset_type=form, columns=columns, hyperparameters=knobs, **config)


def rows_of(cell: Cell) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
    """The form of the rows that a trainer type learns from, rows to learn and rows held out."""
    if cell.modality == "vision":
        from tests.jobs.test_vision import squares

        return "messages", squares(16), squares(4, first=100)
    talks = messages(16), messages(4, first=100)
    match cell.trainer_type:
        case "sft":
            return "messages", *talks
        case "kto":
            return "unpaired_preference", *[[_judged(row, n) for n, row in enumerate(rows)] for rows in talks]
        case "grpo":
            return "prompt", *[[_asked(row) for row in rows] for rows in talks]
        case _:
            return "preference", *[[_pair(row, n) for n, row in enumerate(rows)] for rows in talks]


def _pair(row: dict[str, Any], n: int) -> dict[str, Any]:
    *prompt, answer = row["messages"]
    return {"prompt": prompt, "chosen": [answer], "rejected": [{"role": "assistant", "content": f"no {WORDS[n % 13]}"}]}


def _judged(row: dict[str, Any], n: int) -> dict[str, Any]:
    pair = _pair(row, n)
    return {"prompt": pair["prompt"], "completion": pair["chosen" if n % 2 else "rejected"], "label": bool(n % 2)}


def _asked(row: dict[str, Any]) -> dict[str, Any]:
    *prompt, answer = row["messages"]
    return {"prompt": prompt, "answer": answer["content"].split()[-1]}


def _weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: part for path in sorted(folder.glob("*.safetensors")) for name, part in load_file(path).items()}


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(bool((part == other[name]).all()) for name, part in one.items())


def _moved(model: TrainedModel) -> bool:
    trained = _weights(model.folder)
    if model.is_adapter:
        return any(bool(part.abs().max() > 0) for name, part in trained.items() if "lora_B" in name)
    base = _weights(model.base_folder)
    return any(bool((part.float() != base[name].float()).any()) for name, part in trained.items() if name in base)


def _curve(*records: Record) -> dict[int, dict[str, float | None]]:
    """All that was drawn, but how fast it went and what the machine was doing."""
    left_out = ("per_second", "_bytes", "percent", "gpu", "_s")
    return {
        point.step: {name: value for name, value in point.values.items() if not name.endswith(left_out) and "time" not in name}
        for record in records
        for point in record.points
    }


def table(outcomes: dict[Cell, Outcome]) -> str:
    """The outcomes in Markdown."""
    lines = [
        "| trainer type | method | modality | trained | resumed exactly | adapter | merged | GGUF f16 | GGUF q8_0 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell, found in outcomes.items():
        trained = "yes" if found.moved and found.gradient_norm > 0 else "no"
        exact = "yes" if found.is_exact and found.points_are_exact else "no"
        shown = [found.fidelity(name) for name in ("adapter", "merged", "gguf-f16", "gguf-q8_0")]
        lines.append(" | ".join([f"| `{cell.trainer_type}`", cell.method, cell.modality, trained, exact, *shown]) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all combinations and write the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.jobs.matrix")
    parser.add_argument("--write", type=Path, help="the page whose table is written anew")
    parser.add_argument(
        "--real", action="store_true", help="the real Gemma 3 270M in place of the tiny one, for text: the better part of an hour"
    )
    parser.add_argument("names", nargs="*", help="only these, such as dpo-LoRA-text")
    options = parser.parse_args(arguments)
    wanted = [
        cell for cell in cells() if (not options.names or str(cell) in options.names) and not (options.real and cell.modality == "vision")
    ]
    outcomes: dict[Cell, Outcome] = {}
    for cell in wanted:
        with tempfile.TemporaryDirectory() as folder:  # one at a time: a whole model's checkpoints are gigabytes
            store = real_base(Path(folder) / "objects") if options.real else build_bases(Path(folder) / "objects")
            outcomes[cell] = run(cell, store, Path(folder) / str(cell), REAL_BASE if options.real else None)
        print(table({cell: outcomes[cell]}).splitlines()[-1], flush=True)
    if options.write:
        page = options.write.read_text()
        before, _, rest = page.partition(FIRST_MARK)
        _, _, after = rest.partition(LAST_MARK)
        options.write.write_text(f"{before}{FIRST_MARK}\n{table(outcomes)}\n{LAST_MARK}{after}")
    return 0 if all(found.moved and found.is_exact and found.points_are_exact for found in outcomes.values()) else 1


def real_base(store: Path) -> Path:
    """An object store with the real Gemma 3 270M."""
    subprocess.run([sys.executable, "infra/gemma_270m.py", "--store", f"file://{store}"], check=True, stdout=subprocess.DEVNULL)
    return store


def build_bases(store: Path) -> Path:
    """An object store with both tiny bases."""
    from tests.tiny_gemma import build_tiny_gemma
    from tests.tiny_gemma_vision import build_tiny_gemma_vision

    build_tiny_gemma(store / "pretrained_weights/huggingface" / BASE)
    build_tiny_gemma_vision(store / "pretrained_weights/huggingface" / VISION_BASE)
    return store


if __name__ == "__main__":
    sys.exit(main())
