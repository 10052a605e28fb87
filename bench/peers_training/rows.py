"""Makes the base and the rows: `python -m bench.peers_training.rows FOLDER [--label-share 0.5] [--rows 160] [--base FOLDER] [--file FILE]`.

The small base is a Gemma 3 with random weights. As in the 270M, its head has three fifths of the parameters, so that a run takes seconds
and the costs are distributed as in a real one. Row lengths are log-normal, like those of instruction data.
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

# `small` is described above; `tiny` only shows that the code works; the others are the shapes of Gemma's text models.
SHAPES = {
    "small": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 32_768}
    | {"num_key_value_heads": 1, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 512},
    "tiny": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 2048}
    | {"num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64},
    "1b": {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4, "vocab_size": 262_144}
    | {"num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 512},
    "4b": {"hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34, "num_attention_heads": 8, "vocab_size": 262_144}
    | {"num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 1024},
}
MAX_ROW_WORDS = 350  # shorter than the length at which any trainer truncates
MEDIAN_ROW_WORDS, ROW_LENGTH_SIGMA = 36, 0.85  # parameters of the log-normal lengths
HELD_OUT_ROWS = 32
HELD_OUT_SHARE = 0.25  # at most: of a file with few rows


def main() -> None:
    """Write base/, train.jsonl and held-out.jsonl."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--label-share", type=float, default=0.5)
    parser.add_argument("--rows", type=int, default=160, help="at most; the held-out rows come in addition")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--base", type=Path, help="use this base, with real questions and answers")
    parser.add_argument("--file", type=Path, help="use the rows of this JSONL file: `messages`, or `prompt` and `completion`")
    args = parser.parse_args()
    folder: Path = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    if args.base:
        shutil.copytree(args.base, folder / "base")
    else:
        make_base(folder / "base", args.shape)
    template = files("trl").joinpath("chat_templates/gemma3.jinja").read_text()
    (folder / "base/chat_template.jinja").write_text(template)
    count = args.rows + HELD_OUT_ROWS
    if args.file:
        rows = list(read_rows(args.file))[:count]
    else:
        rows = list(docstring_rows(count) if args.base else make_rows(count, args.label_share))
    held_out = min(HELD_OUT_ROWS, math.ceil(len(rows) * HELD_OUT_SHARE))
    if len(rows) < 2:
        raise SystemExit("at least two rows are needed: one to train on, one held out")
    for name, split in (("train", rows[:-held_out]), ("held-out", rows[-held_out:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in split))


def make_base(folder: Path, shape: str) -> None:
    """Write a Gemma 3 in bf16, with the same random weights every time."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    build_tiny_gemma(folder)
    tokens = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": True}
    config = Gemma3TextConfig(**SHAPES[shape], **tokens, max_position_embeddings=8192)
    torch.manual_seed(7)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Gemma3ForCausalLM(config)
    # The embeddings are frozen and tied to the head. With the usual std of 0.02 the head could predict nothing with confidence.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.08 if shape in ("small", "tiny") else 0.04)
    model.save_pretrained(folder)


def make_rows(count: int, label_share: float) -> Iterator[dict[str, Any]]:
    """Random questions and answers; the answer is about `label_share` of each row.

    Every word is equally likely everywhere. A model learns that quickly and nothing more, so trainings on the same tokens end at the
    same loss.
    """
    generator = random.Random(42)
    words = WORDS.split()
    for _ in range(count):
        length = min(MAX_ROW_WORDS, round(math.exp(generator.gauss(math.log(MEDIAN_ROW_WORDS), ROW_LENGTH_SIGMA))))
        answer_words = max(2, round(length * label_share))
        question_words = max(2, length - answer_words)
        text = generator.choices(words, k=question_words + answer_words)
        yield make_row(" ".join(text[:question_words]), " ".join(text[question_words:]))


def docstring_rows(count: int) -> Iterator[dict[str, Any]]:
    """Questions about functions of Python's standard library, answered by their docstrings."""
    pairs = sorted(generate_question_answer_pairs())
    random.Random(42).shuffle(pairs)
    for question, answer in pairs[:count]:
        yield make_row(question, answer)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, in TRL's prompt-completion format; of a conversation, the last answer is the completion."""
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        row = json.loads(line)
        match row:
            case {"prompt": str(question), "completion": str(answer)}:
                yield make_row(question, answer)
            case {"prompt": list(prompt), "completion": list(completion)}:
                yield {"prompt": prompt, "completion": completion}
            case {"messages": [*prompt, {"role": "assistant"} as answer]} if prompt:
                yield {"prompt": prompt, "completion": [answer]}
            case _:
                raise SystemExit(f"{path}:{number}: expected prompt and completion, or messages that end with an answer")


def make_row(question: str, answer: str) -> dict[str, Any]:
    """A row in TRL's prompt-completion format, of which only the completion is labeled."""
    return {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}


if __name__ == "__main__":
    main()
