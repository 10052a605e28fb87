"""Evaluates adapters: `python -m bench.peers_training.evaluate BASE ROWS.jsonl ADAPTER...` prints one loss per line.

The loss is the mean over all tokens of the held-out answers, computed row by row in fp32 by the model itself, without any trainer's code.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Print the loss of the base, then that of each adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, rows, *adapters = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    examples = [_tokenize_example(tokenizer, row["prompt"], row["completion"]) for row in texts]
    for adapter in [None, *adapters]:
        model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
        model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
        print(_mean_loss(model.eval(), examples), flush=True)


def _tokenize_example(tokenizer: Any, prompt: list[Any], completion: list[Any]) -> tuple[list[int], int]:
    """The tokens of a row, and how many of them belong to the prompt."""
    prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = tokenizer.apply_chat_template(prompt + completion, return_dict=True)["input_ids"]
    assert ids[: len(prompt_ids)] == prompt_ids
    return ids, len(prompt_ids)


def _mean_loss(model: Any, examples: list[tuple[list[int], int]]) -> float:
    import torch

    total, count = 0.0, 0
    for ids, prompt_length in examples:
        labels = torch.tensor([[-100] * prompt_length + ids[prompt_length:]])
        with torch.no_grad():
            mean = model(input_ids=torch.tensor([ids]), labels=labels).loss.item()
        total += mean * (len(ids) - prompt_length)
        count += len(ids) - prompt_length
    return total / count


if __name__ == "__main__":
    main()
