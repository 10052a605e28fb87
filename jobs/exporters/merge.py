"""The whole model: an adapter merged into its base, or a fully trained model as it is; and how it speaks beside its base."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.errors import JobFailed
from jobs.exporters.folders import (
    MODEL_FILES,
    copy_files,
    copy_licence,
    copy_tokenizer,
    mend_generation_config,
    precision,
    size_bytes,
    weights,
)
from jobs.exporters.speech import load_model, log_probs_of, passages_of, write_log_probs
from jobs.llama.fidelity import Comparison, Passage, compare

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from jobs.context import JobContext
    from jobs.trained import TrainedModel

DIVERGED_HINT = "the training has diverged; lower learning_rate, or raise warmup_ratio"

# Rounding the sum to bfloat16 moves Gemma 270M by a mean KL of 0.00006 nats; a merge that went wrong moves it by whole ones.
NEAR_KL_NATS = 0.02
NEAR_AGREEMENT = 0.97


@dataclass(frozen=True)
class WholeModel:
    """A model that needs no adapter, with the log probabilities of it and of its base on the passages."""

    folder: Path
    passages: tuple[Passage, ...]
    log_probs: Path
    base_log_probs: Path | None  # None when training changed the size of the vocabulary
    comparison: Comparison | None  # with base and adapter before they were merged; None for a fully trained model


def merge(trained: "TrainedModel", tokenizer: "PreTrainedTokenizerBase", bench: Path, context: "JobContext") -> WholeModel:
    """Add the adapter to its base and save the sum in the base's own precision. Raises JobFailed.

    What is compared is what was saved, read back, with base and adapter side by side before they were merged.
    """
    from peft import PeftModel

    folder, (dtype, device) = bench / "merged", _arithmetic(trained.base_folder, context)
    passages = passages_of(trained.probes, tokenizer)
    base = load_model(trained.base_folder, dtype, device)
    base_log_probs = _speak(base, passages, bench / "base.npy", context)
    adapted = PeftModel.from_pretrained(base, str(trained.folder))
    adapted_log_probs = _speak(adapted, passages, bench / "adapted.npy", context)
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:  # peft's word for weights that are not finite
        raise JobFailed("export_failed", "the adapter's weights are not finite numbers", DIVERGED_HINT) from error
    merged.to(_own_dtype(trained.base_folder)).save_pretrained(folder)
    del base, adapted, merged
    gc.collect()  # one model in memory at a time
    copy_tokenizer(trained.folder, folder)
    copy_licence(trained.base_folder, folder)
    mend_generation_config(folder, tokenizer)
    context.check()
    log_probs = _speak(load_model(folder, dtype, device), passages, bench / "merged.npy", context)
    comparison = _judge(log_probs, adapted_log_probs, base_log_probs)
    adapted_log_probs.unlink()
    return WholeModel(folder, passages, log_probs, base_log_probs, comparison)


def adopt(trained: "TrainedModel", tokenizer: "PreTrainedTokenizerBase", bench: Path, context: "JobContext") -> WholeModel:
    """Take a fully trained model as it is, without what its trainer left beside it. Raises JobFailed."""
    folder, (dtype, device) = bench / "merged", _arithmetic(trained.folder, context)
    copy_files(trained.folder, folder, [*MODEL_FILES, *weights(trained.folder)])
    copy_tokenizer(trained.folder, folder)
    copy_licence(trained.base_folder, folder)
    mend_generation_config(folder, tokenizer)
    passages = passages_of(trained.probes, tokenizer)
    log_probs = _speak(load_model(folder, dtype, device), passages, bench / "merged.npy", context)
    gc.collect()
    base = load_model(trained.base_folder, dtype, device)
    base_log_probs = _speak(base, passages, bench / "base.npy", context)
    return WholeModel(folder, passages, log_probs, base_log_probs if _same_shape(log_probs, base_log_probs) else None, None)


def _arithmetic(folder: Path, context: "JobContext") -> "tuple[torch.dtype, str]":
    """How exactly to compute, and where: in float32 where it fits.

    It is for the sake of what is compared: bfloat16 alone moves Gemma 270M by a mean KL of 0.0004 nats, f16 files by 0.000003.
    The merged weights come out the same, for peft adds in float32 either way.
    """
    import psutil
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    wide = size_bytes(folder) * (1 if precision(folder) == "f32" else 2)
    if wide * 1.5 < free:  # half as much again for one layer's merge, the activations and the logits
        return torch.float32, device
    context.decided("compare_in", "bfloat16", f"{wide / 1e9:.1f} GB of float32 weights do not fit into {free / 1e9:.1f} GB of free memory")
    return torch.bfloat16, device


def _speak(model: "torch.nn.Module", passages: tuple[Passage, ...], path: Path, context: "JobContext") -> Path:
    """Keep a model's log probabilities. Raises JobFailed when they are no numbers, and Stopped."""
    context.check()
    try:
        return write_log_probs(model, passages, path)
    except FloatingPointError as error:
        raise JobFailed("export_failed", f"the {path.stem} model answers with numbers that are not finite", DIVERGED_HINT) from error


def _own_dtype(folder: Path) -> "torch.dtype":
    import torch

    return {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[precision(folder)]


def _judge(merged: Path, adapted: Path, base: Path) -> Comparison:
    found = compare(log_probs_of(merged), log_probs_of(adapted), log_probs_of(base))
    if found.mean_kl_to_trained > NEAR_KL_NATS or found.argmax_agreement < NEAR_AGREEMENT:
        message = (
            f"the merged model does not speak like base and adapter together: they agree on {found.argmax_agreement:.1%} "
            f"of {found.positions} tokens, mean KL {found.mean_kl_to_trained:.4f}, largest difference {found.max_difference:.3g} nats"
        )
        raise JobFailed("export_failed", message, "export format 'adapter' keeps what was trained; please report this with the job's log")
    return found


def _same_shape(one: Path, other: Path) -> bool:
    return log_probs_of(one).shape == log_probs_of(other).shape
