"""The whole model: an adapter merged into its base, or a fully trained model as it is; and how it speaks beside its base."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.errors import JobFailed
from jobs.exporters.folders import (
    MODEL_FILES,
    PROCESSOR_FILES,
    SETTINGS_FILES,
    Precision,
    copy_files,
    copy_licence,
    copy_tokenizer,
    dtype_of,
    mend_generation_config,
    note_precision,
    precision,
    size_bytes,
    weights,
)
from jobs.exporters.speech import load_model, log_probs_of, scores, write_log_probs
from jobs.exporters.streaming import NOTHING, Kind, NotFinite, TooLarge, Unmergeable, changes_of, labels_of, stream
from jobs.llama.fidelity import Comparison, Passage, agrees, compare, targets_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from jobs.context import JobContext
    from jobs.trained import TrainedModel

DIVERGED_HINT = "the training has diverged; lower learning_rate, or raise warmup_ratio"
OVERFLOW_HINT = "float16 ends at 65504; use merged_dtype bf16 or fp32"
ROUNDING_HINT = "merged_dtype 'fp32', and the adapter, have all of it"
KEEP_ADAPTER_HINT = "export format 'adapter' keeps what was trained; please report this with the job's log"

# Rounding the sum to bfloat16 moves Gemma 270M by a mean KL of 0.00006 nats, and by 0.008 after a training of a few small steps, of which
# much is below the last digit; a merge that went wrong moves it by whole ones.
NEAR_KL_NATS = 0.02
NEAR_AGREEMENT = 0.97
NEAR_SCORE = 0.05  # of a reward model: of the size of its scores


@dataclass(frozen=True)
class Recipe:
    """What a whole model is made of, and how it is to be."""

    trained: "TrainedModel"
    kind: Kind
    tokenizer: "PreTrainedTokenizerBase"
    passages: tuple[Passage, ...]
    dtype: Precision | None  # None: the base's own
    compute: "tuple[torch.dtype, str]"  # of what is compared: how exactly, and on which device (`arithmetic`)
    bench: Path
    context: "JobContext"


@dataclass(frozen=True)
class Speech:
    """How a whole model speaks, and its base: log probabilities at the compared positions of the passages."""

    passages: tuple[Passage, ...]
    log_probs: Path
    base_log_probs: Path | None  # None when training changed the size of the vocabulary
    comparison: Comparison | None  # with what was trained, before it was merged or rounded; None where it was neither


@dataclass(frozen=True)
class WholeModel:
    """A model that needs no adapter. One that gives scores does not speak."""

    folder: Path
    speech: Speech | None


@dataclass(frozen=True)
class Heard:
    """What was heard before anything was written: of the base, and of the trained model with its adapter, or unrounded."""

    base: Path | None = None
    trained: Path | None = None
    scores: Sequence[float] = ()


def make_whole(recipe: Recipe) -> WholeModel:
    """The trained model as one that needs no adapter, checked. Raises JobFailed, and Stopped.

    What is compared is what was written, read back, with base and adapter side by side before they were merged.
    """
    trained, folder = recipe.trained, recipe.bench / "merged"
    wanted = recipe.dtype or precision(trained.base_folder)
    changes = trained.is_adapter or wanted != precision(trained.folder)
    heard = _hear_before(recipe, changes=changes)
    gc.collect()  # one model in memory at a time
    if changes:
        _write(recipe, folder, wanted)
    else:
        copy_files(trained.folder, folder, [*MODEL_FILES, *weights(trained.folder)])
    copy_files(trained.base_folder, folder, PROCESSOR_FILES)
    copy_tokenizer(trained.folder, folder)
    copy_licence(trained.base_folder, folder)
    if recipe.kind != "score":
        mend_generation_config(folder, recipe.tokenizer)
    recipe.context.check()
    return WholeModel(folder, _heard_again(recipe, folder, heard))


def arithmetic(base: Path, context: "JobContext") -> "tuple[torch.dtype, str]":
    """How exactly to compute what is compared, and where: in float32 where it fits.

    bfloat16 alone moves Gemma 270M by a mean KL of 0.0004 nats, f16 files by 0.000003.
    """
    import psutil
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    wide = size_bytes(base) * (1 if precision(base) == "f32" else 2)
    if wide * 1.5 < free:  # half as much again for the activations and the logits
        return torch.float32, device
    context.decided("compare_in", "bfloat16", f"{wide / 1e9:.1f} GB of float32 weights do not fit into {free / 1e9:.1f} GB of free memory")
    return torch.bfloat16, device


# --- writing it ---


def _write(recipe: Recipe, folder: Path, wanted: Precision) -> None:
    """Base and adapter, or the trained model alone, in the wanted precision. Raises JobFailed."""
    trained = recipe.trained
    source = trained.base_folder if trained.is_adapter else trained.folder
    try:
        changes, model = changes_of(source, trained.folder, recipe.kind) if trained.is_adapter else (NOTHING, None)
        stream(source, folder, dtype_of(wanted), changes)
    except TooLarge as error:
        raise JobFailed("export_failed", f"{error} has numbers that are too large for {wanted}", OVERFLOW_HINT) from error
    except NotFinite as error:
        raise JobFailed("export_failed", f"the trained weights are not finite numbers, {error} for one", DIVERGED_HINT) from error
    except Unmergeable as error:
        raise JobFailed("export_failed", f"the adapter cannot be merged: {error}", KEEP_ADAPTER_HINT) from error
    copy_files(source, folder, SETTINGS_FILES)
    if recipe.kind == "score" and model is not None:
        _describe_scorer(model, recipe.tokenizer, folder)
    note_precision(folder, str(dtype_of(wanted)).removeprefix("torch."))


def _describe_scorer(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """The base's settings tell of a model that speaks; this one ends in scores, and needs to know what padding is."""
    model.config.architectures = [type(model).__name__]
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    (folder / "config.json").unlink()  # a link to the base's
    model.config.save_pretrained(folder)


