"""Fine-tuning on rows with images: image tokens are never labeled, and answers depend on the images."""

import base64
import io
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from jobs.llm.data.images import (
    TokenizedImageExample,
    TokenizedImageSplit,
    VisionInputConfig,
    load_pixel_values,
    load_vision_input_config,
    tokenize_split_with_images,
)
from jobs.llm.data.tokenize import IGNORE_INDEX
from jobs.llm.evaluation.generation import generate_batch
from jobs.llm.evaluation.prompts import make_eval_prompts
from jobs.llm.hardware import DeviceConfig
from jobs.llm.loss import compute_labeled_logits, evaluate_likelihood
from jobs.llm.model import load_base, set_eos_tokens
from jobs.llm.trained_model import TrainedModel
from jobs.llm.trainers.vision import Collator, ImageFeatures, freeze_vision_tower, group_by_length
from jobs.llm.turn_ends import TurnEnds
from jobs.runtime.errors import JobFailed
from schema.events import SamplesGenerated
from schema.training import SftConfig
from tests.jobs.conftest import (
    BASE,
    EventRecorder,
    FinishedTraining,
    make_chat_format,
    make_context,
    make_row_tokenizer,
    make_spec,
    messages,
)
from tests.jobs.test_continuation import TrainingRun, assert_runs_identical
from tests.jobs.test_oom import LimitedMemory, losses
from tests.tiny_gemma_vision import IMAGE_SIZE, TOKENS_PER_IMAGE, build_tiny_gemma_vision

VISION_BASE = "tiny/gemma-vision"
COLORS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


@pytest.fixture(scope="session")
def vision_base(store: Path) -> Path:
    """The folder of the tiny vision-language base in the store."""
    return build_tiny_gemma_vision(store / "pretrained_weights/huggingface" / VISION_BASE)


@pytest.fixture(scope="session")
def vision_input(vision_base: Path) -> VisionInputConfig:
    return load_vision_input_config(vision_base, VISION_BASE)


@pytest.fixture(scope="session")
def tokenizer(vision_base: Path) -> Any:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(vision_base)
    make_chat_format(loaded)
    return loaded


