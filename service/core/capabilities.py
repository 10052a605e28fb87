"""What this deployment can do: told to programs by `GET /capabilities`, and asked of every request before it costs anything."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import get_args

from schema.dataset import Dataset
from schema.job import ArtifactKind
from schema.training import TRAINER_TYPES, ExportFormat, GgufQuantization, TrainingConfig
from service.core.errors import InvalidRequest, Unsupported
from service.core.ports import Hardware

TRACKERS = ("wandb",)
DESTINATIONS = ("gcs",)


def describe(profiles: Mapping[str, Hardware], launcher: str) -> dict[str, object]:
    """The whole answer of `GET /capabilities`. What is said outside `profiles` is said of the first, which is the default."""
    hardware = next(iter(profiles.values()))
    return {
        "launcher": launcher,
        "profiles": {name: asdict(facts) for name, facts in profiles.items()},
        "trainer_types": {
            name: {"dataset_types": list(config.dataset_types)} for name, config in TRAINER_TYPES.items() if name in hardware.trainer_types
        },
        "providers": list(hardware.providers),
        "methods": list(hardware.methods),
        "modalities": list(hardware.modalities),
        "export": {
            "formats": list(get_args(ExportFormat)),
            "destinations": list(DESTINATIONS),
            "gguf_quantizations": list(get_args(GgufQuantization)) if hardware.gguf else [],
            "artifacts": list(get_args(ArtifactKind)),
        },
        "trackers": list(TRACKERS),
        "use_fa2": hardware.flash_attention_2,
        "hardware": asdict(hardware),
    }


def check_supported(config: TrainingConfig, hardware: Hardware) -> None:
    """Raise Unsupported when the request needs what this deployment does not have, naming what it has."""
    for field, wanted, known in (
        ("trainer_type", config.trainer_type, hardware.trainer_types),
        ("provider", config.provider, hardware.providers),
        ("method", config.method, hardware.methods),
        ("modality", config.modality, hardware.modalities),
        ("export_config.destination", config.export_config.destination, DESTINATIONS),
    ):
        if wanted not in known:
            raise _unsupported(field, f"{field} {wanted!r} is not available in this deployment; it can do: {', '.join(known)}", hardware)
    if config.export_config.include_gguf and not hardware.gguf:
        raise _unsupported("export_config.include_gguf", "this deployment cannot write GGUF: llama.cpp is not installed there", hardware)
    if config.hyperparameters.use_fa2 and not hardware.flash_attention_2:
        message = f"use_fa2 needs FlashAttention 2 and an Ampere or newer GPU; this deployment trains on {hardware.device_name}"
        raise _unsupported("hyperparameters.use_fa2", message, hardware)


def check_fits(config: TrainingConfig, dataset: Dataset) -> None:
    """Raise InvalidRequest when the trainer cannot learn from that kind of dataset, or the dataset is too small for the request."""
    if dataset.dataset_type not in config.dataset_types:
        raise InvalidRequest(
            f"trainer_type {config.trainer_type!r} needs a dataset of {' or '.join(config.dataset_types)}; "
            f"{dataset.processed_dataset_id} is {dataset.dataset_type}",
            param="processed_dataset_id",
        )
    if config.eval_config.eval_strategy != "no" and "eval" not in dataset.splits:
        raise InvalidRequest(
            f"eval_strategy {config.eval_config.eval_strategy!r} needs held-out rows, and {dataset.processed_dataset_id} has none",
            hint="upload the dataset with eval_fraction above 0, or set eval_strategy to 'no'",
            param="training_config.eval_config.eval_strategy",
        )


def _unsupported(field: str, message: str, hardware: Hardware) -> Unsupported:
    why = hardware.notes.get(field.rpartition(".")[2], "")
    return Unsupported(message, hint=why or "GET /capabilities lists what this deployment can do", param=f"training_config.{field}")
