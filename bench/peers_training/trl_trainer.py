"""TRL's SFTTrainer, with its defaults or with the flags that Tunesmith chooses."""

from typing import Any

from bench.peers_training.plan import RANK, SEED, Stopwatch, TrainingPlan, TrainingRecord, make_trainer_callback, run_script

LORA_TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def train(plan: TrainingPlan) -> TrainingRecord:
    """One epoch over the rows, or `max_steps` steps."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    watch = Stopwatch()
    trainer = SFTTrainer(
        model=plan.base,
        args=SFTConfig(**common_arguments(plan), **(tunesmith_arguments(plan) if plan.flags == "tunesmith" else {})),
        train_dataset=load_dataset("json", data_files=plan.rows_path, split="train", cache_dir=plan.output_folder + "-cache"),
        processing_class=AutoTokenizer.from_pretrained(plan.base),
        peft_config=lora_config(),
        callbacks=[make_trainer_callback(watch)],
    )
    record_token_counts(trainer.train_dataset, watch)
    trainer.train()
    trainer.save_model(plan.output_folder)
    watch.record.adapter = plan.output_folder
    return watch.record


def record_token_counts(rows: Any, watch: Stopwatch) -> None:
    """Record the number of tokens and labels. The first token of a row is never labeled, because nothing predicts it."""
    watch.record.tokens = sum(len(ids) for ids in rows["input_ids"])
    watch.record.labels = sum(label != -100 for labels in rows["labels"] for label in labels)


def common_arguments(plan: TrainingPlan) -> dict[str, Any]:
    """The arguments that are the same for all trainers; the others keep the library's defaults."""
    return {
        "output_dir": plan.output_folder,
        "use_cpu": not plan.on_gpu,
        "num_train_epochs": 1,
        "max_steps": plan.max_steps,
        "learning_rate": plan.learning_rate,
        "logging_steps": plan.logging_steps,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": SEED,
    }


def tunesmith_arguments(plan: TrainingPlan) -> dict[str, Any]:
    """The arguments that Tunesmith chooses for the same rows on the same machine."""
    return {
        "packing": plan.packing,
        "packing_strategy": "bfd",
        "max_length": plan.max_length,
        "per_device_train_batch_size": plan.batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "gradient_checkpointing": False,
        "bf16": False,  # no autocast: the weights themselves are bf16
        "model_init_kwargs": {"dtype": "bfloat16", "attn_implementation": "flash_attention_2" if plan.use_fa2 else "sdpa"},
        "dataloader_pin_memory": plan.on_gpu,
    }


def lora_config() -> Any:
    """The adapter, the same for all trainers: on all linear layers except the head."""
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=LORA_TARGET_MODULES, task_type="CAUSAL_LM")


if __name__ == "__main__":
    run_script(train)
