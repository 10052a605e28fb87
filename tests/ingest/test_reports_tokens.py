"""Token lengths with a small tokenizer: what is summed up, what is said when they cannot be exact, and the process that counts them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.ingest.reports.build import build_report
from jobs.ingest.reports.token_lengths import count_tokens, make_histogram
from jobs.ingest.reports.tokenizer_files import UnusableTokenizer
from schema.ingestion import IngestedRows, IngestOptions, IngestProgress, TokenLengths, TokenLengthsOutcome, TokenLengthsTask
from tests.ingest.report_harness import write_split

BASE = "tiny/words"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REJECTING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
WORDS = ["user", "assistant", "system", *"abcdefgh"]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("words"), CHATML)


def write_tokenizer(folder: Path, template: str | None) -> Path:
    """A tokenizer with one token for each word, and for each end of a line."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: n for n, word in enumerate(["<unk>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "\n", *WORDS])}
    model = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = Split(Regex(r"\n| "), "isolated")
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, **tokens)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def make_row(prompt: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def count(folder: Path, rows: list[dict[str, Any]], tokenizer_folder: Path, **options: Any) -> TokenLengths:
    write_split(folder, "train", rows)
    return count_tokens({"train": folder / "train.jsonl"}, BASE, tokenizer_folder, **options)


def test_lengths_are_summed_up(tmp_path: Path, tokenizer_folder: Path) -> None:
    # Each turn has 5 tokens besides its content: start, role, end of line, end of turn, end of line.
    rows = [make_row("a", "b") for _ in range(98)] + [make_row("a", "b c"), make_row("a", "\n" * 588)]
    lengths = count(tmp_path, rows, tokenizer_folder, max_seq_length=12)
    assert (lengths.exact, lengths.note, lengths.rows) == (True, "", 100)
    assert lengths.total_tokens == 98 * 12 + 14 + 599
    assert lengths.mean == 17.89
    assert lengths.percentiles == {"50": 12, "90": 12, "95": 12, "99": 14, "100": 599}
    assert lengths.longest[:3] == (599, 14, 12)
    assert len(lengths.longest) == 64
    assert lengths.histogram == ((12, 98), (16, 1), (768, 1))
    assert lengths.truncated_rows == 2
    assert lengths.split_tokens == {"train": lengths.total_tokens}
    assert lengths.clipped_tokens["256"] == 98 * 12 + 14 + 256
    assert lengths.clipped_tokens["1024"] == lengths.total_tokens
    assert lengths.learned_tokens == 98 * 3 + 5 + 590


def test_of_a_pair_the_longer_answer_counts(tmp_path: Path, tokenizer_folder: Path) -> None:
    lengths = count(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "b c d"}], tokenizer_folder)
    assert (lengths.longest, lengths.learned_tokens) == ((16,), 3 + 7)


def test_prompts_end_with_the_start_of_an_answer(tmp_path: Path, tokenizer_folder: Path) -> None:
    assert count(tmp_path, [{"prompt": "a b", "answer": "c"}], tokenizer_folder).longest == (11,)


def test_texts_have_a_beginning_and_an_end(tmp_path: Path, tokenizer_folder: Path) -> None:
    assert count(tmp_path, [{"text": "a b\nc"}], tokenizer_folder).longest == (7,)


def test_texts_that_were_rendered_before_have_one_end(tmp_path: Path, tokenizer_folder: Path) -> None:
    text = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    assert count(tmp_path, [{"text": text}], tokenizer_folder).longest == (13,)


def test_long_rows_are_counted_in_bounded_batches(tmp_path: Path, tokenizer_folder: Path) -> None:
    rows = [make_row("a", "b\n" * 1_000_000), *[make_row("a", "b")] * 300]
    assert count(tmp_path, rows, tokenizer_folder).longest[:2] == (2_000_011, 12)


