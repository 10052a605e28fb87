"""Writes the merged model, an adapter merged into its base or a fully trained model, and compares it with its base."""

import gc
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.exporters.log_probs import GreedyAnswer, answer_greedily, compute_scores, load_log_probs, load_model, write_log_probs
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
    NotFinite,
    load_adapter_delta,
    merge_tensors,
    read_num_labels,
)
from jobs.llm.llama_cpp.fidelity import TIE_NATS, Comparison, Passage, compare, has_agreement, list_targets
from jobs.llm.model_kinds import ModelKind
from jobs.llm.trainable_tokens import patch_trainable_token_embedding
from jobs.runtime.errors import JobFailed
from schema.estimate.llm import estimate_comparison_bytes, float32_weights_bytes
from schema.training.llm_export import MergedDtype

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from jobs.llm.trained_model import TrainedModel
    from jobs.runtime.context import JobContext

DIVERGED_HINT = "the training diverged; lower learning_rate, or raise warmup_ratio"
REPORT_ADAPTER_HINT = "export format 'adapter' keeps the trained weights; please report this with the job's log"  # there is an adapter
OVERFLOW_HINT = "the largest float16 number is 65504; use merged_dtype bf16 or fp32"
MERGED_DTYPES: dict[Precision, MergedDtype] = {"bf16": "bf16", "f16": "fp16", "f32": "fp32"}

# Rounding the sum to bfloat16 moves Gemma 270M by a mean KL of 0.00006 nats, and by 0.008 after a few small training steps, most of
# which are below bfloat16's last digit; a wrong merge moves it by whole nats.
MAX_MERGE_KL_NATS = 0.02
MIN_MERGE_AGREEMENT = 0.97
MAX_MERGE_SCORE_DIFFERENCE = 0.05  # of a reward model, relative to its largest score


@dataclass(frozen=True)
class MergeSpec:
    """What to merge, in which precision, and how to verify the result."""

    trained: "TrainedModel"
    model_kind: ModelKind
    tokenizer: "PreTrainedTokenizerBase"
    passages: tuple[Passage, ...]
    sample_prompt_ids: tuple[int, ...]  # whose greedy answers are compared
    dtype: Precision | None  # the requested one; None: the base model's own, or a finer one where that rounds too much
    dtype_and_device: "tuple[torch.dtype, str]"  # of the models that are compared (`choose_compute_dtype`)
    workspace_folder: Path
    context: "JobContext"


@dataclass(frozen=True)
class ReferenceLogProbs:
    """Log probabilities of the merged model and its base at the compared positions of the passages."""

    passages: tuple[Passage, ...]
    log_probs: Path
    base_log_probs: Path | None  # None when training changed the size of the vocabulary
    comparison: Comparison | None  # with the trained model before merging or rounding; None where nothing was merged or rounded
    answer: GreedyAnswer  # to the sample prompt

    def request_fields(self) -> dict[str, Any]:  # the fields of a ComparisonRequest
        """What a child process needs to compare a file with this model."""
        base = str(self.base_log_probs) if self.base_log_probs else None
        return {"passages": list(self.passages), "trained_log_probs": str(self.log_probs), "base_log_probs": base}


@dataclass(frozen=True)
class MergedModel:
    """A model folder that needs no adapter. A reward model has no `reference_log_probs`."""

    folder: Path
    reference_log_probs: ReferenceLogProbs | None


@dataclass(frozen=True)
class BaselineOutputs:
    """Outputs computed before anything is written: of the base, and of the trained model unmerged and unrounded."""

    base_log_probs: Path | None = None
    trained_log_probs: Path | None = None  # None where nothing is merged or rounded
    answer: GreedyAnswer | None = None  # of the trained model
    scores: Sequence[float] = ()  # of a reward model


class RoundsTooMuch(Exception):
    """The written model differs from the trained one; the message says by how much. Another precision may not."""


