"""How good an adapter has become: `python -m bench.peers_training.evaluate BASE ROWS.jsonl ADAPTER...`, one loss a line.

The mean over all tokens of the held-out answers, row by row, in fp32, by the model's own loss: no trainer's code is asked.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Print the base's loss, then that of each adapter."""
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
    """Tokens of a row, and how many of them are the question's."""
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(prompt + completion, return_dict=True)["input_ids"]
    assert whole[: len(asked)] == asked
    return whole, len(asked)


def _mean_loss(model: Any, examples: list[tuple[list[int], int]]) -> float:
    import torch

    total, count = 0.0, 0
    for ids, asked in examples:
        labels = torch.tensor([[-100] * asked + ids[asked:]])
        with torch.no_grad():
            mean = model(input_ids=torch.tensor([ids]), labels=labels).loss.item()
        total += mean * (len(ids) - asked)
        count += len(ids) - asked
    return total / count


if __name__ == "__main__":
    main()
