"""What ingestion reports as token lengths is what a training tokenizes, and learns."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.ingest.reports.token_lengths import LONGEST_ROWS, count_tokens
from jobs.llm.chat_format import choose_chat_format
from jobs.llm.data.preference import tokenize_pairs, tokenize_unpaired
from jobs.llm.data.tokenize import RowTokenizer, TokenizedExample
from jobs.llm.data.turns import sample_rows
from jobs.llm.training_context import load_tokenizer
from schema.ingestion import TokenLengths
from tests.jobs.conftest import BASE, TRAINING_CONFIG
from tests.tiny_models.build import build_tiny_model

UNTRUNCATED = 1 << 20
REASONING = ("qwen3", "qwen3_5")  # write reasoning before answers, a training also before earlier ones
WITHOUT_SYSTEM = ("gemma2", "mistral")  # reject system messages
# Bases whose own templates write turns in different ways.
TEMPLATES = ("gemma2", "llama3", "qwen3", "qwen3_5", "mistral", "phi3", "gpt_oss")
SYSTEM = {"role": "system", "content": "be short"}
Row = dict[str, Any]


def ask(n: int) -> Row:
    return {"role": "user", "content": f"  what does function {n} do \n"}


def answer(n: int, **more: Any) -> Row:
    return {"role": "assistant", "content": f"it returns a list of {n} files 🙂\n\nand copies them  ", **more}


def make_messages(*, with_system: bool = True) -> list[Row]:
    system = [SYSTEM] if with_system else []
    return [
        {"messages": [*system, ask(1), answer(1)]},
        {"messages": [ask(2), answer(20)]},
        {"messages": [ask(3), answer(3, weight=0), ask(33), answer(30)]},
        {"messages": [ask(4), {"role": "assistant", "content": "user"}]},
        {"messages": [ask(5), {"role": "assistant", "content": "e"}]},
    ]


ROWS: dict[str, list[Row]] = {
    "messages": make_messages(),
    "prompt_completion": [
        {"prompt": "what does it do", "completion": "it returns a file"},
        {"prompt": "copy\n", "completion": "\n\n  open"},
    ],
    "text": [{"text": "open the file\n\tand read it"}, {"text": "Ünïcödé – 模型 🙂 " * 20}],
    "preference": [
        {"prompt": "why", "chosen": "the path is a value", "rejected": "no"},
        {"prompt": "how", "chosen": "so", "rejected": "read the file and write the other one"},
    ],
    "unpaired_preference": [
        {"prompt": "why", "completion": "the path", "label": True},
        {"prompt": "how", "completion": "no", "label": False},
    ],
}


def write_rows(folder: Path, rows: list[Row]) -> Path:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tokenize_as_trained(base: Path, path: Path, dataset_type: Any) -> Iterator[tuple[TokenizedExample, ...]]:
    """The tokens of each row, of a pair both."""
    tokenizer = load_tokenizer(base, BASE)
    config = TRAINING_CONFIG.validate_python({"base_model_id": BASE})
    row_tokenizer = RowTokenizer(tokenizer, choose_chat_format(tokenizer, config, sample_rows([path], dataset_type, is_raw=False)))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    match dataset_type:
        case "preference":
            yield from ((pair.chosen, pair.rejected) for pair in tokenize_pairs(rows, row_tokenizer, UNTRUNCATED).rows)
        case "unpaired_preference":
            yield from ((example.row,) for example in tokenize_unpaired(rows, row_tokenizer, UNTRUNCATED).rows)
        case _:
            yield from ((row_tokenizer.tokenize(row, dataset_type),) for row in rows)


def check_counts(base: Path, folder: Path, rows: list[Row], dataset_type: str) -> TokenLengths:
    """Compare the lengths of all rows, and the number of learned tokens."""
    path = write_rows(folder, rows)
    counted = count_tokens({"train": path}, BASE, base)
    trained = list(tokenize_as_trained(base, path, dataset_type))
    assert len(trained) == len(rows)
    lengths = sorted((max(len(example.input_ids) for example in row) for row in trained), reverse=True)
    assert list(counted.longest) == lengths[:LONGEST_ROWS]
    assert counted.total_tokens == sum(lengths)
    assert counted.learned_tokens == sum(example.label_count for row in trained for example in row)
    return counted


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("bases")
    return lambda name: build_tiny_model(name, root / name)


@pytest.mark.parametrize("dataset_type", ROWS)
def test_a_base_without_a_template_is_counted_as_it_is_trained(base: Path, tmp_path: Path, dataset_type: str) -> None:
    assert check_counts(base, tmp_path, ROWS[dataset_type], dataset_type).exact


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_of_the_base_is_counted_as_it_is_trained(tiny_base: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    for dataset_type, given in ROWS.items():
        rows = make_messages(with_system=name not in WITHOUT_SYSTEM) if dataset_type == "messages" else given
        if name in REASONING:
            rows = [row for row in rows if len(row.get("messages", ())) < 4]
        assert check_counts(tiny_base(name), tmp_path, rows, dataset_type).exact


@pytest.mark.parametrize("name", REASONING)
def test_reasoning_before_earlier_answers_makes_counts_estimates(tiny_base: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path, ROWS["messages"])
    counted = count_tokens({"train": path}, BASE, tiny_base(name))
    trained = sum(len(example.input_ids) for (example,) in tokenize_as_trained(tiny_base(name), path, "messages"))
    assert not counted.exact
    assert "reasoning" in counted.note
    assert abs(counted.total_tokens - trained) < 0.05 * trained


@pytest.mark.parametrize("dataset_type", ["messages", "text"])
def test_texts_of_control_tokens_are_counted_as_texts(base: Path, tmp_path: Path, dataset_type: str) -> None:
    literal = "write <end_of_turn> and <bos> after a < b"
    rows: list[Row] = [{"text": literal}] if dataset_type == "text" else [{"messages": [{"role": "user", "content": literal}, answer(1)]}]
    check_counts(base, tmp_path, rows, dataset_type)
