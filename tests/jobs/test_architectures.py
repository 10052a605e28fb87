"""One tiny model of every architecture: the loss of its own head, its adapters, and, in the nightly run, the whole matrix."""

from pathlib import Path
from typing import Any

import pytest

from jobs.llm.chat_format import choose_chat_format
from jobs.llm.data.tokenize import IGNORE_INDEX, RowTokenizer
from jobs.llm.data.turns import Turns
from jobs.llm.experts import choose_expert_adapters
from jobs.llm.llama_cpp.draft_head import list_draft_head_options
from jobs.llm.loss import ChunkedLmHeadLoss
from jobs.llm.training_context import load_tokenizer
from tests.jobs.architectures import list_conversations, make_architecture_spec, make_rows, put_tiny_model, run_architecture
from tests.jobs.conftest import EventRecorder, load_trainer, load_weights, make_context
from tests.tiny_models import ARCHITECTURES

LINEAR_LAYERS = {
    "gemma2": "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
    "phi3": "down_proj, gate_up_proj, o_proj, qkv_proj",
    "lfm2": "in_proj, k_proj, out_proj, q_proj, v_proj, w1, w2, w3",
    "qwen3_moe": "k_proj, o_proj, q_proj, v_proj",
}


@pytest.fixture(scope="module")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


def load_tiny(name: str, store: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(put_tiny_model(name, store), dtype=torch.float32)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_at_the_labels_equals_the_loss_of_all_logits(tiny_store: Path, name: str) -> None:
    import torch

    model = load_tiny(name, tiny_store)
    ids = torch.arange(60).reshape(2, 30) * 7 % model.config.vocab_size
    labels = ids.clone()
    labels[:, :11] = IGNORE_INDEX
    loss = ChunkedLmHeadLoss(model).compute_loss(model, {"input_ids": ids}, labels)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    gradients = [torch.autograd.grad(value, model.get_input_embeddings().weight)[0] for value in (loss, expected)]
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("name", ["gemma2", "qwen3_moe", "lfm2"])
def test_training_adapts_every_layer_and_says_what_it_chose(tiny_store: Path, tmp_path: Path, name: str) -> None:
    put_tiny_model(name, tiny_store)
    record = EventRecorder()
    spec = make_architecture_spec(name, tiny_store, ["single turn"], max_steps=2)
    trained = load_trainer(spec)(spec.training_config, make_context(spec, tmp_path, record))
    assert record.decisions["attn_implementation"] == ARCHITECTURES[name].attention
    assert record.decisions["target_modules"] == LINEAR_LAYERS[name]
    assert ("target_parameters" in record.decisions) == ARCHITECTURES[name].experts
    assert "experts_not_adapted" not in record.warnings
    weights = {key: tensor for key, tensor in load_weights(trained.folder).items() if "lora_B" in key}
    assert any("experts" in key for key in weights) == ARCHITECTURES[name].experts
    assert all(bool(tensor.any()) for tensor in weights.values())


@pytest.mark.parametrize(
    ("hyperparameters", "reason"),
    [
        ({"lora_dropout": 0.1}, "set lora_dropout to 0"),
        ({"use_dora": True}, "set use_dora to false"),
        ({"target_modules": ["q_proj"]}, "experts are not linear layers"),
        ({"lora_init": "pissa"}, "use 'default'"),
        ({"lora_rank": 65}, "lora_rank 65 is above the width of the experts, which is 64"),
    ],
)
def test_experts_are_not_adapted_where_peft_cannot(tiny_store: Path, hyperparameters: dict[str, Any], reason: str) -> None:
    model = load_tiny("qwen3_moe", tiny_store)
    spec = make_architecture_spec("qwen3_moe", tiny_store, [], **hyperparameters)
    adapters = choose_expert_adapters(model, spec.training_config.hyperparameters)
    assert adapters.problem is not None
    assert reason in adapters.problem
    assert adapters.target_parameters == ()


def test_experts_without_adapters_get_a_warning(tiny_store: Path, tmp_path: Path) -> None:
    put_tiny_model("qwen3_moe", tiny_store)
    record = EventRecorder()
    spec = make_architecture_spec("qwen3_moe", tiny_store, ["single turn"], max_steps=1, lora_dropout=0.1)
    trained = load_trainer(spec)(spec.training_config, make_context(spec, tmp_path, record))
    assert "the experts, 0.1 million numbers, are not adapted" in record.warnings["experts_not_adapted"]
    assert "set lora_dropout to 0" in record.warnings["experts_not_adapted"]
    assert not any("experts" in key for key in load_weights(trained.folder))


def test_gates_narrower_than_the_rank_are_left_out(tiny_store: Path) -> None:
    from jobs.llm.model import lora_config

    model = load_tiny("qwen3_5", tiny_store)
    put_tiny_model("qwen3_5", tiny_store)

    def list_targets(**hyperparameters: Any) -> set[str]:
        spec = make_architecture_spec("qwen3_5", tiny_store, [], **hyperparameters)
        return set(lora_config(spec.training_config, model).target_modules)

    assert list_targets(lora_rank=4) - list_targets(lora_rank=8) == {"in_proj_a", "in_proj_b"}  # one number for each of four heads
    assert list_targets(lora_rank=4, target_modules=["in_proj_a"]) == {"in_proj_a"}


@pytest.mark.parametrize("name", [name for name, architecture in ARCHITECTURES.items() if architecture.experts])
def test_merged_experts_equal_those_that_peft_merges(tiny_store: Path, tmp_path: Path, name: str) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    from jobs.llm.exporters.tensor_merge import load_adapter_delta, merge_tensors

    base, targets = put_tiny_model(name, tiny_store), ["experts.down_proj", "experts.gate_up_proj"]
    adapted = get_peft_model(
        load_tiny(name, tiny_store), LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets, init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    delta, _ = load_adapter_delta(base, tmp_path / "adapter", "causal")
    merge_tensors(base, tmp_path / "merged", torch.float32, delta)
    PeftModel.from_pretrained(load_tiny(name, tiny_store), str(tmp_path / "adapter")).merge_and_unload().save_pretrained(tmp_path / "peft")
    merged, expected = load_weights(tmp_path / "merged"), load_weights(tmp_path / "peft")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[key], tensor) for key, tensor in expected.items())
    assert sum(not torch.equal(load_weights(base)[key], tensor) for key, tensor in merged.items() if "experts" in key) > 0