@cache
def make_image_uri(color: str, shade: int = 0, kind: str = "PNG") -> str:
    """A small image of about that color; each `shade` is different."""
    from PIL import Image

    red, green, blue = COLORS[color]
    image = Image.new("RGB", (8 + shade % 5, 9), (red - shade % 25, green + shade // 25, blue - shade % 25))
    content = io.BytesIO()
    image.save(content, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"


def image_part(color: str = "red", shade: int = 0) -> dict[str, str]:
    return {"type": "image", "image": make_image_uri(color, shade)}


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def make_chat_row(*contents: Any) -> dict[str, Any]:
    """A conversation that the user starts."""
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]}


def make_square_rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Rows with red and blue squares in turn; the answer is the color."""
    colors = ["red", "blue"] * (count // 2)
    return [make_chat_row([image_part(color, first + n), text_part("what is it")], f"it is {color}") for n, color in enumerate(colors)]


def write_rows(folder: Path, *rows: dict[str, Any]) -> Path:
    split = folder / "train.jsonl"
    split.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return split


TokenizeRows = Callable[..., TokenizedImageSplit]


@pytest.fixture
def tokenize_rows(tmp_path: Path, tokenizer: Any, vision_input: VisionInputConfig) -> TokenizeRows:
    def run(*rows: dict[str, Any], max_length: int = 512, dataset_type: Any = "messages") -> TokenizedImageSplit:
        return tokenize_split_with_images(
            write_rows(tmp_path, *rows), dataset_type, make_row_tokenizer(tokenizer), vision_input, max_length
        )

    return run


# --- rows ---


CONVERSATION = make_chat_row(
    [image_part("red"), text_part("what is this"), image_part("blue"), text_part("and that")],
    "a file",
    [text_part("and"), image_part("red", 3)],
    "a path or a name",
)


def test_rows_match_library_processor(tokenize_rows: TokenizeRows, vision_base: Path, tokenizer: Any) -> None:
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(vision_base)
    (row,) = tokenize_rows(CONVERSATION).rows
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(make_image_uri(*arguments).partition(",")[2])))
        for arguments in (("red",), ("blue",), ("red", 3))
    ]
    text = tokenizer.apply_chat_template(CONVERSATION["messages"], tokenize=False)
    theirs = processor(text=[text], images=[pictures], add_special_tokens=False, return_tensors="pt")
    ours = Collator(0, load_vision_input_config(vision_base, VISION_BASE))([row])
    assert set(theirs) == set(ours) - {"labels", "non_padding_tokens"}
    assert [name for name in theirs if not theirs[name].equal(ours[name])] == []


def test_only_assistant_turns_are_labeled(tokenize_rows: TokenizeRows, tokenizer: Any) -> None:
    (row,) = tokenize_rows(CONVERSATION).rows
    learned = tokenizer.decode([label for label in row.labels if label != IGNORE_INDEX])
    assert learned == "a file<end_of_turn>\na path or a name<end_of_turn>\n"


def test_image_tokens_are_never_labeled(tokenize_rows: TokenizeRows, vision_input: VisionInputConfig) -> None:
    assistant_images = make_chat_row(
        "show me a file", [image_part(), text_part("a file"), image_part("blue")], [image_part()], [text_part("a name"), image_part()]
    )
    for row in tokenize_rows(CONVERSATION, *make_square_rows(4), assistant_images).rows:
        assert row.input_ids.count(vision_input.soft_token_id) == row.image_count * TOKENS_PER_IMAGE
        assert vision_input.image_token_ids.isdisjoint(row.labels)
        assert row.labels[row.prompt_tokens] != IGNORE_INDEX
        assert set(row.labels[: row.prompt_tokens]) == {IGNORE_INDEX}


def test_prompt_completion_matches_conversation(tokenize_rows: TokenizeRows) -> None:
    (row,) = make_square_rows(2)[:1]
    pair = {"prompt": row["messages"][:1], "completion": row["messages"][1:]}
    (ours,), (theirs,) = tokenize_rows(pair, dataset_type="prompt_completion").rows, tokenize_rows(row).rows
    assert (ours.input_ids, ours.labels, ours.image_count) == (theirs.input_ids, theirs.labels, 1)


def test_rows_without_images_can_be_mixed_in(tokenize_rows: TokenizeRows, vision_input: VisionInputConfig) -> None:
    plain = messages(1)[0]
    split = tokenize_rows(*make_square_rows(2), plain)
    assert [row.image_count for row in split.rows] == [1, 1, 0]
    assert "pixel_values" not in Collator(0, vision_input)(split.rows[2:])
    assert Collator(0, vision_input)(split.rows)["pixel_values"].shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)


def test_long_row_is_truncated_after_last_image(tokenize_rows: TokenizeRows) -> None:
    (untruncated,) = tokenize_rows(CONVERSATION).rows
    length = len(untruncated.input_ids) - 3
    split = tokenize_rows(CONVERSATION, max_length=length)
    assert (split.truncated, split.dropped) == (1, 0)
    assert split.rows[0].input_ids == untruncated.input_ids[:length]
    assert split.rows[0].labels == untruncated.labels[:length]


@pytest.mark.parametrize("missing", range(2 * TOKENS_PER_IMAGE))
def test_image_is_never_split(tokenize_rows: TokenizeRows, vision_input: VisionInputConfig, missing: int) -> None:
    """A row truncated within its last image is dropped, although its first answer is before that image."""
    (untruncated,) = tokenize_rows(CONVERSATION).rows
    end = max(n for n, token in enumerate(untruncated.input_ids) if token == vision_input.soft_token_id) + 2
    split = tokenize_rows(CONVERSATION, max_length=end - missing)
    assert (len(split.rows), split.dropped) == ((1, 0) if missing == 0 else (0, 1))


def test_truncated_and_dropped_rows_are_counted(store: Path, vision_base: Path, tmp_path: Path) -> None:
    long = make_chat_row([image_part(), text_part("what is it")], "files " * 60)
    late_image = make_chat_row([text_part("open " * 60), image_part()], "it is red")
    warnings = train(store, tmp_path, rows=[*make_square_rows(4), long, late_image], max_seq_length=48, max_steps=1).record.warnings
    assert warnings["rows_truncated"] == "1 rows of train are longer than max_seq_length 48 and were truncated"
    assert warnings["rows_dropped"].startswith("1 rows of train")


def test_text_rows_are_rows_without_images(tokenize_rows: TokenizeRows, tokenizer: Any) -> None:
    split = tokenize_rows(*make_square_rows(4), CONVERSATION)
    assert len(split.text_only_rows) == len(split.rows)
    text_only = make_chat_row("what is thisand that", "a file", "and", "a path or a name")
    assert tokenizer.decode(split.text_only_rows[-1].input_ids) == tokenizer.apply_chat_template(text_only["messages"], tokenize=False)
    assert [label for label in split.text_only_rows[-1].labels if label != IGNORE_INDEX] == [
        label for label in split.rows[-1].labels if label != IGNORE_INDEX
    ]


# --- invalid images ---


def get_failure(call: Callable[[], object]) -> Any:
    with pytest.raises(JobFailed) as error:
        call()
    return error.value.failure


@pytest.mark.parametrize("text", ["what is <start_of_image>", "what is <image_soft_token>"])
def test_image_token_in_text_stays_text(tokenize_rows: TokenizeRows, tokenizer: Any, vision_input: VisionInputConfig, text: str) -> None:
    (row,) = tokenize_rows(make_chat_row([image_part(), text_part(text)], "it")).rows
    assert row.input_ids.count(vision_input.soft_token_id) == TOKENS_PER_IMAGE
    assert tokenizer.decode(row.input_ids).count(text) == 1


def test_template_without_image_support_is_rejected(tmp_path: Path, vision_base: Path, vision_input: VisionInputConfig) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(vision_base)
    tokenizer.chat_template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    failure = get_failure(
        lambda: tokenize_split_with_images(
            write_rows(tmp_path, *make_square_rows(2)), "messages", make_row_tokenizer(tokenizer), vision_input, 512
        )
    )
    assert failure.code == "invalid_config"
    assert "chat template" in failure.message


def test_invalid_image_is_rejected_before_training_naming_row(store: Path, vision_base: Path, tmp_path: Path) -> None:
    broken = {"type": "image", "image": "data:image/png;base64," + base64.b64encode(b"no image at all").decode()}
    failure = get_failure(lambda: train(store, tmp_path, rows=[*make_square_rows(4), make_chat_row([image_part(), broken], "it")]))
    assert failure.code == "invalid_data"
    assert "image 2 in row 5 of train" in failure.message


def truncate_image(uri: str) -> str:
    """An image whose second half is missing; its header is complete."""
    header, _, content = uri.partition(",")
    image = base64.b64decode(content)
    return f"{header},{base64.b64encode(image[: len(image) * 6 // 10]).decode()}"


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_image_is_rejected_naming_row(store: Path, vision_base: Path, tmp_path: Path, workers: int) -> None:
    rows = [*make_square_rows(4), make_chat_row([{"type": "image", "image": truncate_image(make_image_uri("red"))}], "it is red")]
    failure = get_failure(lambda: train(store, tmp_path, rows=rows, dataloader_num_workers=workers, max_steps=5, held_out=[]))
    assert failure.code == "invalid_data"
    assert failure.message == "image 1 in row 5 of train is broken: its pixels cannot be decoded"


def test_text_only_base_is_rejected(store: Path, base: Path, tmp_path: Path) -> None:
    failure = get_failure(lambda: train(store, tmp_path, base=BASE))
    assert failure.code == "invalid_config"
    assert BASE in failure.message
    assert "gemma-3-4b" in failure.hint


def test_base_without_image_processor_is_rejected(vision_base: Path, tmp_path: Path) -> None:
    for path in vision_base.iterdir():
        if "processor" not in path.name:
            (tmp_path / path.name).symlink_to(path)
    failure = get_failure(lambda: load_vision_input_config(tmp_path, VISION_BASE))
    assert failure.code == "invalid_config"
    assert "preprocessor_config.json" in failure.hint


# --- the order of rows ---


def test_rows_of_similar_length_are_batched_together() -> None:
    lengths = [random.Random(n).randrange(10, 500) for n in range(640)]
    order = group_by_length(lengths, 4, random.Random(1))
    steps = [order[n : n + 4] for n in range(0, len(order), 4)]
    padding = sum(4 * max(lengths[row] for row in step) - sum(lengths[row] for row in step) for step in steps)
    assert sorted(order) == list(range(640))
    assert padding < 0.05 * sum(lengths)
    assert max(lengths) == lengths[order[0]]
    assert sorted(range(640), key=lambda row: -lengths[row]) != order


@pytest.mark.parametrize("count", [1, 3, 4, 5, 17, 63])
def test_each_row_is_used_once_and_incomplete_step_is_last(count: int) -> None:
    lengths = [n % 7 for n in range(count)]
    orders = [group_by_length(lengths, 4, random.Random(seed)) for seed in range(3)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert orders[0] == group_by_length(lengths, 4, random.Random(0))
    assert count <= 4 or orders[0] != orders[1]


# --- training ---


def train(
    store: Path,
    workdir: Path,
    *,
    rows: list[dict[str, Any]] | None = None,
    held_out: list[dict[str, Any]] | None = None,
    base: str = VISION_BASE,
    method: str = "LoRA",
    eval_config: dict[str, Any] | None = None,
    **hyperparameters: Any,
) -> FinishedTraining:
    from jobs.llm.trainers.sft import train as train_sft

    record = EventRecorder()
    job = make_spec(
        store,
        train=make_square_rows(16) if rows is None else rows,
        held_out=make_square_rows(4, first=500) if held_out is None else held_out,
        base_model_id=base,
        method=method,
        modality="vision",
        hyperparameters=hyperparameters,
        eval_config=eval_config or {},
    )
    context = make_context(job, workdir, record)
    assert isinstance(job.training_config, SftConfig)
    return FinishedTraining(train_sft(job.training_config, context), record, workdir, context)


LEARNING_HYPERPARAMETERS: dict[str, Any] = {"max_steps": 20, "batch_size": 8, "learning_rate": 1e-2, "lora_dropout": 0.0}
EVAL_CONFIG = {"compute_eval_metrics": True, "sample_prompts": 4, "task_rows": 16, "max_new_tokens": 10}


@pytest.fixture(scope="module")
def trained_on_squares(store: Path, vision_base: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedTraining:
    """A model trained on red and blue squares."""
    rows, held_out = make_square_rows(32), make_square_rows(8, first=500)
    return train(
        store, tmp_path_factory.mktemp("learned"), rows=rows, held_out=held_out, eval_config=EVAL_CONFIG, **LEARNING_HYPERPARAMETERS
    )


def test_model_learns_to_name_colors(trained_on_squares: FinishedTraining) -> None:
    before, after = trained_on_squares.model.base_metrics, trained_on_squares.model.metrics
    assert before is not None
    assert after is not None
    assert (before.values["exact_match"], after.values["exact_match"]) == (0.0, 1.0)
    assert (after.perplexity or math.inf) < (before.perplexity or 0.0) / 10
    assert (after.content_perplexity or math.inf) < (before.content_perplexity or 0.0) / 10
    assert after.eval_rows == 8


@pytest.fixture(scope="module")
def trained_model(trained_on_squares: FinishedTraining, tokenizer: Any) -> Any:
    """The trained model, loaded from its files."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained(trained_on_squares.model.base_folder, dtype="float32")
    set_eos_tokens(base, make_chat_format(tokenizer).stop_token_ids)
    return PeftModel.from_pretrained(base, trained_on_squares.model.folder).eval()


def generate_answers(
    model: Any, tokenizer: Any, vision_input: VisionInputConfig, rows: Sequence[TokenizedImageExample], batch_size: int = 8
) -> list[str]:
    questions = make_eval_prompts(rows, tokenizer, len(rows))
    prompts = [question.prompt_ids for question in questions]
    return generate_batch(
        model, tokenizer, prompts, max_new_tokens=10, batch_size=batch_size, features=ImageFeatures(questions, rows, vision_input)
    )


def test_answer_depends_on_image_only(
    tokenize_rows: TokenizeRows,
    trained_on_squares: FinishedTraining,
    trained_model: Any,
    tokenizer: Any,
    vision_input: VisionInputConfig,
) -> None:
    rows = tokenize_rows(*make_square_rows(8, first=700)).rows
    swapped = [
        replace(row, byte_offset=other.byte_offset, line_number=other.line_number)
        for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)
    ]
    answers = generate_answers(trained_model, tokenizer, vision_input, rows)
    assert answers == generate_answers(trained_model, tokenizer, vision_input, rows, batch_size=3)
    assert [text.strip() for text in answers] == ["it is red", "it is blue"] * 4
    assert [text.strip() for text in generate_answers(trained_model, tokenizer, vision_input, swapped)] == [
        "it is blue",
        "it is red",
    ] * 4
    config = trained_on_squares.context.spec.training_config
    turn_ends = TurnEnds([tokenizer.eos_token_id], tokenizer)
    matching_loss, swapped_loss = (
        evaluate_likelihood(trained_model, examples, 0, config, turn_ends, collate_fn=Collator(0, vision_input)).eval_loss
        for examples in (rows, swapped)
    )
    assert (matching_loss or math.inf) < (swapped_loss or 0.0) - 0.5  # nats


