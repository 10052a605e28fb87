"""Images in the rows of a training: looked at, never learned to be said, and the answers depend on them."""

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

from jobs.data.images import ImageRow, RowsWithImages, Sight, pixels_of, render_with_images, sight_of
from jobs.data.render import NO_LABEL, use_chat_template
from jobs.errors import JobFailed
from jobs.evaluation.answers import answers
from jobs.evaluation.questions import questions_of
from jobs.trained import TrainedModel
from jobs.trainers.likelihood import labelled_logits, measure
from jobs.trainers.model import Machine, end_turns, load_base
from jobs.trainers.vision import Collator, Looks, look_only, order_by_length
from schema.events import Sampled
from schema.training import SftConfig
from tests.jobs.conftest import BASE, Record, Trained, a_context, a_spec, messages
from tests.jobs.test_continuation import Story, assert_same
from tests.jobs.test_healing import Memory, losses
from tests.tiny_gemma_vision import IMAGE_SIZE, TOKENS_PER_IMAGE, build_tiny_gemma_vision

SEEING = "tiny/gemma-vision"
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


@pytest.fixture(scope="session")
def seeing(store: Path) -> Path:
    """The folder of the tiny base that sees, in the store."""
    return build_tiny_gemma_vision(store / "pretrained_weights/huggingface" / SEEING)


@pytest.fixture(scope="session")
def sight(seeing: Path) -> Sight:
    return sight_of(seeing, SEEING)


@pytest.fixture(scope="session")
def tokenizer(seeing: Path) -> Any:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(seeing)
    use_chat_template(loaded)
    return loaded


