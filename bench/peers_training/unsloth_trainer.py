"""Unsloth, as its notebooks use it: its model, its gradient checkpointing, and TRL's trainer, which it rewrites. Needs an NVIDIA GPU."""

from bench.peers_training.plan import RANK, SEED, Plan, Seen, Stopwatch, library_callback, run
from bench.peers_training.trl_trainer import LAYERS, common, count


def train(plan: Plan) -> Seen:
    """One epoch over the rows."""
    from unsloth import FastLanguageModel  # isort: skip  # before the libraries that it rewrites
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
        target_modules=LAYERS,
        use_gradient_checkpointing="unsloth",
        random_state=SEED,
    )
    flags = {"packing": plan.packing, "max_length": plan.max_length, "bf16": True}
    flags |= {"per_device_train_batch_size": plan.batch_size, "gradient_accumulation_steps": plan.accumulation}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**common(plan), **flags),
        train_dataset=load_dataset("json", data_files=plan.rows, split="train", cache_dir=plan.out + "-cache"),
        processing_class=tokenizer,
        callbacks=[library_callback(watch)],
    )
    count(trainer.train_dataset, watch)
    trainer.train()
    trainer.save_model(plan.out)
    watch.seen.adapter = plan.out
    return watch.seen


if __name__ == "__main__":
    run(train)