def test_images_follow_their_prompts_in_a_conversation(
    tokenize_rows: TokenizeRows, tokenizer: Any, vision_input: VisionInputConfig
) -> None:
    rows = tokenize_rows(*make_square_rows(2), CONVERSATION).rows
    questions = make_eval_prompts(rows, tokenizer, 9)
    features = ImageFeatures(questions, rows, vision_input)
    assert [question.row_index for question in questions] == [0, 1, 2, 2]
    assert [len(feature["pixel_values"]) for feature in features] == [1, 1, 2, 3]
    assert all(len(feature["token_type_ids"]) == len(question.prompt_ids) for feature, question in zip(features, questions, strict=True))


def test_samples_are_shown_in_template_format(trained_on_squares: FinishedTraining) -> None:
    shown = [event for event in trained_on_squares.record.events if isinstance(event, SamplesGenerated)][-1].samples
    assert len(shown) == 4
    assert shown[0].prompt.count("<start_of_image>") == 1
    assert "<image_soft_token>" not in shown[0].prompt
    assert (shown[0].text.strip(), (shown[0].reference or "").strip()) == ("it is red", "it is red")


def test_loss_matches_library(tokenize_rows: TokenizeRows, trained_model: Any, vision_input: VisionInputConfig) -> None:
    import torch

    batch = Collator(0, vision_input)(tokenize_rows(CONVERSATION, *make_square_rows(2)).rows)
    batch.pop("non_padding_tokens")
    labels = batch.pop("labels")
    with torch.no_grad():
        theirs = trained_model(**batch, labels=labels).loss
        logits, targets = compute_labeled_logits(trained_model, batch, labels)
        causal_logits, _ = compute_labeled_logits(trained_model, {**batch, "token_type_ids": torch.zeros_like(labels)}, labels)
    assert torch.nn.functional.cross_entropy(logits, targets).item() == pytest.approx(theirs.item(), rel=1e-5)
    assert (causal_logits - logits).abs().max().item() > 1e-2  # the tokens of an image attend to each other in both directions


