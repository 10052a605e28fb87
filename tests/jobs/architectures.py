"""Train, resume and export one tiny model of every architecture: the second table of `matrix.py`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.llm.exporters import export_all
from jobs.llm.packing import find_packing_problem, measure_leak
from jobs.llm.trained_model import TrainedModel
from jobs.llm.training_context import load_tokenizer
from schema.job import Artifact
from schema.spec import JobSpec
from tests.jobs.conftest import WORDS, EventRecorder, load_trainer, load_weights, make_context, make_spec, messages
from tests.tiny_models import ARCHITECTURES, build_tiny_model

STEPS, PAUSE_AT_STEP = 4, 2
Row = dict[str, Any]
READ_TOOL = {
    "type": "function",
    "function": {
        "name": "read",
        "description": "Read a file.",
        "parameters": {"type": "object", "properties": {"path": {"type": "string", "description": "Its path."}}, "required": ["path"]},
    },
}


@dataclass(frozen=True)
class ArchitectureOutcome:
    """The result of one architecture."""

    conversations: tuple[str, ...]  # the kinds of row that its chat template can label
    attention: str
    adapted: str  # what the adapter trains: layers, and parameters of experts
    is_adapted_everywhere: bool  # every adapter matrix changed
    resumes_exactly: bool
    leak: float  # of packed rows, in standard deviations of the logits
    packing_problem: str | None
    artifacts: dict[str, Artifact]

    @property
    def passes(self) -> bool:
        """Every adapter was trained, resuming gave the same weights, the exports agree, and packed rows are separate or refused."""
        fidelities = [artifact.fidelity for artifact in self.artifacts.values() if artifact.fidelity is not None]
        is_faithful = all(fidelity["argmax_agreement"] == 1.0 for fidelity in fidelities)
        is_packing_decided = (self.leak > 1e-3) == (self.packing_problem is not None)
        return self.is_adapted_everywhere and self.resumes_exactly and is_faithful and is_packing_decided


def run_architecture(name: str, store: Path, workdir: Path, *, method: str = "LoRA", export: bool = True) -> ArchitectureOutcome:
    """Train without and with an interruption, compare them, and export the model if `export` is true."""
    from tests.jobs.test_continuation import TrainingRun

    base = put_tiny_model(name, store)
    conversations = list_conversations(base)
    record = EventRecorder()
    spec = make_architecture_spec(name, store, conversations, method)
    context = make_context(spec, workdir / "uninterrupted", record)
    model: TrainedModel = load_trainer(spec)(spec.training_config, context)
    interrupted = TrainingRun(make_architecture_spec(name, store, conversations, method), workdir / "interrupted")
    assert interrupted.run_attempt(stop_after=PAUSE_AT_STEP) == "pause"
    resumed = load_weights(interrupted.finish().folder)
    trained = load_weights(model.folder)
    artifacts = {artifact.name: artifact for artifact in export_all(model, context)} if export else {}
    leak, packing_problem = measure_packing(base)
    return ArchitectureOutcome(
        conversations=conversations,
        attention=record.decisions["attn_implementation"],
        adapted=", ".join(filter(None, (record.decisions.get("target_modules"), record.decisions.get("target_parameters")))),
        is_adapted_everywhere=all(bool(tensor.any()) for key, tensor in trained.items() if "lora_B" in key),
        resumes_exactly=trained.keys() == resumed.keys() and all(bool((trained[key] == resumed[key]).all()) for key in trained),
        leak=leak,
        packing_problem=packing_problem,
        artifacts=artifacts,
    )


def put_tiny_model(name: str, store: Path) -> Path:
    """Put the tiny model of an architecture into an object store."""
    return build_tiny_model(name, store / "pretrained_weights/huggingface" / f"tiny/{name}")


def make_architecture_spec(name: str, store: Path, conversations: Sequence[str], method: str = "LoRA", **hyperparameters: Any) -> JobSpec:
    """A small job on the tiny model of an architecture, with conversations of these kinds."""
    options: dict[str, Any] = {"max_steps": STEPS, "batch_size": 4, "learning_rate": 1e-3, "max_seq_length": 1024}
    options |= {"lora_dropout": 0} | hyperparameters
    export_config = {"format": ["merged"], "include_gguf": True, "gguf_quantization": ["f16"]}
    train, held_out = [[row for kind in conversations for row in make_rows(kind, count, first)] for count, first in ((6, 0), (2, 100))]
    return make_spec(
        store,
        train=train,
        held_out=held_out,
        base_model_id=f"tiny/{name}",
        method=method,
        export_config=export_config,
        hyperparameters=options,
    )


def make_rows(kind: str, count: int, first: int = 0) -> list[Row]:
    """Conversations of one, or of several turns, or with calls of a tool."""
    rows = messages(count, first)
    if kind == "single turn":
        return rows
    if kind == "multi-turn":
        return [{"messages": row["messages"] + follow_up["messages"]} for row, follow_up in zip(rows, reversed(rows), strict=True)]
    return [_add_tool_call(row, WORDS[n % len(WORDS)]) for n, row in enumerate(rows)]


def _add_tool_call(row: Row, path: str) -> Row:
    question, answer = row["messages"]
    call = {"id": "call00001", "type": "function", "function": {"name": "read", "arguments": {"path": path}}}
    asking = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "name": "read", "tool_call_id": "call00001", "content": f"{path} is a list"}
    return {"messages": [question, asking, result, answer], "tools": [READ_TOOL]}


def list_conversations(base: Path) -> tuple[str, ...]:
    """The kinds of conversation that the base's chat template renders."""
    from trl.chat_template_utils import supports_tool_calling

    kinds = ("single turn", "multi-turn")
    return (*kinds, "tools") if supports_tool_calling(load_tokenizer(base, base.name)) else kinds


def measure_packing(base: Path) -> tuple[float, str | None]:
    """The leak of packed rows, and the reason why the base may not pack; None if it may."""
    import json

    import torch
    from transformers import AutoModelForCausalLM

    leak = measure_leak(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval())
    return leak, find_packing_problem(json.loads((base / "config.json").read_text()))


def render_architectures(outcomes: dict[str, ArchitectureOutcome]) -> str:
    """The outcomes as a Markdown table."""
    columns = ("architecture", "conversations", "attention", "every adapter trained", "resumed exactly", "merged", "GGUF f16")
    columns += ("leak of packed rows", "packing")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, outcome in outcomes.items():
        yes = {True: "yes", False: "no"}
        cells = [
            ARCHITECTURES[name].title,
            ", ".join(outcome.conversations),
            outcome.attention,
            yes[outcome.is_adapted_everywhere],
            yes[outcome.resumes_exactly],
            *(_describe_fidelity(outcome.artifacts.get(artifact)) for artifact in ("merged", "gguf-f16")),
            f"{outcome.leak:.0e} σ",
            "refused" if outcome.packing_problem else "yes",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _describe_fidelity(artifact: Artifact | None) -> str:
    if artifact is None or artifact.fidelity is None:
        return "–"
    return f"{artifact.fidelity['argmax_agreement']:.0%}, KL {artifact.fidelity['mean_kl_to_merged']:.0e}"