def merge_model(merge_spec: MergeSpec) -> MergedModel:
    """Write the trained model as one folder without an adapter and verify it. Raises JobFailed, and Stopped.

    Verifying loads the written folder and compares it with the base and adapter before they were merged. Where the base's precision rounds
    too much of the training, and the request names none, a finer one is written.
    """
    trained, folder, context = merge_spec.trained, merge_spec.workspace_folder / "merged", merge_spec.context
    first = merge_spec.dtype or read_precision(trained.base_folder)
    baseline = _compute_baseline(merge_spec, changes=_changes_weights(trained, first))
    gc.collect()  # one model in memory at a time
    rejected: list[str] = []
    precisions: list[Precision] = [merge_spec.dtype] if merge_spec.dtype else list_finer_precisions(first)
    for precision in precisions:
        is_last = merge_spec.dtype is not None or precision == "f32"
        try:
            _write_model(merge_spec, folder, precision)
            context.check_stop()
            reference = _verify_merged(merge_spec, folder, baseline, may_warn=is_last)
        except (RoundsTooMuch, DtypeOverflow) as error:
            if is_last:
                raise _make_merge_failure(merge_spec, precision, error) from error
            problem = "rounds too much" if isinstance(error, RoundsTooMuch) else "has too little range"
            rejected.append(f"{MERGED_DTYPES[precision]} {problem}: {error}")
        else:
            if rejected:
                measured = f": {_describe_agreement(reference.comparison)}" if reference and reference.comparison else ""
                chosen = f"{MERGED_DTYPES[precision]} keeps it{measured}"
                context.log_decision(
                    "merged_dtype", MERGED_DTYPES[precision], "; ".join([*rejected, chosen, "the request sets no merged_dtype"])
                )
            if baseline.trained_log_probs is not None:
                baseline.trained_log_probs.unlink()
            return MergedModel(folder, reference)
        shutil.rmtree(folder)
        gc.collect()
    raise AssertionError("float32 is the last precision, and returns or raises")


def list_finer_precisions(precision: Precision) -> list[Precision]:
    """A precision and the finer ones, in the order in which they are tried: float16 has three bits more than bfloat16, and less range."""
    order: list[Precision] = ["bf16", "f16", "f32"]
    return order[order.index(precision) :]


def choose_compute_dtype(base: Path, context: "JobContext") -> "tuple[torch.dtype, str]":
    """The dtype and device for comparing models: float32 where it fits into free memory, else bfloat16.

    Computing in bfloat16 alone moves Gemma 270M by a mean KL of 0.0004 nats; storing as f16 moves it by 0.000003.
    """
    import psutil
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    free_bytes = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    float32_bytes = float32_weights_bytes(measure_weights_bytes(base), stored_in_float32=read_precision(base) == "f32")
    if estimate_comparison_bytes(float32_bytes) < free_bytes:
        return torch.float32, device
    reason = f"{float32_bytes / 1e9:.1f} GB of float32 weights do not fit into {free_bytes / 1e9:.1f} GB of free memory"
    context.log_decision("fidelity_dtype", "bfloat16", reason)
    return torch.bfloat16, device


# --- before writing: the outputs to compare with ---


def _compute_baseline(merge_spec: MergeSpec, *, changes: bool) -> BaselineOutputs:
    """Outputs of the base, and of the trained model if merging or rounding is about to change it."""
    trained = merge_spec.trained
    if merge_spec.model_kind == "score":
        if not changes:
            return BaselineOutputs()
        model = _load(merge_spec, trained.base_folder if trained.is_adapter else trained.folder, read_num_labels(trained.folder))
        return BaselineOutputs(
            scores=compute_scores(_add_adapter(model, trained.folder) if trained.is_adapter else model, merge_spec.passages)
        )
    model = _load(merge_spec, trained.base_folder)
    base_log_probs = _write_log_probs_of(merge_spec, model, "base")
    if not changes:
        return BaselineOutputs(base_log_probs)
    if trained.is_adapter:
        tuned, name = _add_adapter(model, trained.folder), "adapter"
    else:
        del model
        gc.collect()
        tuned, name = _load(merge_spec, trained.folder), "trained"
    log_probs = _write_log_probs_of(merge_spec, tuned, name)
    return BaselineOutputs(base_log_probs, log_probs, _answer(merge_spec, tuned))


def _load(merge_spec: MergeSpec, folder: Path, num_labels: int | None = None) -> "torch.nn.Module":
    dtype, device = merge_spec.dtype_and_device
    return load_model(folder, dtype, device, merge_spec.model_kind, num_labels)


def _add_adapter(base: "torch.nn.Module", adapter: Path) -> "torch.nn.Module":
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(base, str(adapter)).eval()  # pyright: ignore[reportArgumentType]  # any model of transformers
    patch_trainable_token_embedding(adapted)
    return adapted


