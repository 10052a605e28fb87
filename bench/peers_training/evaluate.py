"""Evaluates adapters: `python -m bench.peers_training.evaluate BASE ROWS.jsonl ADAPTER...` prints two losses per line.

The first is the mean over all tokens of the held-out answers and their ends of turn, the second over the tokens of the answers alone. Both
are computed row by row in fp32 from the model's own logits, without any trainer's code.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Print the losses of the base, then those of each adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, rows, *adapters = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    examples = [_tokenize_example(tokenizer, row["prompt"], row["completion"]) for row in texts]
    for adapter in [None, *adapters]:
        model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
        model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
        print(*_mean_losses(model.eval(), examples), flush=True)


def _tokenize_example(tokenizer: Any, prompt: list[Any], completion: list[Any]) -> tuple[list[int], int, int]:
    """The tokens of a row, how many of them belong to the prompt, and how many come before the last end of turn."""
    prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = tokenizer.apply_chat_template(prompt + completion, return_dict=True)["input_ids"]
    assert ids[: len(prompt_ids)] == prompt_ids
    end_of_turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    return ids, len(prompt_ids), len(ids) - 1 - ids[::-1].index(end_of_turn)


def _mean_losses(model: Any, examples: list[tuple[list[int], int, int]]) -> tuple[float, float]:
    """The mean loss over all tokens of the answers, and without their ends of turn."""
    import torch

    losses: list[float] = []
    content_losses: list[float] = []
    for ids, prompt_length, content_length in examples:
        tokens = torch.tensor([ids])
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0, prompt_length - 1 : -1]
        row = torch.nn.functional.cross_entropy(logits.float(), tokens[0, prompt_length:], reduction="none").tolist()
        losses += row
        content_losses += row[: content_length - prompt_length]
    return statistics.fmean(losses), statistics.fmean(content_losses)


if __name__ == "__main__":
    main()
