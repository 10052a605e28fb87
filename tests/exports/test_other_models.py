"""Models that do more than speak: one that sees, and one that gives scores."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.context import JobContext
from jobs.errors import JobFailed
from jobs.exporters import export_all
from jobs.trained import Probe, TrainedModel
from schema.events import Warned
from schema.training import TRAINING_CONFIG
from tests.exports.conftest import Record, a_trained_model, read_json
from tests.exports.test_exporters import download
from tests.tiny_gemma_vision import build_tiny_gemma_vision

MakeContext = Callable[..., JobContext]


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """A LoRA of a Gemma that sees, whose language part alone was trained."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    base, folder = build_tiny_gemma_vision(tmp_path_factory.mktemp("seeing") / "base"), tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    targets = r".*language_model.*(q_proj|v_proj|up_proj)"
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(base), LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(folder)
    image = read_json(base / "config.json")["image_token_index"]
    probe = Probe("<bos>look", (2, *[image] * 4, 10, 11), 5)
    return a_trained_model(folder, base, (probe,), is_adapter=True)


def test_a_model_that_sees_is_merged_with_what_its_images_need(seeing: TrainedModel, a_context: MakeContext, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    context = with_config(a_context(), modality="vision", export_config={"format": "merged"})
    (merged,) = export_all(seeing, context)
    folder = download(context.stores.models, merged, tmp_path / "got")
    assert merged.fidelity
    assert merged.fidelity.argmax_agreement == 1.0
    assert AutoProcessor.from_pretrained(folder).image_processor.image_seq_length == 4
    found = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    before = AutoModelForImageTextToText.from_pretrained(seeing.base_folder).state_dict()
    changed = {name for name in before if not torch.equal(before[name], found[name])}
    assert len(changed) == 18  # three matrices of six layers
    assert all(".language_model.layers." in name for name in changed)


def test_a_model_that_sees_becomes_a_language_part_and_one_for_images(
    seeing: TrainedModel, a_context: MakeContext, record: Record, tmp_path: Path
) -> None:
    from gguf import GGUFReader

    export = {"include_gguf": True, "gguf_quantization": "f32"}
    context = with_config(a_context(), modality="vision", export_config=export)
    artifacts = {artifact.name: artifact for artifact in export_all(seeing, context)}
    assert list(artifacts) == ["adapter", "gguf-f32", "gguf-mmproj", "gguf-howto"]
    assert artifacts["gguf-f32"].fidelity  # of the language part; the row with an image cannot be heard without it
    assert artifacts["gguf-f32"].fidelity.argmax_agreement == 1.0
    assert artifacts["gguf-f32"].fidelity.perplexity is None
    projector = GGUFReader(context.stores.models.download(artifacts["gguf-mmproj"].key, tmp_path / "mmproj.gguf"))
    assert projector.fields["general.type"].contents() == "mmproj"
    assert projector.fields["clip.projector_type"].contents() == "gemma3"
    assert not [event for event in record.events if isinstance(event, Warned) and event.code == "no_mmproj"]


@pytest.fixture(scope="module")
def scoring(tiny: Path, probes: tuple[Probe, ...], tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """A LoRA of the tiny base that ends in a score."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("scoring")
    torch.manual_seed(5)
    base = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", exclude_modules="score", task_type="SEQ_CLS"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return a_trained_model(folder, tiny, probes, is_adapter=True)


def test_a_reward_model_gives_the_same_scores_after_its_merge(
    scoring: TrainedModel, tiny: Path, a_context: MakeContext, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    context = with_config(a_context(), trainer_type="reward", export_config={"format": "merged", "merged_dtype": "fp32"})
    (merged,) = export_all(scoring, context)
    folder = download(context.stores.models, merged, tmp_path / "got")
    assert merged.fidelity is None  # it does not speak
    config = read_json(folder / "config.json")
    assert config["architectures"] == ["Gemma3TextForSequenceClassification"]
    assert config["pad_token_id"] == 0
    found = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    base = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, str(scoring.folder))
    ids = torch.tensor([scoring.probes[0].input_ids])
    with torch.inference_mode():
        score = float(expected(input_ids=ids).logits)
        assert float(found(input_ids=ids).logits) == pytest.approx(score, abs=1e-4)
    assert abs(score) > 0.01


def test_a_reward_model_that_gives_no_numbers_is_refused(scoring: TrainedModel, a_context: MakeContext, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    folder.mkdir()
    for path in scoring.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: tensor * float("nan") for name, tensor in weights.items()}, folder / "adapter_model.safetensors")
    context = with_config(a_context(), trainer_type="reward", export_config={"format": "merged"})
    with pytest.raises(JobFailed, match="not finite"):
        export_all(replace(scoring, folder=folder), context)


def with_config(context: JobContext, **changes: Any) -> JobContext:
    """The same context with another training config."""
    config = TRAINING_CONFIG.validate_python({"base_model_id": "google/gemma-3-270m", "method": "LoRA"} | changes)
    return replace(context, spec=context.spec.model_copy(update={"training_config": config}))