def test_processor_loads_from_model_folder(trained_on_squares: FinishedTraining, vision_base: Path) -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(trained_on_squares.model.folder)
    content = [{"type": "image"}, text_part("what is it")]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    assert text.count("<start_of_image>") == 1
    assert type(processor).__name__ == "Gemma3Processor"
    assert processor.image_seq_length == TOKENS_PER_IMAGE


def test_held_out_examples_are_text_only_with_decision(trained_on_squares: FinishedTraining, vision_input: VisionInputConfig) -> None:
    probes = trained_on_squares.model.held_out_examples
    assert len(probes) == 8
    assert all(vision_input.image_token_ids.isdisjoint(probe.input_ids) for probe in probes)
    assert all(vision_input.image_token_ids.isdisjoint(ids) for ids in trained_on_squares.model.calibration)
    assert trained_on_squares.record.decisions["fidelity_rows"] == "without images"


# --- trained weights ---

SHORT_TRAINING: dict[str, Any] = {"max_steps": 2, "lora_dropout": 0.0, "held_out": []}


@pytest.fixture(scope="module")
def short_run(store: Path, vision_base: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedTraining:
    return train(store, tmp_path_factory.mktemp("plain"), gradient_checkpointing=False, dataloader_num_workers=0, **SHORT_TRAINING)


def test_only_language_model_is_adapted(trained_on_squares: FinishedTraining) -> None:
    names = trained_on_squares.weights()
    assert all(".language_model." in name for name in names)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained_on_squares.lora_weights()} >= {"q_proj", "o_proj", "down_proj"}