def test_rows_that_the_template_rejects_are_estimated(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "rejecting", REJECTING)
    rows = [make_row("a", "b")] * 20 + [{"messages": [{"role": "system", "content": "c"}, *make_row("a", "b")["messages"]]}]
    lengths = count(tmp_path, rows, folder)
    assert not lengths.exact
    assert lengths.note == "token counts are estimates (1 row: the base's chat template rejects them: System role not supported)"
    assert (lengths.longest[:2], lengths.learned_tokens) == ((18, 12), None)


def test_images_are_said_to_be_missing(tmp_path: Path, tokenizer_folder: Path) -> None:
    parts = [{"type": "image", "image": "data:image/png;base64," + "A" * 1000}, {"type": "text", "text": "a"}]
    lengths = count(
        tmp_path,
        [make_row("a", "b"), {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "b"}]}],
        tokenizer_folder,
    )
    assert "the tokens of images are not counted" in lengths.note
    assert lengths.longest[0] < 100


def test_histogram_has_powers_of_two_and_halves_between() -> None:
    assert make_histogram((length, 1) for length in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13)) == (
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 1),
        (6, 2),
        (8, 2),
        (12, 2),
        (16, 1),
    )


def test_unreadable_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UnusableTokenizer, match=f"the tokenizer of {BASE} cannot be read") as error:
        count(tmp_path, [make_row("a", "b")], tmp_path)
    assert str(tmp_path) not in str(error.value)


def test_report_has_token_lengths_and_their_warnings(tmp_path: Path, tokenizer_folder: Path) -> None:
    rows = [make_row("a", "\n" * n) for n in range(1, 401)]
    split = write_split(tmp_path, "train", rows)
    ingested = IngestedRows(dataset_type="messages", splits={"train": split}, prompt_form="messages")
    options = IngestOptions(base_model_id=BASE, max_seq_length=211)
    progress: list[IngestProgress] = []
    report = build_report({"train": tmp_path / split.file}, ingested, options, tokenizer_folder, progress.append)
    assert report.token_lengths == count_tokens({"train": tmp_path / split.file}, BASE, tokenizer_folder, 211)
    assert (
        "200 rows (50%) have more than 211 tokens, and will be cut at the end; "
        "raise max_seq_length (the longest row has 411), or split them"
    ) in report.warnings


def test_report_without_a_readable_tokenizer_has_everything_else(tmp_path: Path) -> None:
    split = write_split(tmp_path, "train", [make_row("a", "b")] * 60)
    ingested = IngestedRows(dataset_type="messages", splits={"train": split}, prompt_form="messages")
    report = build_report({"train": tmp_path / split.file}, ingested, IngestOptions(base_model_id=BASE), tmp_path)
    assert report.token_lengths is None
    assert report.warnings[0].startswith(f"tokens were not counted: the tokenizer of {BASE} cannot be read")
    assert report.characters == 120


def test_process_counts_a_stored_dataset(tmp_path: Path, tokenizer_folder: Path) -> None:
    split = write_split(tmp_path, "train", [make_row("a", "b")])
    outcomes: list[TokenLengthsOutcome] = []
    for folder in (tokenizer_folder, tmp_path):
        task = TokenLengthsTask(
            splits={"train": str(tmp_path / split.file)}, base_model_id=BASE, tokenizer_folder=str(folder), output=str(tmp_path)
        )
        (tmp_path / "task.json").write_text(json.dumps(task.model_dump()))
        subprocess.run([sys.executable, "-m", "jobs.ingest.token_lengths", tmp_path / "task.json"], check=True, stderr=subprocess.DEVNULL)
        outcomes.append(TokenLengthsOutcome.load((tmp_path / "token_lengths.json").read_bytes()))
    assert outcomes[0].refused is None
    assert outcomes[0].lengths is not None
    assert outcomes[0].lengths.total_tokens == 12
    assert outcomes[1].refused is not None
    assert outcomes[1].refused.param == "base_model_id"