# --- hearing it ---


def _hear_before(recipe: Recipe, *, changes: bool) -> Heard:
    """The base, and what was trained, if merging or rounding is about to change it."""
    trained = recipe.trained
    if recipe.kind == "score":
        return Heard(scores=scores(_trained_model(recipe), recipe.passages)) if changes else Heard()
    base = _load(recipe, trained.base_folder)
    base_log_probs = _speak(recipe, base, "base")
    if not changes:
        return Heard(base_log_probs)
    if trained.is_adapter:
        return Heard(base_log_probs, _speak(recipe, _adapted(base, trained.folder), "adapted"))
    del base
    gc.collect()
    return Heard(base_log_probs, _speak(recipe, _load(recipe, trained.folder), "trained"))


def _heard_again(recipe: Recipe, folder: Path, heard: Heard) -> Speech | None:
    model = _load(recipe, folder)
    if recipe.kind == "score":
        _judge_scores(scores(model, recipe.passages), heard.scores)
        return None
    log_probs = _speak(recipe, model, "merged")
    base = heard.base if heard.base and _same_shape(log_probs, heard.base) else None
    if heard.trained is None:
        return Speech(recipe.passages, log_probs, base, None)
    comparison = _judge(recipe, log_probs, heard.trained, base)
    heard.trained.unlink()
    return Speech(recipe.passages, log_probs, base, comparison)


def _trained_model(recipe: Recipe) -> "torch.nn.Module":
    trained = recipe.trained
    if not trained.is_adapter:
        return _load(recipe, trained.folder)
    return _adapted(_load(recipe, trained.base_folder, labels_of(trained.folder)), trained.folder)


def _adapted(base: "torch.nn.Module", adapter: Path) -> "torch.nn.Module":
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(adapter)).eval()  # pyright: ignore[reportArgumentType]  # any model of transformers


def _load(recipe: Recipe, folder: Path, labels: int | None = None) -> "torch.nn.Module":
    dtype, device = recipe.compute
    return load_model(folder, dtype, device, recipe.kind, labels)


def _speak(recipe: Recipe, model: "torch.nn.Module", name: str) -> Path:
    """Keep a model's log probabilities. Raises JobFailed when they are no numbers, and Stopped."""
    recipe.context.check()
    try:
        return write_log_probs(model, recipe.passages, recipe.bench / f"{name}.npy")
    except FloatingPointError as error:
        raise JobFailed("export_failed", f"the {name} model answers with numbers that are not finite", DIVERGED_HINT) from error


def _judge(recipe: Recipe, merged: Path, trained: Path, base: Path | None) -> Comparison:
    found = compare(log_probs_of(merged), log_probs_of(trained), base and log_probs_of(base), targets_of(recipe.passages))
    refuse_unlike(
        found, "base and adapter together" if recipe.trained.is_adapter else "the trained one before it was rounded", recipe.context
    )
    return found


def refuse_unlike(found: Comparison, before: str, context: "JobContext") -> None:
    """Raises JobFailed when a merged model does not speak like what it was made from, and warns when rounding can be heard."""
    told = (
        f"they agree on {found.argmax_agreement:.1%} of {found.positions} tokens, mean KL {found.mean_kl_to_trained:.4f}, "
        f"largest difference {found.max_difference:.3g} nats"
    )
    if found.mean_kl_to_trained > NEAR_KL_NATS or not agrees(found, NEAR_AGREEMENT):
        raise JobFailed("export_failed", f"the merged model does not speak like {before}: {told}", KEEP_ADAPTER_HINT)
    if found.argmax_agreement < NEAR_AGREEMENT:
        context.warn("rounded", f"the merged model has lost some of the training to rounding: {told}; {ROUNDING_HINT}")


def _judge_scores(found: Sequence[float], before: Sequence[float]) -> None:
    """Raises JobFailed when a reward model does not give the scores of the trained one; `before` is empty where nothing changed."""
    import math

    if not all(math.isfinite(score) for score in (*found, *before)):
        raise JobFailed("export_failed", "the reward model gives scores that are not finite", DIVERGED_HINT)
    if not before:
        return
    apart = max(abs(now - then) for now, then in zip(found, before, strict=True))
    if apart > NEAR_SCORE * max(1.0, *map(abs, before)):
        message = f"the merged reward model gives other scores than the trained one, by up to {apart:.3g}"
        raise JobFailed("export_failed", message, KEEP_ADAPTER_HINT)


def _same_shape(one: Path, other: Path) -> bool:
    return log_probs_of(one).shape == log_probs_of(other).shape
