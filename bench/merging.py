"""`python -m bench.merging STEP FOLDER`: one step of the benchmark of exports, in a process of its own, in the trainer's environment.

    make       FOLDER/base, a synthetic Gemma 3 of a billion parameters in bf16, and FOLDER/adapter, a LoRA of it
    streamed   merged and converted to GGUF as a job does it, tensor by tensor
    whole      peft's merge_and_unload of the base in float32, rounded to bf16 and saved; llama.cpp's converter
    whole-bf16 the same with the base in bf16 all the time, where peft rounds twice

The last three print the seconds that merging and converting took, and a digest of the tensors in the GGUF file. What the process
itself imports is not counted.
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
    """Random weights: neither way looks at what they are."""
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
    """As `jobs/llm/exporters/merge.py` writes it."""
    import torch

    from jobs.llm.exporters.model_files import CONFIG_FILES, copy_files
    from jobs.llm.exporters.tensor_merge import load_adapter_delta, merge_tensors

    changes, _ = load_adapter_delta(base, adapter, "causal")
    merge_tensors(base, target, torch.bfloat16, changes)
    copy_files(base, target, CONFIG_FILES)


def merge_with_peft(base: Path, adapter: Path, target: Path, *, use_fp32: bool = True) -> None:
    """As peft's documentation has it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32 if use_fp32 else torch.bfloat16)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    merged.to(torch.bfloat16).save_pretrained(target, max_shard_size="1GB")


def measure(step: str, folder: Path) -> None:
    """Merge and convert once, and tell how long it took."""
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers

    from jobs.llm.llama_cpp import get_converter_path
    from jobs.llm.llama_cpp.runner import convert
    from jobs.runtime.subprocesses import run_program

    _ = transformers.AutoModelForCausalLM, transformers.Gemma3ForCausalLM  # they are imported when they are first named
    target, gguf = folder / step, folder / f"{step}.gguf"
    began, used = time.monotonic(), _cpu_s()
    if step == "streamed":
        merge_streamed(folder / "base", folder / "adapter", target)
    else:
        merge_with_peft(folder / "base", folder / "adapter", target, use_fp32=step == "whole")
    merged_s = time.monotonic() - began
    for name in TOKENIZER_FILES:
        shutil.copy(folder / "base" / name, target)
    if step == "streamed":
        convert(target, gguf, precision="bf16", name="synthetic")
    else:
        run_program("convert", [sys.executable, str(get_converter_path()), str(target), "--outtype", "bf16", "--outfile", str(gguf)])
    taken = {"seconds": time.monotonic() - began, "merge_s": merged_s, "cpu_s": _cpu_s() - used, "peak_bytes": _peak_bytes()}
    print(json.dumps(taken | {"digest": _tensor_digest(gguf)}))
    shutil.rmtree(target)
    gguf.unlink()


def _peak_bytes() -> int:
    """The most memory that this process had so far, or one that it waited for."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024


def _cpu_s() -> float:
    """Processor time of this process, and of those that it waited for."""
    return sum(os.times()[:4])


def _tensor_digest(gguf: Path) -> str:
    """Of every tensor's name and bytes. The order in the file is that of the shards, which are cut differently."""
    from gguf import GGUFReader

    found = hashlib.sha256()
    for tensor in sorted(GGUFReader(gguf).tensors, key=lambda tensor: tensor.name):
        found.update(tensor.name.encode())
        found.update(memoryview(tensor.data).cast("B"))
    return found.hexdigest()


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make_synthetic_model(Path(sys.argv[2]))
    else:
        measure(sys.argv[1], Path(sys.argv[2]))
