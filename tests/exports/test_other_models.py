"""Exports of vision and reward models, and exports to ONNX."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.llm.exporters import check_exportable, export_all
from jobs.llm.trained_model import HeldOutExample, TrainedModel
from jobs.runtime.context import JobContext
from jobs.runtime.errors import JobFailed
from schema.events import DecisionMade, WarningRaised
from schema.training import TRAINING_CONFIG
from tests.exports.conftest import EventRecorder, fidelity_of, make_trained_model, read_json
from tests.exports.test_exporters import download_artifact
from tests.tiny_gemma import build_tiny_gemma
from tests.tiny_gemma_vision import build_tiny_gemma_vision

MakeContext = Callable[..., JobContext]


@pytest.fixture(scope="module")
def vision_adapter(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """A LoRA adapter for the language model of a vision-language Gemma."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    base, folder = build_tiny_gemma_vision(tmp_path_factory.mktemp("vision") / "base"), tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    targets = r".*language_model.*(q_proj|v_proj|up_proj)"
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(base), LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(folder)
    image_token = read_json(base / "config.json")["image_token_index"]
    example = HeldOutExample("<bos>look", (2, *[image_token] * 4, 10, 11), 5)
    return make_trained_model(folder, base, (example,), is_adapter=True)


def test_vision_model_is_merged_with_image_processor(vision_adapter: TrainedModel, make_context: MakeContext, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    context = with_config(make_context(), modality="vision", export_config={"format": "merged"})
    (merged,) = export_all(vision_adapter, context)
    folder = download_artifact(context.stores.models, merged, tmp_path / "downloaded")
    assert fidelity_of(merged).argmax_agreement == 1.0
    assert AutoProcessor.from_pretrained(folder).image_processor.image_seq_length == 4
    merged_weights = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    base_weights = AutoModelForImageTextToText.from_pretrained(vision_adapter.base_folder).state_dict()
    changed = {name for name in base_weights if not torch.equal(base_weights[name], merged_weights[name])}
    assert len(changed) == 18  # three matrices of six layers
    assert all(".language_model.layers." in name for name in changed)


def test_vision_model_exports_language_gguf_and_mmproj(
    vision_adapter: TrainedModel, make_context: MakeContext, record: EventRecorder, tmp_path: Path
) -> None:
    from gguf import GGUFReader

    export = {"include_gguf": True, "gguf_quantization": "f32"}
    context = with_config(make_context(), modality="vision", export_config=export)
    artifacts = {artifact.name: artifact for artifact in export_all(vision_adapter, context)}
    assert list(artifacts) == ["adapter", "gguf-f32", "gguf-mmproj"]
    assert fidelity_of(artifacts["gguf-f32"]).argmax_agreement == 1.0
    assert fidelity_of(artifacts["gguf-f32"]).perplexity is None
    projector = GGUFReader(context.stores.models.download(artifacts["gguf-mmproj"].key, tmp_path / "mmproj.gguf"))
    assert projector.fields["general.type"].contents() == "mmproj"
    assert projector.fields["clip.projector_type"].contents() == "gemma3"
    assert not [event for event in record.events if isinstance(event, WarningRaised) and event.code == "mmproj_not_exported"]
    assert [event.value for event in record.events if isinstance(event, DecisionMade) and event.setting == "fidelity_texts"] == [
        "built-in texts"
    ]


@pytest.fixture(scope="module")
def reward_adapter(
    tiny_base: Path, held_out_examples: tuple[HeldOutExample, ...], tmp_path_factory: pytest.TempPathFactory
) -> TrainedModel:
    """A LoRA adapter of the tiny base with a score head."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(5)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", exclude_modules="score", task_type="SEQ_CLS"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    return make_trained_model(folder, tiny_base, held_out_examples, is_adapter=True)


def test_merged_reward_model_gives_same_scores(
    reward_adapter: TrainedModel, tiny_base: Path, make_context: MakeContext, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    context = with_config(make_context(), trainer_type="reward", export_config={"format": "merged", "merged_dtype": "fp32"})
    (merged,) = export_all(reward_adapter, context)
    folder = download_artifact(context.stores.models, merged, tmp_path / "downloaded")
    assert merged.fidelity is None  # it gives no next-token probabilities
    config = read_json(folder / "config.json")
    assert config["architectures"] == ["Gemma3TextForSequenceClassification"]
    assert config["pad_token_id"] == 0
    merged_model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, str(reward_adapter.folder))
    ids = torch.tensor([reward_adapter.held_out_examples[0].input_ids])
    with torch.inference_mode():
        score = float(expected(input_ids=ids).logits)
        assert float(merged_model(input_ids=ids).logits) == pytest.approx(score, abs=1e-4)
    assert abs(score) > 0.01


def test_non_finite_reward_model_is_rejected(reward_adapter: TrainedModel, make_context: MakeContext, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    folder.mkdir()
    for path in reward_adapter.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: tensor * float("nan") for name, tensor in weights.items()}, folder / "adapter_model.safetensors")
    context = with_config(make_context(), trainer_type="reward", export_config={"format": "merged"})
    with pytest.raises(JobFailed, match="not finite"):
        export_all(replace(reward_adapter, folder=folder), context)


def with_config(context: JobContext, **changes: Any) -> JobContext:
    """The same context with another training config."""
    config = TRAINING_CONFIG.validate_python({"base_model_id": "google/gemma-3-270m", "method": "LoRA"} | changes)
    return replace(context, spec=context.spec.model_copy(update={"training_config": config}))


def test_small_model_exports_to_onnx(make_context: MakeContext, tmp_path: Path) -> None:
    import numpy as np
    import onnxruntime
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = make_two_layer_model(tmp_path / "small")
    context = with_config(make_context("Full"), method="Full", export_config={"format": "onnx"})
    (artifact,) = export_all(trained, context)
    folder = download_artifact(context.stores.models, artifact, tmp_path / "downloaded")
    assert (artifact.kind, artifact.key) == ("onnx", "onnx_models/job-1/attempt-1/")
    assert {path.name for path in folder.iterdir()} >= {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json", "fidelity.json"}
    assert fidelity_of(artifact).argmax_agreement == 1.0
    assert fidelity_of(artifact).mean_kl_to_merged < 1e-6
    ids = AutoTokenizer.from_pretrained(folder)(["the list of files", "the path of it"], return_tensors="pt", padding=True)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in ids.items() if name != "token_type_ids"})
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(trained.folder, dtype=torch.float32)(**ids).logits.numpy()
    attended = ids["attention_mask"].numpy().astype(bool)
    assert np.abs(logits - expected)[attended].max() < 1e-4


def test_model_too_large_for_onnx_is_rejected_before_training(tmp_path: Path, make_context: MakeContext) -> None:
    import struct

    header = b'{"weight":{"dtype":"BF16","shape":[2000000,1000],"data_offsets":[0,4000000000]}}'
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    config = with_config(make_context(), export_config={"format": ["adapter", "onnx"]}).spec.training_config
    check_exportable(config)  # the base is not downloaded yet
    with pytest.raises(JobFailed, match=r"up to 1\.5 billion parameters, and this one has 2\.0") as caught:
        check_exportable(config, tmp_path)
    assert caught.value.failure.code == "invalid_config"


def test_missing_imatrix_program_is_rejected_before_training(make_context: MakeContext, tmp_path: Path) -> None:
    export_config = {"include_gguf": True, "gguf_quantization": "q4_k_m", "gguf_imatrix": True}
    config = with_config(make_context(), export_config=export_config).spec.training_config
    check_exportable(config)
    with pytest.raises(JobFailed, match="llama-imatrix, which is not installed"):
        check_exportable(config, llama_cpp_folder=tmp_path)


def make_two_layer_model(folder: Path) -> TrainedModel:
    """A full model that is its own base, with two layers: tracing takes seconds for each."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    build_tiny_gemma(folder)
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers, config.layer_types, config.sliding_window = 2, ["sliding_attention", "full_attention"], 16
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(folder)
    ids = tuple(AutoTokenizer.from_pretrained(folder).encode("it returns a list of name value string and a path of the list of files"))
    return make_trained_model(folder, folder, (HeldOutExample("it", ids, 2),), is_adapter=False)