def _answer(merge_spec: MergeSpec, model: "torch.nn.Module") -> GreedyAnswer:
    return answer_greedily(model, merge_spec.sample_prompt_ids, merge_spec.trained.chat_format.stop_token_ids)


def _write_log_probs_of(merge_spec: MergeSpec, model: "torch.nn.Module", name: str) -> Path:
    """Write a model's log probabilities to a file. Raises JobFailed when they are not finite, and Stopped."""
    merge_spec.context.check_stop()
    try:
        return write_log_probs(model, merge_spec.passages, merge_spec.workspace_folder / f"{name}.npy")
    except FloatingPointError as error:
        raise JobFailed("export_failed", f"the {name} model's logits are not finite", DIVERGED_HINT) from error


# --- writing ---


def _changes_weights(trained: "TrainedModel", precision: Precision) -> bool:
    return trained.is_adapter or precision != read_precision(trained.folder)


def _write_model(merge_spec: MergeSpec, folder: Path, precision: Precision) -> None:
    """Write the whole model folder. Raises JobFailed, and DtypeOverflow."""
    trained = merge_spec.trained
    if _changes_weights(trained, precision):
        _write_merged(merge_spec, folder, precision)
    else:
        copy_files(trained.folder, folder, [*MODEL_FILES, *list_weight_files(trained.folder)])
    copy_files(trained.base_folder, folder, PROCESSOR_FILES)
    copy_tokenizer(trained.folder, folder)
    copy_license(trained.base_folder, folder)
    if merge_spec.model_kind != "score":
        set_generation_eos(folder, trained.chat_format.stop_token_ids)


def _write_merged(merge_spec: MergeSpec, folder: Path, precision: Precision) -> None:
    """Write base and adapter merged, or the fully trained model alone, in the given precision. Raises JobFailed, and DtypeOverflow."""
    trained, tokenizer = merge_spec.trained, merge_spec.tokenizer
    source = trained.base_folder if trained.is_adapter else trained.folder
    try:
        delta, model = load_adapter_delta(source, trained.folder, merge_spec.model_kind) if trained.is_adapter else (NO_CHANGES, None)
        merge_tensors(source, folder, to_torch_dtype(precision), delta)
    except NotFinite as error:
        raise JobFailed("export_failed", f"the trained weights are not finite, {error} among them", DIVERGED_HINT) from error
    except MergeError as error:
        raise JobFailed("export_failed", f"the adapter cannot be merged: {error}", REPORT_ADAPTER_HINT) from error
    copy_files(source, folder, CONFIG_FILES)
    if merge_spec.model_kind == "score" and model is not None:
        # The base's config describes a causal model; a reward model has another class, and must know the padding token.
        model.config.architectures = [type(model).__name__]
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        (folder / "config.json").unlink()  # a hard link to the base's
        model.config.save_pretrained(folder)
    set_config_dtype(folder, str(to_torch_dtype(precision)).removeprefix("torch."))


# --- verifying ---


def _verify_merged(merge_spec: MergeSpec, folder: Path, baseline: BaselineOutputs, *, may_warn: bool) -> ReferenceLogProbs | None:
    """Load the written model and compare it with the baseline; None for a reward model. Raises JobFailed, and RoundsTooMuch.

    With `may_warn`, a model that lost a little of the training is accepted with a warning.
    """
    model = _load(merge_spec, folder)
    if merge_spec.model_kind == "score":
        _check_scores(compute_scores(model, merge_spec.passages), baseline.scores)
        return None
    path = _write_log_probs_of(merge_spec, model, "merged")
    answer = _answer(merge_spec, model)
    log_probs, base_path = load_log_probs(path), baseline.base_log_probs
    base = load_log_probs(base_path) if base_path else None
    if base is not None and base.shape != log_probs.shape:
        base_path = base = None
    if baseline.trained_log_probs is None:
        return ReferenceLogProbs(merge_spec.passages, path, base_path, None, answer)
    comparison = compare(log_probs, load_log_probs(baseline.trained_log_probs), base, list_targets(merge_spec.passages))
    loss = check_merge_fidelity(comparison, baseline.answer, answer)
    if loss is not None and not may_warn:
        raise RoundsTooMuch(loss)
    if loss is not None:
        hint = make_rounding_hint(merge_spec)
        merge_spec.context.warn(
            "merge_precision_loss", f"rounding removed some of the training from the merged model: {loss}{hint and '; '}{hint}"
        )
    return ReferenceLogProbs(merge_spec.passages, path, base_path, comparison, answer)


