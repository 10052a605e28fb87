"""The whole model: an adapter merged into its base, or a fully trained model as it is; and how it speaks beside its base."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.exporters.log_probs import compute_scores, load_log_probs, load_model, write_log_probs
from jobs.llm.exporters.model_files import (
    CONFIG_FILES,
    MODEL_FILES,
    PROCESSOR_FILES,
    Precision,
    copy_files,
    copy_license,
    copy_tokenizer,
    list_weight_files,
    measure_weights_bytes,
    read_precision,
    set_config_dtype,
    set_generation_eos,
    to_torch_dtype,
)
from jobs.llm.exporters.tensor_merge import (
    NO_CHANGES,
    DtypeOverflow,
    MergeError,
    ModelKind,
    NotFinite,
    load_adapter_delta,
    merge_tensors,
    read_num_labels,
)
from jobs.llm.llama_cpp.fidelity import Comparison, Passage, compare, has_agreement, list_targets
from jobs.runtime.errors import JobFailed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from jobs.llm.trained_model import TrainedModel
    from jobs.runtime.context import JobContext

DIVERGED_HINT = "the training has diverged; lower learning_rate, or raise warmup_ratio"
OVERFLOW_HINT = "float16 ends at 65504; use merged_dtype bf16 or fp32"
ROUNDING_HINT = "merged_dtype 'fp32', and the adapter, have all of it"
KEEP_ADAPTER_HINT = "export format 'adapter' keeps what was trained; please report this with the job's log"

# Rounding the sum to bfloat16 moves Gemma 270M by a mean KL of 0.00006 nats, and by 0.008 after a training of a few small steps, of which
# much is below the last digit; a merge that went wrong moves it by whole ones.
MAX_MERGE_KL_NATS = 0.02
MIN_MERGE_AGREEMENT = 0.97
MAX_MERGE_SCORE_DIFFERENCE = 0.05  # of a reward model: of the size of its scores


@dataclass(frozen=True)
class MergeSpec:
    """What a whole model is made of, and how it is to be."""

    trained: "TrainedModel"
    model_kind: ModelKind
    tokenizer: "PreTrainedTokenizerBase"
    passages: tuple[Passage, ...]
    dtype: Precision | None  # None: the base's own
    dtype_and_device: "tuple[torch.dtype, str]"  # of what is compared: how exactly, and on which device (`arithmetic`)
    workspace_folder: Path
    context: "JobContext"


@dataclass(frozen=True)
class ReferenceLogProbs:
    """How a whole model speaks, and its base: log probabilities at the compared positions of the passages."""

    passages: tuple[Passage, ...]
    log_probs: Path
    base_log_probs: Path | None  # None when training changed the size of the vocabulary
    comparison: Comparison | None  # with what was trained, before it was merged or rounded; None where it was neither

    def request_fields(self) -> dict[str, Any]:  # the fields of a ComparisonRequest
        """What a child process needs to compare a file with this model."""
        base = str(self.base_log_probs) if self.base_log_probs else None
        return {"passages": list(self.passages), "trained_log_probs": str(self.log_probs), "base_log_probs": base}


@dataclass(frozen=True)
class MergedModel:
    """A model that needs no adapter. One that gives scores does not speak."""

    folder: Path
    reference_log_probs: ReferenceLogProbs | None


@dataclass(frozen=True)
class BaselineOutputs:
    """What was heard before anything was written: of the base, and of the trained model with its adapter, or unrounded."""

    base_log_probs: Path | None = None
    trained_log_probs: Path | None = None
    scores: Sequence[float] = ()


def merge_model(merge_spec: MergeSpec) -> MergedModel:
    """The trained model as one that needs no adapter, checked. Raises JobFailed, and Stopped.

    What is compared is what was written, read back, with base and adapter side by side before they were merged.
    """
    trained, folder = merge_spec.trained, merge_spec.workspace_folder / "merged"
    wanted = merge_spec.dtype or read_precision(trained.base_folder)
    changes = trained.is_adapter or wanted != read_precision(trained.folder)
    heard = _baseline_outputs(merge_spec, changes=changes)
    gc.collect()  # one model in memory at a time
    if changes:
        _write_merged(merge_spec, folder, wanted)
    else:
        copy_files(trained.folder, folder, [*MODEL_FILES, *list_weight_files(trained.folder)])
    copy_files(trained.base_folder, folder, PROCESSOR_FILES)
    copy_tokenizer(trained.folder, folder)
    copy_license(trained.base_folder, folder)
    if merge_spec.model_kind != "score":
        set_generation_eos(folder, merge_spec.tokenizer)
    merge_spec.context.check_stop()
    return MergedModel(folder, _verify_merged(merge_spec, folder, heard))


def choose_compute_dtype(base: Path, context: "JobContext") -> "tuple[torch.dtype, str]":
    """How exactly to compute what is compared, and where: in float32 where it fits.

    bfloat16 alone moves Gemma 270M by a mean KL of 0.0004 nats, f16 files by 0.000003.
    """
    import psutil
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    wide = measure_weights_bytes(base) * (1 if read_precision(base) == "f32" else 2)
    if wide * 1.5 < free:  # half as much again for the activations and the logits
        return torch.float32, device
    context.log_decision(
        "fidelity_dtype", "bfloat16", f"{wide / 1e9:.1f} GB of float32 weights do not fit into {free / 1e9:.1f} GB of free memory"
    )
    return torch.bfloat16, device


# --- writing it ---


def _write_merged(merge_spec: MergeSpec, folder: Path, target_precision: Precision) -> None:
    """Base and adapter, or the trained model alone, in the wanted precision. Raises JobFailed."""
    trained = merge_spec.trained
    source = trained.base_folder if trained.is_adapter else trained.folder
    try:
        changes, model = load_adapter_delta(source, trained.folder, merge_spec.model_kind) if trained.is_adapter else (NO_CHANGES, None)
        merge_tensors(source, folder, to_torch_dtype(target_precision), changes)
    except DtypeOverflow as error:
        raise JobFailed("export_failed", f"{error} has numbers that are too large for {target_precision}", OVERFLOW_HINT) from error
    except NotFinite as error:
        raise JobFailed("export_failed", f"the trained weights are not finite numbers, {error} for one", DIVERGED_HINT) from error
    except MergeError as error:
        raise JobFailed("export_failed", f"the adapter cannot be merged: {error}", KEEP_ADAPTER_HINT) from error
    copy_files(source, folder, CONFIG_FILES)
    if merge_spec.model_kind == "score" and model is not None:
        _write_reward_config(model, merge_spec.tokenizer, folder)
    set_config_dtype(folder, str(to_torch_dtype(target_precision)).removeprefix("torch."))


def _write_reward_config(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """The base's settings tell of a model that speaks; this one ends in scores, and needs to know what padding is."""
    model.config.architectures = [type(model).__name__]
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    (folder / "config.json").unlink()  # a link to the base's
    model.config.save_pretrained(folder)


