"""The tensor-by-tensor merge: bit-identical to peft's, with one tensor in memory."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.llm.exporters.model_files import WEIGHTS_INDEX_FILE, list_weight_files, read_precision
from jobs.llm.exporters.tensor_merge import (
    AdapterDelta,
    DtypeOverflow,
    MergeError,
    NotFinite,
    RowUpdate,
    load_adapter_delta,
    merge_tensors,
    read_header,
)
from tests.exports.conftest import read_json

TURN_TOKENS = [4, 5]

# Any: arguments of LoraConfig.
ADAPTER_OPTIONS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "token rows": {"trainable_token_indices": TURN_TOKENS},
    "whole modules": {"modules_to_save": ["norm"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.fixture(scope="module")
def bases(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny base in bfloat16 in one file, and in float32 in several files."""
    import torch
    from transformers import AutoModelForCausalLM

    sharded = tmp_path_factory.mktemp("sharded")
    AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).save_pretrained(sharded, max_shard_size="500KB")
    assert len(list_weight_files(sharded)) > 2
    return {"bf16": tiny_base, "f32": sharded}


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Makes an adapter in which every trainable weight is changed."""

    def make(base: Path, **options: Any) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **({"target_modules": "all-linear"} | options))
        adapted = get_peft_model(model, config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        adapted.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return make


@pytest.mark.parametrize("options", ADAPTER_OPTIONS)
@pytest.mark.parametrize("precision", ["bf16", "f32"])
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings")
def test_every_tensor_matches_peft_merge(
    bases: dict[str, Path], make_adapter: Callable[..., Path], tmp_path: Path, precision: str, options: str
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter, dtype = make_adapter(bases[precision], **ADAPTER_OPTIONS[options]), {"bf16": torch.bfloat16, "f32": torch.float32}[precision]
    delta, _ = load_adapter_delta(bases[precision], adapter, "causal")
    merge_tensors(bases[precision], tmp_path / "merged", dtype, delta)
    shutil.copy(bases[precision] / "config.json", tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(bases[precision], dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload(safe_merge=True).to(dtype).state_dict()
    before = AutoModelForCausalLM.from_pretrained(bases[precision], dtype=dtype).state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype).state_dict()
    assert all(torch.equal(merged[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in expected)
    assert sum(not torch.equal(merged[name], before[name]) for name in expected) >= len(delta.changed_names)
    assert [path.name for path in sorted((tmp_path / "merged").glob("*.safetensors"))] == list_weight_files(bases[precision])


def test_only_trained_token_rows_change(bases: dict[str, Path], make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    delta, _ = load_adapter_delta(bases["bf16"], make_adapter(bases["bf16"], **ADAPTER_OPTIONS["token rows"]), "causal")
    merge_tensors(bases["bf16"], tmp_path / "merged", torch.bfloat16, delta)
    before, after = (
        load_file(folder / "model.safetensors")["model.embed_tokens.weight"] for folder in (bases["bf16"], tmp_path / "merged")
    )
    assert (before != after).any(dim=1).nonzero().flatten().tolist() == TURN_TOKENS


def test_shard_index_has_new_total_size(bases: dict[str, Path], tmp_path: Path) -> None:
    import torch

    merge_tensors(bases["f32"], tmp_path, torch.bfloat16)
    index = read_json(tmp_path / WEIGHTS_INDEX_FILE)
    assert read_precision(tmp_path) == "bf16"
    assert index["metadata"]["total_size"] == sum(
        tensor.size_bytes for name in list_weight_files(tmp_path) for tensor in read_header(tmp_path / name)
    )
    assert index["weight_map"] == read_json(bases["f32"] / WEIGHTS_INDEX_FILE)["weight_map"]


def test_output_is_readable_by_safetensors(bases: dict[str, Path], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    merge_tensors(bases["bf16"], tmp_path, torch.bfloat16)
    original, copy = load_file(bases["bf16"] / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert original.keys() == copy.keys()
    assert all(torch.equal(original[name], copy[name]) for name in original)
    counts = {"steps": torch.arange(5), "flags": torch.tensor([True, False]), "half": torch.ones(3, dtype=torch.float16)}
    (tmp_path / "mixed").mkdir()
    save_file(counts, tmp_path / "mixed/model.safetensors")
    merge_tensors(tmp_path / "mixed", tmp_path / "out", torch.float32)
    written = load_file(tmp_path / "out/model.safetensors")
    assert {name: tensor.dtype for name, tensor in written.items()} == {"steps": torch.int64, "flags": torch.bool, "half": torch.float32}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's memory from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    (tmp_path / "base").mkdir()
    save_file({f"layer.{i}": torch.zeros(1024, 1024) for i in range(40)}, tmp_path / "base/model.safetensors")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _process_memory_bytes("VmRSS")
    merge_tensors(tmp_path / "base", tmp_path / "out", torch.bfloat16, AdapterDelta(merge_functions={"layer.7": lambda weight: weight + 1}))
    assert _process_memory_bytes("VmHWM") - before < 60e6  # the model has 168 MB, a tensor 4 MB


def test_float16_overflow_is_rejected_by_name(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"small": torch.ones(4), "large": torch.tensor([1e5])}, tmp_path / "model.safetensors")
    merge_tensors(tmp_path, tmp_path / "bf16", torch.bfloat16)
    with pytest.raises(DtypeOverflow, match="large"):
        merge_tensors(tmp_path, tmp_path / "f16", torch.float16)


def test_nan_is_rejected_by_name(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"whole": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    delta = AdapterDelta(row_updates={"whole": RowUpdate((1,), torch.tensor([[1.0, float("nan")]]))})
    with pytest.raises(NotFinite, match="whole"):
        merge_tensors(tmp_path, tmp_path / "out", torch.float32, delta)


def test_adapter_of_another_base_is_rejected(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"here": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(MergeError, match="have no elsewhere"):
        merge_tensors(tmp_path, tmp_path / "out", torch.float32, AdapterDelta(merge_functions={"elsewhere": lambda weight: weight}))


def test_tensors_missing_in_base_are_added(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    save_file({"body": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    merge_tensors(tmp_path, tmp_path / "out", torch.float32, AdapterDelta(replacements={"score.weight": torch.full((1, 2), 3.0)}))
    written = load_file(tmp_path / "out/model.safetensors")
    assert written["score.weight"].tolist() == [[3.0, 3.0]]
    assert written["body"].tolist() == [[1.0, 1.0], [1.0, 1.0]]


def _process_memory_bytes(name: str) -> int:
    """A field of /proc/self/status in bytes, such as VmHWM, the peak memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