def test_vision_tower_is_adapted_on_request(store: Path, vision_base: Path, tmp_path: Path) -> None:
    trained = train(store, tmp_path, train_vision_tower=True, max_steps=2, learning_rate=1e-2, held_out=[])
    changes = {name: float(tensor.abs().max()) for name, tensor in trained.lora_weights().items() if "lora_B" in name}
    assert min(change for name, change in changes.items() if "vision_tower" in name) > 1e-4
    assert min(change for name, change in changes.items() if "language_model" in name) > 1e-4
    assert trained.record.decisions["vision_tower"] == "trained"


@pytest.mark.parametrize("train_vision_tower", [False, True])
def test_full_training_changes_vision_tower_only_on_request(
    store: Path, vision_base: Path, tmp_path: Path, train_vision_tower: bool
) -> None:
    from safetensors.torch import load_file

    trained = train(
        store,
        tmp_path,
        method="Full",
        train_vision_tower=train_vision_tower,
        max_steps=1,
        learning_rate=1e-3,
        warmup_ratio=0.0,
        held_out=[],
    ).weights()
    before = load_file(vision_base / "model.safetensors")
    assert trained.keys() == before.keys()
    changed = {name for name, tensor in trained.items() if not tensor.equal(before[name])}
    vision_names = {name for name in before if "vision_tower" in name or "multi_modal_projector" in name}
    assert bool(changed & vision_names) == train_vision_tower
    assert any("language_model" in name for name in changed)