# --- hearing it ---


def _baseline_outputs(merge_spec: MergeSpec, *, changes: bool) -> BaselineOutputs:
    """The base, and what was trained, if merging or rounding is about to change it."""
    trained = merge_spec.trained
    if merge_spec.model_kind == "score":
        return (
            BaselineOutputs(scores=compute_scores(_load_trained_model(merge_spec), merge_spec.passages)) if changes else BaselineOutputs()
        )
    base = _load(merge_spec, trained.base_folder)
    base_log_probs = _write_log_probs_of(merge_spec, base, "base")
    if not changes:
        return BaselineOutputs(base_log_probs)
    if trained.is_adapter:
        return BaselineOutputs(base_log_probs, _write_log_probs_of(merge_spec, _load_adapter(base, trained.folder), "adapter"))
    del base
    gc.collect()
    return BaselineOutputs(base_log_probs, _write_log_probs_of(merge_spec, _load(merge_spec, trained.folder), "trained"))


def _verify_merged(merge_spec: MergeSpec, folder: Path, baseline: BaselineOutputs) -> ReferenceLogProbs | None:
    model = _load(merge_spec, folder)
    if merge_spec.model_kind == "score":
        _check_scores(compute_scores(model, merge_spec.passages), baseline.scores)
        return None
    log_probs = _write_log_probs_of(merge_spec, model, "merged")
    base = baseline.base_log_probs if baseline.base_log_probs and _have_same_shape(log_probs, baseline.base_log_probs) else None
    if baseline.trained_log_probs is None:
        return ReferenceLogProbs(merge_spec.passages, log_probs, base, None)
    comparison = _compare_merged(merge_spec, log_probs, baseline.trained_log_probs, base)
    baseline.trained_log_probs.unlink()
    return ReferenceLogProbs(merge_spec.passages, log_probs, base, comparison)


