"""LLaMA-Factory, as its LoRA examples configure it: one row per batch, eight rows per step, gradient checkpointing, bf16."""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.peers_training.plan import RANK, SEED, Stopwatch, TrainingPlan, TrainingRecord, make_trainer_callback, run_script


def train(plan: TrainingPlan) -> TrainingRecord:
    """One epoch over the rows."""
    stub_torchaudio()
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    watch = Stopwatch()

    class TokenCountCallback(TrainerCallback):
        """Records the number of tokens and labels."""

        def on_train_begin(self, *_: Any, train_dataloader: Any, **__: Any) -> None:
            rows = train_dataloader.dataset
            # Packed rows are padded; the attention mask is 0 at padding and counts the packed rows from 1.
            lengths = (sum(map(bool, mask)) for mask in rows["attention_mask"])
            watch.record.tokens = sum(lengths)
            watch.record.labels = sum(label != -100 for labels in rows["labels"] for label in labels)

    write_rows(plan, Path(plan.output_folder))
    run_exp(make_arguments(plan), callbacks=[TokenCountCallback(), make_trainer_callback(watch)])
    watch.record.adapter = plan.output_folder
    return watch.record


def stub_torchaudio() -> None:
    """Replace torchaudio by an empty module if it cannot be loaded: LLaMA-Factory imports it, and not every torch has a build of it."""
    try:
        __import__("torchaudio")
    except (ImportError, OSError):
        sys.modules["torchaudio"] = empty = ModuleType("torchaudio")
        empty.__spec__ = ModuleSpec("torchaudio", None)


def write_rows(plan: TrainingPlan, folder: Path) -> None:
    """Write the rows into `folder` in the format of LLaMA-Factory."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in Path(plan.rows_path).read_text().splitlines()]
    (folder / "rows.json").write_text(json.dumps([{"messages": row["prompt"] + row["completion"]} for row in rows]))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    description = {"file_name": "rows.json", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": description}))


def make_arguments(plan: TrainingPlan) -> dict[str, Any]:
    """The arguments of its LoRA example; rank, learning rate and schedule are the same for all trainers."""
    packed = {"packing": True, "neat_packing": True, "cutoff_len": plan.max_length} if plan.packing else {"cutoff_len": 2048}
    return packed | {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": plan.base,
        "template": "gemma",  # gemma3's text format, without images
        "finetuning_type": "lora",
        "lora_target": "all",
        "lora_rank": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "dataset": "rows",
        "dataset_dir": plan.output_folder,
        "output_dir": plan.output_folder,
        "overwrite_output_dir": True,
        "per_device_train_batch_size": plan.batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "learning_rate": plan.learning_rate,
        "lr_scheduler_type": "linear",
        "num_train_epochs": 1.0,
        "logging_steps": plan.logging_steps,
        "save_strategy": "no",
        "bf16": True,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": SEED,
    }


if __name__ == "__main__":
    run_script(train)
