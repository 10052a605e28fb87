"""The base and the rows: `python -m bench.peers_training.rows FOLDER [--label-share 0.5] [--rows 160] [--real BASE]`.

The base is a Gemma 3 with random weights whose head has the share of its parameters that the 270M's has, three fifths, so that a run
lasts seconds and costs are spread as in a real one. The rows' lengths are log-normal, as those of instructions are.
"""

import argparse
import json
import math
import random
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from infra.stdlib_docstrings import generate_question_answer_pairs
from tests.tiny_gemma import WORDS, build_tiny_gemma

# The first has a head of three fifths of its weights, as the 270M has, and takes seconds; the others are Gemma's own shapes of text.
SHAPES = {
    "small": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 32_768}
    | {"num_key_value_heads": 1, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 512},
    "1b": {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4, "vocab_size": 262_144}
    | {"num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 512},
    "4b": {"hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34, "num_attention_heads": 8, "vocab_size": 262_144}
    | {"num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 1024},
}
MAX_ROW_WORDS = 350  # words of a row: below what every trainer cuts at
MEDIAN_ROW_WORDS, ROW_LENGTH_SIGMA = 36, 0.85  # words; of the log-normal lengths
HELD_OUT_ROWS = 32


def main() -> None:
    """Write base/, train.jsonl and held-out.jsonl."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--label-share", type=float, default=0.5)
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--real", type=Path, help="take this base, and real questions and answers for it")
    chosen = parser.parse_args()
    folder: Path = chosen.folder
    folder.mkdir(parents=True, exist_ok=True)
    if chosen.real:
        shutil.copytree(chosen.real, folder / "base")
    else:
        make_base(folder / "base", chosen.shape)
    template = files("trl").joinpath("chat_templates/gemma3.jinja").read_text()
    (folder / "base/chat_template.jinja").write_text(template)
    count = chosen.rows + HELD_OUT_ROWS
    rows = list(docstring_rows(count) if chosen.real else make_rows(count, chosen.label_share))
    for name, some in (("train", rows[: chosen.rows]), ("held-out", rows[chosen.rows :])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


def make_base(folder: Path, shape: str) -> None:
    """A Gemma 3 in bf16, the same every time."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    build_tiny_gemma(folder)
    model_type = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": True}
    config = Gemma3TextConfig(**SHAPES[shape], **model_type, max_position_embeddings=8192)
    torch.manual_seed(7)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Gemma3ForCausalLM(config)
    # Frozen as they are, embeddings of the usual 0.02 let a head that is tied to them be sure of nothing.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.08 if shape == "small" else 0.04)
    model.save_pretrained(folder)


def make_rows(count: int, label_share: float) -> Iterator[dict[str, Any]]:
    """Questions and answers; of each row about that share is answer. All words are as likely anywhere:
    that is soon learned, and then little is left to learn, so that trainings that saw the same tokens end at the same loss."""
    chance = random.Random(42)
    words = WORDS.split()
    for _ in range(count):
        length = min(MAX_ROW_WORDS, round(math.exp(chance.gauss(math.log(MEDIAN_ROW_WORDS), ROW_LENGTH_SIGMA))))
        answer = max(2, round(length * label_share))
        question = max(2, length - answer)
        said = chance.choices(words, k=question + answer)
        yield make_row(" ".join(said[:question]), " ".join(said[question:]))


def docstring_rows(count: int) -> Iterator[dict[str, Any]]:
    """What functions of Python's standard library do, in their docstrings' words."""
    pairs = sorted(generate_question_answer_pairs())
    random.Random(42).shuffle(pairs)
    for question, answer in pairs[:count]:
        yield make_row(question, answer)


def make_row(question: str, answer: str) -> dict[str, Any]:
    """As TRL takes it for a question whose answer alone is learned, and as we do."""
    return {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}


if __name__ == "__main__":
    main()