def test_converter_looks_for_draft_layers_only_where_they_are(tiny_store: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    base = put_tiny_model("qwen3_5", tiny_store)
    assert list_draft_head_options(base) == ["--no-mtp"]
    assert list_draft_head_options(put_tiny_model("qwen3", tiny_store)) == []
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    save_file({"mtp.fc.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert list_draft_head_options(tmp_path) == []


@pytest.mark.nightly
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_trains_resumes_and_exports_faithfully(tiny_store: Path, tmp_path: Path, name: str) -> None:
    outcome = run_architecture(name, tiny_store, tmp_path)
    assert outcome.attention == ARCHITECTURES[name].attention
    assert {"merged", "gguf-f16"} <= outcome.artifacts.keys()
    assert outcome.passes


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["gemma2", "qwen3_5", "qwen3_moe"])
def test_whole_models_train_resume_and_export_faithfully(tiny_store: Path, tmp_path: Path, name: str) -> None:
    outcome = run_architecture(name, tiny_store, tmp_path, method="Full")
    assert outcome.resumes_exactly
    fidelity = outcome.artifacts["gguf-f16"].fidelity
    assert fidelity is not None
    assert fidelity["argmax_agreement"] == 1.0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_kind_of_conversation_is_labeled(tiny_store: Path, name: str) -> None:
    base = put_tiny_model(name, tiny_store)
    tokenizer = load_tokenizer(base, name)
    for kind in list_conversations(base):
        row = make_rows(kind, 1)[0]
        sample = Turns(row["messages"], row.get("tools"))
        config = make_architecture_spec(name, tiny_store, []).training_config
        example = RowTokenizer(tokenizer, choose_chat_format(tokenizer, config, [sample])).tokenize(row, "messages")
        learned = tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX])
        said = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        assert all(text in learned for text in said)
        assert not any(message["content"] in learned for message in row["messages"] if message["role"] == "user")
        assert ("read" in learned and "path" in learned) == (kind == "tools")
