"""The LoRA adapter alone: its weights, its settings and the tokenizer it was trained with."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.errors import JobFailed
from jobs.exporters.folders import PROCESSOR_FILES, copy_files, copy_licence, copy_tokenizer, write_json
from jobs.exporters.merge import DIVERGED_HINT
from jobs.publish import Product

if TYPE_CHECKING:
    from jobs.exporters.bench import Bench

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"


def export(bench: "Bench") -> tuple[Product, ...]:
    """The adapter's folder, without what its trainer left beside it."""
    bench.context.phase("verifying")
    source, folder = bench.trained.folder, bench.path("adapter")
    _refuse_diverged(source / WEIGHTS)
    copy_files(source, folder, [WEIGHTS, *PROCESSOR_FILES])
    copy_tokenizer(source, folder)
    copy_licence(bench.trained.base_folder, folder)
    # The trainer read the base from a folder of its own; whoever loads the adapter has the Hub.
    settings = json.loads((source / SETTINGS).read_text())
    base_model_id = bench.context.spec.training_config.base_model_id
    write_json(folder / SETTINGS, settings | {"base_model_name_or_path": base_model_id})
    return (Product(name="adapter", kind="adapter", path=folder, key=bench.key("adapter")),)


def _refuse_diverged(weights: Path) -> None:
    import torch
    from safetensors import safe_open

    with safe_open(weights, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  # no dict
            if not torch.isfinite(tensors.get_tensor(name)).all():
                raise JobFailed("export_failed", f"the adapter's weights are not finite numbers, {name} for one", DIVERGED_HINT)
