"""The phases after a training: what `remaining_s` counts before they begin. `schema/estimate/llm_export.py` has their seconds."""

from math import prod
from typing import TYPE_CHECKING

from jobs.llm.exporters import list_requested_kinds
from jobs.llm.exporters.model_files import list_weight_files
from jobs.llm.exporters.tensor_merge import read_header
from jobs.runtime.remaining_time import PlannedPhase
from schema.estimate.llm_export import plan_export_phases

if TYPE_CHECKING:
    from pathlib import Path

    from jobs.llm.training_context import TrainingContext


def plan_exports(training: "TrainingContext") -> "tuple[PlannedPhase, ...]":
    """The phases after the evaluation of the trained model."""
    config = training.config
    quantization_count = len(config.export_config.gguf_quantizations)
    phases = plan_export_phases(list_requested_kinds(config), quantization_count, count_parameters(training.base_folder))
    return tuple(PlannedPhase(phase, seconds) for phase, seconds in phases)


def count_parameters(folder: "Path") -> int:
    """The numbers in a model folder's weights, by the headers of its files."""
    return sum(prod(tensor.shape) for name in list_weight_files(folder) for tensor in read_header(folder / name))