def check_merge_fidelity(comparison: Comparison, trained: GreedyAnswer | None, merged: GreedyAnswer | None) -> str | None:
    """What a merged model lost by rounding, in numbers; None if nothing. Raises RoundsTooMuch when its predictions are others."""
    numbers = _describe_agreement(comparison)
    if comparison.mean_kl_to_trained > MAX_MERGE_KL_NATS or not has_agreement(comparison, MIN_MERGE_AGREEMENT):
        raise RoundsTooMuch(numbers)
    if trained is not None and merged is not None:
        tolerance = max(TIE_NATS, 2 * comparison.max_difference_nats)  # of the difference between two tokens
        position = trained.find_difference(merged.ids, tolerance)
        if position is not None:
            raise RoundsTooMuch(f"the answers to a held-out prompt differ from token {position + 1} on, {numbers}")
    return numbers if comparison.argmax_agreement < MIN_MERGE_AGREEMENT else None


def make_rounding_hint(merge_spec: MergeSpec) -> str:
    """What keeps more of the training than the requested precision; only what a request for this model may say."""
    return make_precision_hint(merge_spec.dtype, is_adapter=merge_spec.trained.is_adapter)


def _describe_agreement(comparison: Comparison) -> str:
    return (
        f"they agree on {comparison.argmax_agreement:.1%} of {comparison.positions} tokens, mean KL {comparison.mean_kl_to_trained:.4f}, "
        f"largest difference {comparison.max_difference_nats:.3g} nats"
    )


def make_precision_hint(dtype: Precision | None, *, is_adapter: bool) -> str:
    """The export settings that keep more of the training than a merged model of this precision, in words; empty where none does."""
    settings = [
        *(["merged_dtype 'fp32'"] if dtype in ("bf16", "f16") else []),
        *(["export format 'adapter'"] if is_adapter else []),
    ]
    return f"use {' or '.join(settings)}, which rounds nothing" if settings else ""


def _make_merge_failure(merge_spec: MergeSpec, precision: Precision, error: RoundsTooMuch | DtypeOverflow) -> JobFailed:
    another_export = _describe_export_call(merge_spec)
    if isinstance(error, DtypeOverflow):
        return JobFailed("export_failed", f"{error} has numbers that are too large for {precision}", OVERFLOW_HINT + another_export)
    trained = merge_spec.trained
    reference_name = "base and adapter together" if trained.is_adapter else "the trained model before it was rounded"
    hint = make_rounding_hint(merge_spec)
    hint = hint + another_export if hint else "please report this with the job's log"
    return JobFailed("export_failed", f"the merged model's predictions differ from {reference_name}: {error}", hint)


def _describe_export_call(merge_spec: MergeSpec) -> str:
    """The call that exports the same weights in another way, as the end of a hint; empty where no checkpoint of them is known."""
    source, checkpoints, step = merge_spec.context.spec.export_of, merge_spec.context.checkpoints, merge_spec.trained.step
    job_id = source.job_id if source else merge_spec.context.spec.job_id
    step = source.step if source else step
    newest = max(checkpoints.saved_step or 0, checkpoints.resumed_step or 0)  # an older published step is kept as the best
    if step is None or (source is None and step > newest):
        return ""
    return f"; POST /jobs/{job_id}/checkpoints/{step}/export with it needs no new training"


def _check_scores(merged_scores: Sequence[float], trained_scores: Sequence[float]) -> None:
    """Raise when a merged reward model's scores differ; `trained_scores` is empty where nothing was merged or rounded."""
    if not all(math.isfinite(score) for score in (*merged_scores, *trained_scores)):
        raise JobFailed("export_failed", "the reward model's scores are not finite", DIVERGED_HINT)
    if not trained_scores:
        return
    difference = max(abs(merged - trained) for merged, trained in zip(merged_scores, trained_scores, strict=True))
    if difference > MAX_MERGE_SCORE_DIFFERENCE * max(1.0, *map(abs, trained_scores)):
        raise RoundsTooMuch(f"the scores differ by up to {difference:.3g}")
