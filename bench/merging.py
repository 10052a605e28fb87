"""`python -m bench.merging STEP FOLDER`: one step of the export benchmark, in its own process and the trainer's environment.

    make       create FOLDER/base, a synthetic Gemma 3 with a billion parameters in bf16, and FOLDER/adapter, a LoRA for it
    streamed   merge tensor by tensor and convert to GGUF, as a job does
    whole      run peft's merge_and_unload on the base in float32, round to bf16 and save; then llama.cpp's converter
    whole-bf16 the same, but the base stays in bf16, where peft rounds twice

The last three print how long merging and converting took, and a digest of the tensors in the GGUF file. Importing the libraries is
not counted.
"""

import hashlib
import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path

from infra.gemma_270m import MODEL, cache_root

SHAPE = {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1}
GEMMA_1B = SHAPE | {"head_dim": 256, "vocab_size": 262144, "tie_word_embeddings": True}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def make_synthetic_model(folder: Path) -> None:
    """The weights are random: no merge method depends on their values."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = AutoModelForCausalLM.from_config(Gemma3TextConfig(architectures=["Gemma3ForCausalLM"], **GEMMA_1B))
    model.save_pretrained(folder / "base", max_shard_size="1GB")
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    adapted.save_pretrained(folder / "adapter")
    for name in TOKENIZER_FILES:
        shutil.copy(cache_root() / MODEL / name, folder / "base")


def merge_streamed(base: Path, adapter: Path, target: Path) -> None:
    """The merge of `jobs/llm/exporters/merge.py`."""
    import torch

    from jobs.llm.exporters.model_files import CONFIG_FILES, copy_files
    from jobs.llm.exporters.tensor_merge import load_adapter_delta, merge_tensors

    delta, _ = load_adapter_delta(base, adapter, "causal")
    merge_tensors(base, target, torch.bfloat16, delta)
    copy_files(base, target, CONFIG_FILES)


def merge_with_peft(base: Path, adapter: Path, target: Path, *, use_fp32: bool = True) -> None:
    """The merge that peft's documentation describes."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32 if use_fp32 else torch.bfloat16)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    merged.to(torch.bfloat16).save_pretrained(target, max_shard_size="1GB")


def measure(step: str, folder: Path) -> None:
    """Merge and convert once; print how long it took."""
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers

    from jobs.llm.llama_cpp import get_converter_path
    from jobs.llm.llama_cpp.runner import convert
    from jobs.runtime.subprocesses import run_program

    _ = transformers.AutoModelForCausalLM, transformers.Gemma3ForCausalLM  # imported lazily, on first access
    target, gguf = folder / step, folder / f"{step}.gguf"
    started_at, cpu_before_s = time.monotonic(), _cpu_s()
    if step == "streamed":
        merge_streamed(folder / "base", folder / "adapter", target)
    else:
        merge_with_peft(folder / "base", folder / "adapter", target, use_fp32=step == "whole")
    merged_s = time.monotonic() - started_at
    for name in TOKENIZER_FILES:
        shutil.copy(folder / "base" / name, target)
    if step == "streamed":
        convert(target, gguf, precision="bf16", name="synthetic")
    else:
        run_program("convert", [sys.executable, str(get_converter_path()), str(target), "--outtype", "bf16", "--outfile", str(gguf)])
    result = {"seconds": time.monotonic() - started_at, "merge_s": merged_s, "cpu_s": _cpu_s() - cpu_before_s, "peak_bytes": _peak_bytes()}
    print(json.dumps(result | {"digest": _tensor_digest(gguf)}))
    shutil.rmtree(target)
    gguf.unlink()


def _peak_bytes() -> int:
    """Peak memory of this process and of the children that it waited for."""
    return max(resource.getrusage(scope).ru_maxrss for scope in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024


def _cpu_s() -> float:
    """Processor time of this process, and of those that it waited for."""
    return sum(os.times()[:4])


def _tensor_digest(gguf: Path) -> str:
    """A digest of every tensor's name and bytes, sorted by name: the order in the file depends on how the shards were split."""
    from gguf import GGUFReader

    digest = hashlib.sha256()
    for tensor in sorted(GGUFReader(gguf).tensors, key=lambda tensor: tensor.name):
        digest.update(tensor.name.encode())
        digest.update(memoryview(tensor.data).cast("B"))
    return digest.hexdigest()


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make_synthetic_model(Path(sys.argv[2]))
    else:
        measure(sys.argv[1], Path(sys.argv[2]))
