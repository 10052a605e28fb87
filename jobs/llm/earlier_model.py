"""Starting a training from the model of an earlier job, and publishing what is trained for the original base.

    1. fetch_starting_model    the base to train: an earlier adapter merged into its base, or an earlier whole model
    2. attach_original_base    after the training: the adapter to publish is the sum of both, and belongs to the original base

The merge happens before the training, so that everything that compares with "the model without its adapter" (the reference of DPO, KTO
and GRPO, the metrics of the base) compares with the earlier model. Another attempt of the job computes the same merge again.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.llm.adapter_sum import AdapterMismatch, check_readable, check_summable, copy_adapter_config, write_sum
from jobs.llm.base_files import copy_base_files
from jobs.llm.base_model import download_from_store, fetch_base
from jobs.llm.exporters.model_files import TOKENIZER_FILES, copy_files, read_precision, to_torch_dtype
from jobs.llm.exporters.tensor_merge import DtypeOverflow, MergeError, NotFinite, load_adapter_delta, merge_tensors
from jobs.llm.hardware import computes_in_bf16
from jobs.llm.model_kinds import ModelKind
from jobs.llm.trained_model import TrainedModel
from jobs.runtime.errors import JobFailed
from jobs.runtime.retry import download_all_with_retry, retry_store
from schema.job import EarlierModel

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext

ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20  # a file that lists every layer of a large model has 0.05 MB


def fetch_starting_model(context: "JobContext") -> Path:
    """A folder with the model that the training starts from. Raises JobFailed."""
    earlier = context.spec.earlier_model
    if earlier is None:
        return fetch_base(context)
    reason = f"the training starts from the {earlier.kind} of job {earlier.job_id}"
    context.log_decision("earlier_model", earlier.job_id, f"{reason}, files {earlier.digest}")
    target = context.workdir / "data" / "base"
    if earlier.needs_base:
        return _merge_earlier_adapter(context, earlier, target)
    folder = download_from_store(context.stores.models, earlier.key, target, f"{earlier.kind} model of job {earlier.job_id} at")
    if folder is None:
        raise _make_missing_failure(earlier)
    return folder


def attach_original_base(trained: TrainedModel, context: "JobContext") -> TrainedModel:
    """The trained model as it is published: with the original base, where what was trained can be applied to it. Raises JobFailed."""
    earlier = context.spec.earlier_model
    if earlier is None or not earlier.needs_base:
        return trained
    if trained.is_adapter:
        if not earlier.in_adapter:
            return trained
        try:
            write_sum(_adapter_folder(context), trained.folder, trained.folder)
        except AdapterMismatch as error:
            raise JobFailed(
                "export_failed", f"the adapter cannot be added to that of job {earlier.job_id}: {error}", "use export format 'merged'"
            ) from error
        context.log_decision("adapter", "both", f"the published adapter contains that of job {earlier.job_id}, for the original base")
    return replace(trained, base_folder=_original_base_link(context).resolve())


def _merge_earlier_adapter(context: "JobContext", earlier: EarlierModel, target: Path) -> Path:
    """Merge the earlier adapter into its base, in the precision that the training computes in, and put the result at `target`."""
    original = fetch_base(context, "original-base")
    link = _original_base_link(context)
    link.unlink(missing_ok=True)  # of an earlier try
    link.symlink_to(original.resolve())
    adapter = _download_adapter(context, earlier)
    merged = context.workdir / "data" / "earlier-merged"
    # Rounding to bf16 would lose small updates where the training computes in fp32; where it computes in bf16, loading rounds anyway.
    precision = read_precision(original) if computes_in_bf16(context.spec.training_config) else "f32"
    try:
        delta, _ = load_adapter_delta(original, adapter, _model_kind(earlier))
        merge_tensors(original, merged, to_torch_dtype(precision), delta)
    except (DtypeOverflow, NotFinite, MergeError, RuntimeError, ValueError, KeyError) as error:  # the last three: peft's, of other shapes
        hint = f"export job {earlier.job_id} with format 'merged' (POST /jobs/{earlier.job_id}/export), and name the job that exports it"
        message = f"the adapter of job {earlier.job_id} cannot be merged into its base: {error}"
        raise JobFailed("invalid_config", message, hint) from error
    context.log_decision("earlier_merge", precision, "the earlier adapter is merged into its base, and a new one is trained on the result")
    written = {path.name for path in merged.iterdir()}
    copy_files(original, merged, [path.name for path in original.iterdir() if path.name not in written])
    copy_files(adapter, merged, TOKENIZER_FILES)  # with the chat template that the earlier job trained with
    return copy_base_files(merged, target, f"the model of job {earlier.job_id}")


def _download_adapter(context: "JobContext", earlier: EarlierModel) -> Path:
    """A folder with the earlier adapter, whose config holds only what describes a LoRA. Raises JobFailed."""
    store, folder = context.stores.models, _adapter_folder(context)
    stored = retry_store(
        f"the adapter of job {earlier.job_id} cannot be listed",
        lambda: {each.key.removeprefix(earlier.key): each for each in store.iter_objects(earlier.key)},
        code="internal",
    )
    names = [name for name in (ADAPTER_WEIGHTS_FILE, ADAPTER_CONFIG_FILE, *TOKENIZER_FILES) if name in stored]
    if not {ADAPTER_WEIGHTS_FILE, ADAPTER_CONFIG_FILE} <= set(names):
        raise _make_missing_failure(earlier)
    if stored[ADAPTER_CONFIG_FILE].size_bytes > MAX_CONFIG_BYTES:
        raise JobFailed("invalid_config", f"the adapter config of job {earlier.job_id} is too large", "name another job")
    download_all_with_retry(store, [earlier.key + name for name in names], folder, prefix=earlier.key)
    try:
        copy_adapter_config(folder / ADAPTER_CONFIG_FILE)
        check_readable(folder)
        if earlier.in_adapter and context.spec.training_config.method != "Full":
            check_summable(folder)
    except AdapterMismatch as error:
        hint = "use export format 'merged'"
        raise JobFailed("invalid_config", f"the adapter of job {earlier.job_id} cannot be continued: {error}", hint) from error
    return folder


def _adapter_folder(context: "JobContext") -> Path:
    return context.workdir / "data" / "earlier-adapter"


def _original_base_link(context: "JobContext") -> Path:
    """A link to the original base, whose own folder may tell its revision."""
    return context.workdir / "data" / "original-base-link"


def _model_kind(earlier: EarlierModel) -> ModelKind:
    if earlier.trainer_type == "reward":
        return "score"
    return "image_text" if earlier.modality == "vision" else "causal"


def _make_missing_failure(earlier: EarlierModel) -> JobFailed:
    message = f"the model of job {earlier.job_id}, from which this job starts, is no longer in the model store"
    return JobFailed("invalid_config", message, "the job may have been deleted; train it again, and name the new job in base_model_id")
