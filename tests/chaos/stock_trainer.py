"""`python -m tests.chaos.stock_trainer FOLDER SEEDS`: what `resume_from_checkpoint=True` does with damaged checkpoints.

Runs in the trainer's environment without any code of Tunesmith: a two-layer Gemma, the library's Trainer and its own checkpoints.
"""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any


def main() -> None:
    """Damage and resume once per seed; print the counts as a line of JSON."""
    folder, seeds = Path(sys.argv[1]), int(sys.argv[2])
    import transformers
    from transformers.trainer_utils import get_last_checkpoint

    from tests.chaos.damage import damage

    transformers.logging.set_verbosity_error()
    intact = folder / "intact"
    _trainer(intact, steps=4).train()
    counts = Counter({"picked": 0, "crashed": 0, "fell_back": 0, "loaded": 0})
    for seed in range(seeds):
        output = folder / str(seed)
        shutil.copytree(intact, output)
        newest = output / "checkpoint-4"
        damage(newest, seed, tuple(sorted(path.name for path in newest.iterdir())))
        picked = get_last_checkpoint(str(output)) == str(newest)
        counts["picked"] += picked
        counts[_resume(output) if picked else "fell_back"] += 1
        shutil.rmtree(output)
    print(json.dumps(counts))


def _resume(output: Path) -> str:
    try:
        _trainer(output, steps=5).train(resume_from_checkpoint=True)
    except Exception:  # noqa: BLE001  # any error of the library counts as a crash
        return "crashed"
    return "loaded"


def _trainer(output: Path, steps: int) -> Any:
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Trainer, TrainingArguments

    torch.manual_seed(3)
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    rows = [{"input_ids": torch.arange(8) + n, "labels": torch.arange(8) + n} for n in range(40)]
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        save_strategy="steps",
        save_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(model=Gemma3ForCausalLM(config), args=arguments, train_dataset=rows)  # pyright: ignore[reportArgumentType]  # a list works


if __name__ == "__main__":
    main()
