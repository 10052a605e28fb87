"""Compares the estimated memory of trainings with their measured peaks: `python -m bench.memory [--write PAGE] [NAME…]`.

Runs Tunesmith's own trainers in the trainer's environment, on the CPU: random weights in the shapes of several architectures, and the
real Gemma 3 270M where `--real` names its folder. The peak is that of all live tensors (bench/live_tensors.py) from the first step to
the last. The estimate is the one that the attempt reports as its decision `training_memory`. `--write` writes the table between the
page's markers. Exits with 1 if an estimate is off by more than TOLERANCE.
"""

import argparse
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.live_tensors import LiveTensors
from schema.events import DecisionMade, Event
from schema.types import Phase
from tests.jobs.conftest import WORDS, EventRecorder, load_trainer, make_context, make_spec
from tests.tiny_gemma import build_tiny_gemma

TOLERANCE = 0.15
STEPS = 2  # the second has an optimizer state during its forward pass
FIRST_MARK, LAST_MARK = "<!-- memory: begin -->", "<!-- memory: end -->"
REAL_BASE = "real/gemma-3-270m"

WIDTHS = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
OTHERS = {"num_hidden_layers": 4, "vocab_size": 16_384, "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 2}
OTHERS |= {"eos_token_id": 1, "tie_word_embeddings": True}
MIXTURE = {"num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
BASES: dict[str, dict[str, Any]] = {
    "gemma3_text": {"sliding_window": 512, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    "llama": {"intermediate_size": 896, "tie_word_embeddings": False},
    "qwen3": {},
    "phi3": {},
    "mistral": {"sliding_window": None, "num_hidden_layers": 6},
    "smollm3": {"num_hidden_layers": 6},
    "qwen3_moe": MIXTURE,
}
DATASET_TYPES = {"sft": "messages", "kto": "unpaired_preference", "grpo": "prompt"}  # the others take preference pairs


@dataclass(frozen=True)
class Case:
    """A training to measure."""

    base: str  # a key of BASES, or REAL_BASE
    trainer_type: str = "sft"
    method: str = "LoRA"
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    row_words: int = 300  # of the longest row; the shortest has a third

    def __str__(self) -> str:
        options = " ".join(f"{name}={value}" for name, value in self.hyperparameters.items())
        return f"{self.base} {self.trainer_type} {self.method} {options}".strip()


CASES = (
    Case("gemma3_text", hyperparameters={"batch_size": 8}),
    Case("gemma3_text", hyperparameters={"batch_size": 8, "lora_dropout": 0.05}),
    Case("gemma3_text", hyperparameters={"batch_size": 16, "gradient_checkpointing": True}),
    Case("gemma3_text", method="Full", hyperparameters={"batch_size": 8}),
    Case("gemma3_text", "dpo", hyperparameters={"batch_size": 2}),
    Case("llama", hyperparameters={"batch_size": 8}),
    Case("llama", method="Full", hyperparameters={"batch_size": 4, "gradient_accumulation_steps": 2}),
    Case("llama", "orpo", hyperparameters={"batch_size": 2}),
    Case("qwen3", hyperparameters={"batch_size": 4, "packing": True}),
    Case("qwen3", method="QLoRA", hyperparameters={"batch_size": 8}),
    Case("qwen3", "kto", hyperparameters={"batch_size": 4}),
    Case("phi3", hyperparameters={"batch_size": 8, "lora_rank": 64}),
    Case("mistral", hyperparameters={"batch_size": 8, "lora_dropout": 0.1}),
    Case("mistral", "reward", hyperparameters={"batch_size": 4}),
    Case("smollm3", hyperparameters={"batch_size": 16, "gradient_checkpointing": True}),
    Case("qwen3_moe", hyperparameters={"batch_size": 8}),
    Case("qwen3", "grpo", hyperparameters={"batch_size": 8, "num_generations": 4, "max_completion_length": 64}),
    Case(REAL_BASE, hyperparameters={"batch_size": 4}),
    Case(REAL_BASE, hyperparameters={"batch_size": 2, "packing": True, "lora_dropout": 0.05}),
    Case(REAL_BASE, hyperparameters={"batch_size": 8, "gradient_checkpointing": True}),
    Case(REAL_BASE, "dpo", hyperparameters={"batch_size": 1}),
    Case(REAL_BASE, method="Full", hyperparameters={"batch_size": 1}),
)


@dataclass(frozen=True)
class Outcome:
    """The measured and the estimated peak of a case, in bytes."""

    measured: int
    estimated: float
    explanation: str

    @property
    def error(self) -> float:
        """How much the estimate is too high, relative to the measurement."""
        return self.estimated / self.measured - 1


class LiveTensorsRecorder(EventRecorder):
    """An event sink that counts live tensors while the attempt trains."""

    def __init__(self) -> None:
        super().__init__()
        self.live_tensors = LiveTensors()
        self._is_counting = False

    def report(self, event: Event) -> None:
        """Keep the event."""
        self.events.append(event)

    def set_progress(self, *, phase: Phase | None = None, **_: Any) -> None:
        """Start counting with the training, and stop with the phase after it."""
        if phase is not None and (phase == "training") != self._is_counting:
            self.stop() if self._is_counting else self._start()

    def stop(self) -> None:
        """Stop counting."""
        if self._is_counting:
            self._is_counting = False
            self.live_tensors.__exit__(None, None, None)

    def _start(self) -> None:
        self._is_counting = True
        self.live_tensors.__enter__()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the cases and print or write the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description="Compares estimated with measured memory.")
    parser.add_argument(
        "--real", type=Path, metavar="FOLDER", help="the folder of the real Gemma 3 270M; without it, its cases are left out"
    )
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the table between the page's markers")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only cases whose description contains one of these")
    options = parser.parse_args(arguments)
    cases = [case for case in CASES if (not options.names or any(name in str(case) for name in options.names))]
    outcomes: dict[Case | str, Outcome] = {}
    for case in cases:
        if case.base == REAL_BASE and options.real is None:
            continue
        with tempfile.TemporaryDirectory(prefix="bench-memory-") as folder:
            outcomes[str(case)] = outcome = run_case(case, Path(folder), options.real)
        print(f"{case}: measured {outcome.measured / 1e6:.0f} MB, estimated {outcome.estimated / 1e6:.0f} MB, {outcome.error:+.1%}")
        print(f"    {outcome.explanation}", flush=True)
    if options.write:
        before, _, rest = options.write.read_text().partition(FIRST_MARK)
        _, _, after = rest.partition(LAST_MARK)
        options.write.write_text(f"{before}{FIRST_MARK}\n{render_table(outcomes)}\n{LAST_MARK}{after}")
    return 1 if any(abs(outcome.error) > TOLERANCE for outcome in outcomes.values()) else 0


def render_table(outcomes: dict[Any, Outcome]) -> str:
    """The outcomes as a Markdown table."""
    lines = ["| training | measured | estimated | error |", "|---|---|---|---|"]
    for case, outcome in outcomes.items():
        lines.append(f"| {case} | {outcome.measured / 1e6:,.0f} MB | {outcome.estimated / 1e6:,.0f} MB | {outcome.error:+.0%} |")
    return "\n".join(lines)


def run_case(case: Case, folder: Path, real_base: Path | None = None) -> Outcome:
    """Train the case and compare."""
    store = folder / "objects"
    build_base(case.base, store / "pretrained_weights/huggingface" / case.base, real_base)
    hyperparameters = {"max_steps": STEPS, "max_seq_length": 2048, "gradient_checkpointing": False, "lora_rank": 16, "lora_dropout": 0.0}
    if case.method == "Full":
        hyperparameters = {name: value for name, value in hyperparameters.items() if not name.startswith("lora")}
    dataset_type, rows = make_rows(case)
    grader = {"type": "string_check", "name": "says_it", "operation": "ilike", "reference_field": "answer"}
    extra = {"reward_config": [grader], "columns": ("answer",)} if case.trainer_type == "grpo" else {}
    spec = make_spec(
        store,
        train=rows,
        held_out=[],
        dataset_type=dataset_type,
        base_model_id=case.base,
        trainer_type=case.trainer_type,
        method=case.method,
        hyperparameters=hyperparameters | case.hyperparameters,
        **extra,
    )
    recorder = LiveTensorsRecorder()
    context = make_context(spec, folder / "work", recorder)
    try:
        load_trainer(spec)(spec.training_config, context)
    finally:
        recorder.stop()
        context.checkpoints.wait_until_uploaded()
        context.checkpoints.close()
    (decision,) = [event for event in recorder.events if isinstance(event, DecisionMade) and event.setting == "training_memory"]
    estimated = float(decision.value.removesuffix(" MB")) * 1e6
    return Outcome(recorder.live_tensors.peak_bytes, estimated, decision.reason)


def build_base(name: str, folder: Path, real_base: Path | None) -> None:
    """Write a base of that architecture with random weights and the tokenizer of the tiny Gemma, or copy the real base."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if name == REAL_BASE and real_base is not None:
        shutil.copytree(real_base, folder)
        return
    build_tiny_gemma(folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(7)
    config = AutoConfig.for_model(name, **WIDTHS | OTHERS | BASES[name])
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def make_rows(case: Case) -> tuple[str, list[dict[str, Any]]]:
    """The dataset type and rows of a case: conversations of different lengths, three quarters of them answer."""
    generator = random.Random(42)

    def say(role: str, words: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(generator.choices(WORDS, k=words))}

    rows: list[dict[str, Any]] = []
    for number in range(2 * STEPS * case.hyperparameters["batch_size"] * case.hyperparameters.get("gradient_accumulation_steps", 1)):
        words = case.row_words if number % 4 == 0 else generator.randrange(case.row_words // 3, case.row_words)
        prompt, answer = [say("user", words // 4)], [say("assistant", words - words // 4)]
        match case.trainer_type:
            case "sft":
                rows.append({"messages": prompt + answer})
            case "grpo":
                rows.append({"prompt": prompt, "answer": answer[0]["content"]})
            case "kto":
                rows.append({"prompt": prompt, "completion": answer, "label": number % 2 == 0})
            case _:
                rows.append({"prompt": prompt, "chosen": answer, "rejected": [say("assistant", words // 2)]})
    return DATASET_TYPES.get(case.trainer_type, "preference"), rows


if __name__ == "__main__":
    sys.exit(main())