@cache
def picture(colour: str, shade: int = 0, kind: str = "PNG") -> str:
    """A small square of about that colour; no two shades are the same."""
    from PIL import Image

    red, green, blue = COLOURS[colour]
    image = Image.new("RGB", (8 + shade % 5, 9), (red - shade % 25, green + shade // 25, blue - shade % 25))
    content = io.BytesIO()
    image.save(content, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"


def image(colour: str = "red", shade: int = 0) -> dict[str, str]:
    return {"type": "image", "image": picture(colour, shade)}


def said(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def chat(*contents: Any) -> dict[str, Any]:
    """A conversation; the user begins."""
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]}


def squares(count: int, first: int = 0) -> list[dict[str, Any]]:
    """As many red as blue ones, and what they are."""
    colours = ["red", "blue"] * (count // 2)
    return [chat([image(colour, first + n), said("what is it")], f"it is {colour}") for n, colour in enumerate(colours)]


def put(folder: Path, *rows: dict[str, Any]) -> Path:
    split = folder / "train.jsonl"
    split.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return split


Render = Callable[..., RowsWithImages]


@pytest.fixture
def render(tmp_path: Path, tokenizer: Any, sight: Sight) -> Render:
    def run(*rows: dict[str, Any], max_length: int = 512, dataset_type: Any = "messages") -> RowsWithImages:
        return render_with_images(put(tmp_path, *rows), dataset_type, tokenizer, sight, max_length)

    return run


# --- rows ---


TALK = chat(
    [image("red"), said("what is this"), image("blue"), said("and that")], "a file", [said("and"), image("red", 3)], "a path or a name"
)


def test_a_row_is_what_the_library_itself_would_read(render: Render, seeing: Path, tokenizer: Any) -> None:
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(seeing)
    (row,) = render(TALK).rows
    pictures = [Image.open(io.BytesIO(base64.b64decode(picture(*which).partition(",")[2]))) for which in (("red",), ("blue",), ("red", 3))]
    text = tokenizer.apply_chat_template(TALK["messages"], tokenize=False)
    theirs = processor(text=[text], images=[pictures], add_special_tokens=False, return_tensors="pt")
    ours = Collator(0, sight_of(seeing, SEEING))([row])
    assert set(theirs) == set(ours) - {"labels", "real_tokens"}
    assert [name for name in theirs if not theirs[name].equal(ours[name])] == []


def test_only_what_the_assistant_says_is_learned(render: Render, tokenizer: Any) -> None:
    (row,) = render(TALK).rows
    learned = tokenizer.decode([label for label in row.labels if label != NO_LABEL])
    assert learned == "a file<end_of_turn>\na path or a name<end_of_turn>\n"


def test_no_image_is_ever_learned_to_be_said(render: Render, sight: Sight) -> None:
    shown = chat("show me a file", [image(), said("a file"), image("blue")], [image()], [said("a name"), image()])
    for row in render(TALK, *squares(4), shown).rows:
        assert row.input_ids.count(sight.token) == row.images * TOKENS_PER_IMAGE
        assert sight.never_said.isdisjoint(row.labels)
        assert row.labels[row.prompt_tokens] != NO_LABEL
        assert set(row.labels[: row.prompt_tokens]) == {NO_LABEL}


def test_a_prompt_and_its_completion_are_a_conversation(render: Render) -> None:
    (row,) = squares(2)[:1]
    pair = {"prompt": row["messages"][:1], "completion": row["messages"][1:]}
    (ours,), (theirs,) = render(pair, dataset_type="prompt_completion").rows, render(row).rows
    assert (ours.input_ids, ours.labels, ours.images) == (theirs.input_ids, theirs.labels, 1)


def test_rows_without_images_may_stand_among_the_others(render: Render, sight: Sight) -> None:
    plain = messages(1)[0]
    found = render(*squares(2), plain)
    assert [row.images for row in found.rows] == [1, 1, 0]
    assert "pixel_values" not in Collator(0, sight)(found.rows[2:])
    assert Collator(0, sight)(found.rows)["pixel_values"].shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)


def test_a_long_row_is_cut_behind_its_last_image(render: Render) -> None:
    (whole,) = render(TALK).rows
    length = len(whole.input_ids) - 3
    found = render(TALK, max_length=length)
    assert (found.cut, found.dropped) == (1, 0)
    assert found.rows[0].input_ids == whole.input_ids[:length]
    assert found.rows[0].labels == whole.labels[:length]


@pytest.mark.parametrize("missing", range(2 * TOKENS_PER_IMAGE))
def test_an_image_is_never_cut_in_two(render: Render, sight: Sight, missing: int) -> None:
    """The row's first answer lies before its last image, and would be learned."""
    (whole,) = render(TALK).rows
    end = max(n for n, token in enumerate(whole.input_ids) if token == sight.token) + 2
    found = render(TALK, max_length=end - missing)
    assert (len(found.rows), found.dropped) == ((1, 0) if missing == 0 else (0, 1))


def test_what_is_left_out_and_cut_is_counted(store: Path, seeing: Path, tmp_path: Path) -> None:
    long = chat([image(), said("what is it")], "files " * 60)
    far = chat([said("open " * 60), image()], "it is red")
    told = train(store, tmp_path, rows=[*squares(4), long, far], max_seq_length=48, max_steps=1).record.warnings
    assert told["rows_cut"] == "1 rows of train are longer than max_seq_length 48 and were cut"
    assert told["rows_dropped"].startswith("1 rows of train")


def test_words_are_the_same_rows_without_their_images(render: Render, tokenizer: Any) -> None:
    found = render(*squares(4), TALK)
    assert len(found.words) == len(found.rows)
    without = chat("what is thisand that", "a file", "and", "a path or a name")
    assert tokenizer.decode(found.words[-1].input_ids) == tokenizer.apply_chat_template(without["messages"], tokenize=False)
    assert [label for label in found.words[-1].labels if label != NO_LABEL] == [
        label for label in found.rows[-1].labels if label != NO_LABEL
    ]


# --- what cannot be shown ---


def refused(call: Callable[[], object]) -> Any:
    with pytest.raises(JobFailed) as error:
        call()
    return error.value.failure


@pytest.mark.parametrize("text", ["what is <start_of_image>", "what is <image_soft_token>"])
def test_a_text_that_writes_an_image_is_refused_by_its_row(render: Render, text: str) -> None:
    failure = refused(lambda: render(*squares(2), chat([image(), said(text)], "it")))
    assert failure.code == "invalid_data"
    assert "row 3 of train" in failure.message


def test_a_template_that_does_not_write_images_is_refused(tmp_path: Path, seeing: Path, sight: Sight) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(seeing)
    tokenizer.chat_template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    failure = refused(lambda: render_with_images(put(tmp_path, *squares(2)), "messages", tokenizer, sight, 512))
    assert failure.code == "invalid_config"
    assert "chat template" in failure.message


def test_what_is_no_image_is_refused_by_its_row_before_anything_is_trained(store: Path, seeing: Path, tmp_path: Path) -> None:
    broken = {"type": "image", "image": "data:image/png;base64," + base64.b64encode(b"no image at all").decode()}
    failure = refused(lambda: train(store, tmp_path, rows=[*squares(4), chat([image(), broken], "it")]))
    assert failure.code == "invalid_data"
    assert "image 2 in row 5 of train" in failure.message


def half(uri: str) -> str:
    """An image of which the second half is gone: its header is whole."""
    header, _, content = uri.partition(",")
    whole = base64.b64decode(content)
    return f"{header},{base64.b64encode(whole[: len(whole) * 6 // 10]).decode()}"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_off_is_refused_by_its_row_wherever_it_is_decoded(
    store: Path, seeing: Path, tmp_path: Path, workers: int
) -> None:
    rows = [*squares(4), chat([{"type": "image", "image": half(picture("red"))}], "it is red")]
    failure = refused(lambda: train(store, tmp_path, rows=rows, dataloader_num_workers=workers, max_steps=5, held_out=[]))
    assert failure.code == "invalid_data"
    assert failure.message == "image 1 in row 5 of train is broken: its pixels cannot be decoded"


def test_a_base_that_reads_text_alone_is_refused(store: Path, base: Path, tmp_path: Path) -> None:
    failure = refused(lambda: train(store, tmp_path, base=BASE))
    assert failure.code == "invalid_config"
    assert BASE in failure.message
    assert "gemma-3-4b" in failure.hint


def test_a_base_without_its_image_processor_is_refused(seeing: Path, tmp_path: Path) -> None:
    for path in seeing.iterdir():
        if "processor" not in path.name:
            (tmp_path / path.name).symlink_to(path)
    failure = refused(lambda: sight_of(tmp_path, SEEING))
    assert failure.code == "invalid_config"
    assert "preprocessor_config.json" in failure.hint


# --- the order of rows ---


def test_rows_of_a_length_are_learned_together() -> None:
    lengths = [random.Random(n).randrange(10, 500) for n in range(640)]
    order = order_by_length(lengths, 4, random.Random(1))
    steps = [order[n : n + 4] for n in range(0, len(order), 4)]
    padding = sum(4 * max(lengths[row] for row in step) - sum(lengths[row] for row in step) for step in steps)
    assert sorted(order) == list(range(640))
    assert padding < 0.05 * sum(lengths)
    assert max(lengths) == lengths[order[0]]
    assert sorted(range(640), key=lambda row: -lengths[row]) != order


@pytest.mark.parametrize("count", [1, 3, 4, 5, 17, 63])
def test_every_row_is_learned_once_and_an_incomplete_step_comes_last(count: int) -> None:
    lengths = [n % 7 for n in range(count)]
    orders = [order_by_length(lengths, 4, random.Random(seed)) for seed in range(3)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert orders[0] == order_by_length(lengths, 4, random.Random(0))
    assert count <= 4 or orders[0] != orders[1]


# --- training ---


def train(
    store: Path,
    workdir: Path,
    *,
    rows: list[dict[str, Any]] | None = None,
    held_out: list[dict[str, Any]] | None = None,
    base: str = SEEING,
    method: str = "LoRA",
    eval_config: dict[str, Any] | None = None,
    **knobs: Any,
) -> Trained:
    from jobs.trainers.sft import train as train_sft

    record = Record()
    job = a_spec(
        store,
        train=squares(16) if rows is None else rows,
        held_out=squares(4, first=500) if held_out is None else held_out,
        base_model_id=base,
        method=method,
        modality="vision",
        hyperparameters=knobs,
        eval_config=eval_config or {},
    )
    context = a_context(job, workdir, record)
    assert isinstance(job.training_config, SftConfig)
    return Trained(train_sft(job.training_config, context), record, workdir, context)


LEARNS: dict[str, Any] = {"max_steps": 20, "batch_size": 8, "learning_rate": 1e-2, "lora_dropout": 0.0}
ASKED = {"compute_eval_metrics": True, "sample_prompts": 4, "task_rows": 16, "max_new_tokens": 10}


@pytest.fixture(scope="module")
def learned(store: Path, seeing: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model that has been shown squares, red and blue."""
    rows, held_out = squares(32), squares(8, first=500)
    return train(store, tmp_path_factory.mktemp("learned"), rows=rows, held_out=held_out, eval_config=ASKED, **LEARNS)


def test_a_model_learns_to_say_what_it_sees(learned: Trained) -> None:
    before, after = learned.model.base_metrics, learned.model.metrics
    assert before is not None
    assert after is not None
    assert (before.values["exact_match"], after.values["exact_match"]) == (0.0, 1.0)
    assert (after.perplexity or math.inf) < (before.perplexity or 0.0) / 10
    assert after.eval_rows == 8


@pytest.fixture(scope="module")
def speaker(learned: Trained, tokenizer: Any) -> Any:
    """The trained model, from the files that it left."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained(learned.model.base_folder, dtype="float32")
    end_turns(base, tokenizer)
    return PeftModel.from_pretrained(base, learned.model.folder).eval()


def answered(model: Any, tokenizer: Any, sight: Sight, rows: Sequence[ImageRow], batch_size: int = 8) -> list[str]:
    questions = questions_of(rows, tokenizer, len(rows))
    prompts = [question.prompt_ids for question in questions]
    return answers(model, tokenizer, prompts, max_new_tokens=10, batch_size=batch_size, features=Looks(questions, rows, sight))


def test_what_it_says_depends_on_the_image_alone(render: Render, learned: Trained, speaker: Any, tokenizer: Any, sight: Sight) -> None:
    rows = render(*squares(8, first=700)).rows
    swapped = [replace(row, offset=other.offset, number=other.number) for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)]
    said = answered(speaker, tokenizer, sight, rows)
    assert said == answered(speaker, tokenizer, sight, rows, batch_size=3)
    assert [text.strip() for text in said] == ["it is red", "it is blue"] * 4
    assert [text.strip() for text in answered(speaker, tokenizer, sight, swapped)] == ["it is blue", "it is red"] * 4
    config = learned.context.spec.training_config
    right, wrong = (measure(speaker, some, 0, config, collator=Collator(0, sight)).eval_loss for some in (rows, swapped))
    assert (right or math.inf) < (wrong or 0.0) - 0.5  # nats


def test_the_next_image_of_a_conversation_is_for_the_next_question(render: Render, tokenizer: Any, sight: Sight) -> None:
    rows = render(*squares(2), TALK).rows
    questions = questions_of(rows, tokenizer, 9)
    looks = Looks(questions, rows, sight)
    assert [question.row for question in questions] == [0, 1, 2, 2]
    assert [len(look["pixel_values"]) for look in looks] == [1, 1, 2, 3]
    assert all(len(look["token_type_ids"]) == len(question.prompt_ids) for look, question in zip(looks, questions, strict=True))


def test_samples_are_shown_as_the_template_writes_them(learned: Trained) -> None:
    shown = [event for event in learned.record.events if isinstance(event, Sampled)][-1].samples
    assert len(shown) == 4
    assert shown[0].prompt.count("<start_of_image>") == 1
    assert "<image_soft_token>" not in shown[0].prompt
    assert (shown[0].text.strip(), (shown[0].reference or "").strip()) == ("it is red", "it is red")


def test_the_loss_is_the_librarys_own(render: Render, speaker: Any, sight: Sight) -> None:
    import torch

    batch = Collator(0, sight)(render(TALK, *squares(2)).rows)
    batch.pop("real_tokens")
    labels = batch.pop("labels")
    with torch.no_grad():
        theirs = speaker(**batch, labels=labels).loss
        logits, wanted = labelled_logits(speaker, batch, labels)
        one_way, _ = labelled_logits(speaker, {**batch, "token_type_ids": torch.zeros_like(labels)}, labels)
    assert torch.nn.functional.cross_entropy(logits, wanted).item() == pytest.approx(theirs.item(), rel=1e-5)
    assert (one_way - logits).abs().max().item() > 1e-2  # an image's tokens see each other in both directions


def test_the_folder_of_the_model_is_all_that_a_processor_needs(learned: Trained, seeing: Path) -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(learned.model.folder)
    content = [{"type": "image"}, said("what is it")]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    assert text.count("<start_of_image>") == 1
    assert type(processor).__name__ == "Gemma3Processor"
    assert processor.image_seq_length == TOKENS_PER_IMAGE


def test_probes_are_words_and_the_attempt_says_so(learned: Trained, sight: Sight) -> None:
    probes = learned.model.probes
    assert len(probes) == 8
    assert all(sight.never_said.isdisjoint(probe.input_ids) for probe in probes)
    assert all(sight.never_said.isdisjoint(ids) for ids in learned.model.calibration)
    assert learned.record.decisions["compared_rows"] == "without their images"


# --- which weights are trained, and from what ---

PLAIN: dict[str, Any] = {"max_steps": 2, "lora_dropout": 0.0, "held_out": []}


@pytest.fixture(scope="module")
def plain(store: Path, seeing: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(store, tmp_path_factory.mktemp("plain"), gradient_checkpointing=False, dataloader_num_workers=0, **PLAIN)


def test_only_the_words_are_adapted(learned: Trained) -> None:
    names = learned.weights()
    assert all(".language_model." in name for name in names)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in learned.lora_weights()} >= {"q_proj", "o_proj", "down_proj"}


def test_the_vision_tower_is_adapted_when_asked(store: Path, seeing: Path, tmp_path: Path) -> None:
    trained = train(store, tmp_path, train_vision_tower=True, max_steps=2, learning_rate=1e-2, held_out=[])
    moved = {name: float(part.abs().max()) for name, part in trained.lora_weights().items() if "lora_B" in name}
    assert min(part for name, part in moved.items() if "vision_tower" in name) > 1e-4
    assert min(part for name, part in moved.items() if "language_model" in name) > 1e-4
    assert trained.record.decisions["vision_tower"] == "trained"


@pytest.mark.parametrize("asked", [False, True])
def test_a_full_training_leaves_the_vision_tower_alone_unless_asked(store: Path, seeing: Path, tmp_path: Path, asked: bool) -> None:
    from safetensors.torch import load_file

    trained = train(
        store, tmp_path, method="Full", train_vision_tower=asked, max_steps=1, learning_rate=1e-3, warmup_ratio=0.0, held_out=[]
    ).weights()
    before = load_file(seeing / "model.safetensors")
    assert trained.keys() == before.keys()
    changed = {name for name, part in trained.items() if not part.equal(before[name])}
    of_vision = {name for name in before if "vision_tower" in name or "multi_modal_projector" in name}
    assert bool(changed & of_vision) == asked
    assert any("language_model" in name for name in changed)


def test_a_base_of_four_bits_learns_in_every_adapted_layer(store: Path, seeing: Path, tmp_path: Path) -> None:
    trained = train(store, tmp_path, method="QLoRA", max_steps=2, learning_rate=1e-2)
    moved = {name: float(part.abs().max()) for name, part in trained.lora_weights().items() if "lora_B" in name}
    assert min(moved.values()) > 1e-5
    assert all(".language_model." in name for name in moved)


def test_what_looks_at_images_keeps_its_precision_in_a_base_of_four_bits(store: Path, seeing: Path) -> None:
    import torch
    from bitsandbytes.nn import Linear4bit

    spec = a_spec(store, base_model_id=SEEING, modality="vision", method="QLoRA")
    machine = Machine(torch.device("cpu"), torch.float32, autocast=False, on_gpu=False, gradient_checkpointing=False)
    model = load_base(spec.training_config, machine, seeing, "image_text")
    rounded = [name for name, part in model.named_modules() if isinstance(part, Linear4bit)]
    assert len(rounded) == 6 * 7
    assert [name for name in rounded if "language_model" not in name] == []


def test_activations_that_are_computed_twice_make_the_same_model(store: Path, plain: Trained, tmp_path: Path) -> None:
    twice = train(store, tmp_path, gradient_checkpointing=True, **PLAIN).weights()
    assert max(float((part - twice[name]).abs().max()) for name, part in plain.weights().items()) < 1e-6


def test_no_gradient_goes_through_a_vision_tower_that_is_kept(render: Render, seeing: Path, sight: Sight) -> None:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(seeing).train()
    look_only(model)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()  # as for an adapter: it would let gradients into the tower as well
    features = model.get_image_features(pixels_of(render(*squares(2)).rows[0], sight)).pooler_output
    assert not features.requires_grad


def test_workers_make_the_same_model(store: Path, plain: Trained, tmp_path: Path) -> None:
    helped = train(store, tmp_path, dataloader_num_workers=1, **PLAIN).weights()
    assert [name for name, part in plain.weights().items() if not part.equal(helped[name])] == []


# --- interrupted ---


def a_story(store: Path, workdir: Path, method: str = "LoRA", held_out: int = 4, **knobs: Any) -> Story:
    """Three steps of four rows in each of two epochs."""
    rows = [*squares(8), TALK, *messages(3)]
    long: dict[str, Any] = {"max_steps": -1, "epochs": 2, "batch_size": 2, "gradient_accumulation_steps": 2, "lora_dropout": 0.3}
    long |= {"learning_rate": 5e-3, "logging_steps": 1, "save_strategy": "no"} | knobs
    eval_config = {"eval_strategy": "epoch", "sample_prompts": 1, "max_new_tokens": 2}
    return Story(
        a_spec(
            store,
            train=rows,
            held_out=squares(held_out, first=500),
            base_model_id=SEEING,
            method=method,
            modality="vision",
            hyperparameters=long,
            eval_config=eval_config,
        ),
        workdir,
    )


def test_a_training_that_was_interrupted_is_the_unbroken_one(store: Path, seeing: Path, tmp_path: Path) -> None:
    unbroken = a_story(store, tmp_path / "unbroken")
    model = unbroken.finish()
    assert sorted(unbroken.curve) == [1, 2, 3, 4, 5, 6]
    broken = a_story(store, tmp_path / "broken")
    assert broken.attempt(stop_after=3, reason="time_slice") == "time_slice"  # at the end of an epoch
    assert broken.attempt(stop_after=5, reason="preempted") == "preempted"
    finished = broken.finish()
    assert isinstance(finished, TrainedModel)
    assert_same(broken, finished, unbroken, model)


def test_a_lack_of_memory_makes_the_batch_smaller_and_the_steps_the_same(
    store: Path, seeing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    knobs: dict[str, Any] = {"method": "Full", "batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 1e-4, "max_steps": 3}
    reference = a_story(store, tmp_path / "reference", held_out=0, **knobs)
    reference.finish()
    story = a_story(store, tmp_path / "short", held_out=0, **knobs)
    memory = Memory(story, rows_that_fit=2, from_step=2)
    monkeypatch.setattr(torch.nn.functional, "embedding", memory.look_up(torch.nn.functional.embedding))
    story.finish()
    assert memory.failures == 1
    assert losses(story) == pytest.approx(losses(reference), rel=1e-4)