def test_qlora_trains_every_adapted_layer(store: Path, vision_base: Path, tmp_path: Path) -> None:
    trained = train(store, tmp_path, method="QLoRA", max_steps=2, learning_rate=1e-2)
    changes = {name: float(tensor.abs().max()) for name, tensor in trained.lora_weights().items() if "lora_B" in name}
    assert min(changes.values()) > 1e-5
    assert all(".language_model." in name for name in changes)


def test_qlora_does_not_quantize_vision_layers(store: Path, vision_base: Path) -> None:
    import torch
    from bitsandbytes.nn import Linear4bit

    spec = make_spec(store, base_model_id=VISION_BASE, modality="vision", method="QLoRA")
    device_config = DeviceConfig(torch.device("cpu"), torch.float32, autocast=False, on_gpu=False, gradient_checkpointing=False)
    model = load_base(spec.training_config, device_config, vision_base, "image_text")
    quantized = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    assert len(quantized) == 6 * 7
    assert [name for name in quantized if "language_model" not in name] == []


def test_gradient_checkpointing_gives_same_weights(store: Path, short_run: FinishedTraining, tmp_path: Path) -> None:
    checkpointed = train(store, tmp_path, gradient_checkpointing=True, **SHORT_TRAINING).weights()
    assert max(float((tensor - checkpointed[name]).abs().max()) for name, tensor in short_run.weights().items()) < 1e-6