def _load_trained_model(merge_spec: MergeSpec) -> "torch.nn.Module":
    trained = merge_spec.trained
    if not trained.is_adapter:
        return _load(merge_spec, trained.folder)
    return _load_adapter(_load(merge_spec, trained.base_folder, read_num_labels(trained.folder)), trained.folder)


def _load_adapter(base: "torch.nn.Module", adapter: Path) -> "torch.nn.Module":
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(adapter)).eval()  # pyright: ignore[reportArgumentType]  # any model of transformers


def _load(merge_spec: MergeSpec, folder: Path, num_labels: int | None = None) -> "torch.nn.Module":
    dtype, device = merge_spec.dtype_and_device
    return load_model(folder, dtype, device, merge_spec.model_kind, num_labels)


def _write_log_probs_of(merge_spec: MergeSpec, model: "torch.nn.Module", name: str) -> Path:
    """Keep a model's log probabilities. Raises JobFailed when they are no numbers, and Stopped."""
    merge_spec.context.check_stop()
    try:
        return write_log_probs(model, merge_spec.passages, merge_spec.workspace_folder / f"{name}.npy")
    except FloatingPointError as error:
        raise JobFailed("export_failed", f"the {name} model answers with numbers that are not finite", DIVERGED_HINT) from error


def _compare_merged(merge_spec: MergeSpec, merged: Path, trained: Path, base: Path | None) -> Comparison:
    found = compare(load_log_probs(merged), load_log_probs(trained), base and load_log_probs(base), list_targets(merge_spec.passages))
    check_merge_fidelity(
        found, "base and adapter together" if merge_spec.trained.is_adapter else "the trained one before it was rounded", merge_spec.context
    )
    return found


def check_merge_fidelity(comparison: Comparison, reference_name: str, context: "JobContext") -> None:
    """Raises JobFailed when a merged model does not speak like what it was made from, and warns when rounding can be heard."""
    told = (
        f"they agree on {comparison.argmax_agreement:.1%} of {comparison.positions} tokens, mean KL {comparison.mean_kl_to_trained:.4f}, "
        f"largest difference {comparison.max_difference_nats:.3g} nats"
    )
    if comparison.mean_kl_to_trained > MAX_MERGE_KL_NATS or not has_agreement(comparison, MIN_MERGE_AGREEMENT):
        raise JobFailed("export_failed", f"the merged model does not speak like {reference_name}: {told}", KEEP_ADAPTER_HINT)
    if comparison.argmax_agreement < MIN_MERGE_AGREEMENT:
        context.warn("merge_precision_loss", f"the merged model has lost some of the training to rounding: {told}; {ROUNDING_HINT}")


def _check_scores(merged_scores: Sequence[float], trained_scores: Sequence[float]) -> None:
    """Raises JobFailed when a reward model does not give the scores of the trained one; `before` is empty where nothing changed."""
    import math

    if not all(math.isfinite(score) for score in (*merged_scores, *trained_scores)):
        raise JobFailed("export_failed", "the reward model gives scores that are not finite", DIVERGED_HINT)
    if not trained_scores:
        return
    apart = max(abs(now - then) for now, then in zip(merged_scores, trained_scores, strict=True))
    if apart > MAX_MERGE_SCORE_DIFFERENCE * max(1.0, *map(abs, trained_scores)):
        message = f"the merged reward model gives other scores than the trained one, by up to {apart:.3g}"
        raise JobFailed("export_failed", message, KEEP_ADAPTER_HINT)


def _have_same_shape(one: Path, other: Path) -> bool:
    return load_log_probs(one).shape == load_log_probs(other).shape
