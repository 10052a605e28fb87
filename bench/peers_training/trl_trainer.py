"""TRL's SFTTrainer, as its documentation shows it, or with the flags that Tunesmith chooses."""

from typing import Any

from bench.peers_training.plan import RANK, SEED, Plan, Seen, Stopwatch, library_callback, run

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def train(plan: Plan) -> Seen:
    """One epoch over the rows."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    watch = Stopwatch()
    trainer = SFTTrainer(
        model=plan.base,
        args=SFTConfig(**common(plan), **(our_flags(plan) if plan.flags == "ours" else {})),
        train_dataset=load_dataset("json", data_files=plan.rows, split="train", cache_dir=plan.out + "-cache"),
        processing_class=AutoTokenizer.from_pretrained(plan.base),
        peft_config=adapter(),
        callbacks=[library_callback(watch)],
    )
    count(trainer.train_dataset, watch)
    trainer.train()
    trainer.save_model(plan.out)
    watch.seen.adapter = plan.out
    return watch.seen


def count(rows: Any, watch: Stopwatch) -> None:
    """How much there is to learn. The first token of a row has nothing before it: no trainer predicts it, and none labels it here."""
    watch.seen.tokens = sum(len(ids) for ids in rows["input_ids"])
    watch.seen.labels = sum(label != -100 for labels in rows["labels"] for label in labels)


def common(plan: Plan) -> dict[str, Any]:
    """What is the same for everybody, and whether there is a GPU. The rest is the library's."""
    return {
        "output_dir": plan.out,
        "use_cpu": not plan.on_gpu,
        "num_train_epochs": 1,
        "learning_rate": plan.learning_rate,
        "logging_steps": plan.logging_steps,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": SEED,
    }


def our_flags(plan: Plan) -> dict[str, Any]:
    """What Tunesmith chooses for the same rows on the same machine."""
    return {
        "packing": plan.packing,
        "packing_strategy": "bfd",
        "max_length": plan.max_length,
        "per_device_train_batch_size": plan.batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_checkpointing": False,
        "bf16": False,  # no autocast: the weights are
        "model_init_kwargs": {"dtype": "bfloat16", "attn_implementation": "flash_attention_2" if plan.use_fa2 else "sdpa"},
        "dataloader_pin_memory": plan.on_gpu,
    }


def adapter() -> Any:
    """The same for everybody: all linear layers but the head."""
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=LAYERS, task_type="CAUSAL_LM")


if __name__ == "__main__":
    run(train)