def test_frozen_vision_tower_gets_no_gradient(tokenize_rows: TokenizeRows, vision_base: Path, vision_input: VisionInputConfig) -> None:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(vision_base).train()
    freeze_vision_tower(model)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()  # as for an adapter; the tower would get gradients too
    features = model.get_image_features(load_pixel_values(tokenize_rows(*make_square_rows(2)).rows[0], vision_input)).pooler_output
    assert not features.requires_grad


def test_dataloader_workers_give_same_weights(store: Path, short_run: FinishedTraining, tmp_path: Path) -> None:
    with_worker = train(store, tmp_path, dataloader_num_workers=1, **SHORT_TRAINING).weights()
    assert [name for name, tensor in short_run.weights().items() if not tensor.equal(with_worker[name])] == []


# --- interruptions ---


def make_training_run(store: Path, workdir: Path, method: str = "LoRA", held_out: int = 4, **hyperparameters: Any) -> TrainingRun:
    """Two epochs of three steps of four rows."""
    rows = [*make_square_rows(8), CONVERSATION, *messages(3)]
    defaults: dict[str, Any] = {"max_steps": -1, "epochs": 2, "batch_size": 2, "gradient_accumulation_steps": 2, "lora_dropout": 0.3}
    defaults |= {"learning_rate": 5e-3, "logging_steps": 1, "save_strategy": "no"} | hyperparameters
    eval_config = {"eval_strategy": "epoch", "sample_prompts": 1, "max_new_tokens": 2}
    return TrainingRun(
        make_spec(
            store,
            train=rows,
            held_out=make_square_rows(held_out, first=500),
            base_model_id=VISION_BASE,
            method=method,
            modality="vision",
            hyperparameters=defaults,
            eval_config=eval_config,
        ),
        workdir,
    )


def test_interrupted_run_matches_uninterrupted_run(store: Path, vision_base: Path, tmp_path: Path) -> None:
    uninterrupted = make_training_run(store, tmp_path / "uninterrupted")
    model = uninterrupted.finish()
    assert sorted(uninterrupted.curve) == [1, 2, 3, 4, 5, 6]
    interrupted = make_training_run(store, tmp_path / "interrupted")
    assert interrupted.run_attempt(stop_after=3, reason="time_slice") == "time_slice"  # at the end of an epoch
    assert interrupted.run_attempt(stop_after=5, reason="preempted") == "preempted"
    finished = interrupted.finish()
    assert isinstance(finished, TrainedModel)
    assert_runs_identical(interrupted, finished, uninterrupted, model)


def test_oom_reduces_batch_size_and_keeps_losses(store: Path, vision_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    hyperparameters: dict[str, Any] = {
        "method": "Full",
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "max_steps": 3,
    }
    reference = make_training_run(store, tmp_path / "reference", held_out=0, **hyperparameters)
    reference.finish()
    run = make_training_run(store, tmp_path / "limited", held_out=0, **hyperparameters)
    memory = LimitedMemory(run, rows_that_fit=2, from_step=2)
    monkeypatch.setattr(torch.nn.functional, "embedding", memory.wrap_embedding(torch.nn.functional.embedding))
    run.finish()
    assert memory.failures == 1
    assert losses(run) == pytest.approx(losses(reference), rel=1e-4)
