"""Unsloth, as in its notebooks: its model and gradient checkpointing, and TRL's trainer, which it patches. Needs an NVIDIA GPU."""

from bench.peers_training.plan import RANK, SEED, Stopwatch, TrainingPlan, TrainingRecord, make_trainer_callback, run_script
from bench.peers_training.trl_trainer import LORA_TARGET_MODULES, common_arguments, record_token_counts


def train(plan: TrainingPlan) -> TrainingRecord:
    """One epoch over the rows."""
    from unsloth import FastLanguageModel  # isort: skip  # before the libraries that it patches
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    watch = Stopwatch()
    model, tokenizer = FastLanguageModel.from_pretrained(plan.base, max_seq_length=plan.max_length, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=RANK,
        lora_dropout=0,
        bias="none",
        target_modules=LORA_TARGET_MODULES,
        use_gradient_checkpointing="unsloth",
        random_state=SEED,
    )
    flags = {"packing": plan.packing, "max_length": plan.max_length, "bf16": True}
    flags |= {"per_device_train_batch_size": plan.batch_size, "gradient_accumulation_steps": plan.gradient_accumulation_steps}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**common_arguments(plan), **flags),
        train_dataset=load_dataset("json", data_files=plan.rows_path, split="train", cache_dir=plan.output_folder + "-cache"),
        processing_class=tokenizer,
        callbacks=[make_trainer_callback(watch)],
    )
    record_token_counts(trainer.train_dataset, watch)
    trainer.train()
    trainer.save_model(plan.output_folder)
    watch.record.adapter = plan.output_folder
    return watch.record


if __name__ == "__main__":
    run_script(train)
