"""How long the phases after a training take, roughly: what `remaining_s` counts before they begin.

The seconds were measured on two cores with Gemma 3 270M (536 MB of weights). They grow with the weights; a faster machine needs less.
"""

from math import prod
from typing import TYPE_CHECKING

from jobs.llm.exporters import list_requested_kinds
from jobs.llm.exporters.model_files import list_weight_files
from jobs.llm.exporters.tensor_merge import read_header
from jobs.runtime.remaining_time import PlannedPhase

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from jobs.llm.training_context import TrainingContext
    from schema.types import ArtifactKind

PARAMETERS_MEASURED = 268e6

# Seconds whatever the size (libraries, tokenizers, processes that start), and seconds for PARAMETERS_MEASURED.
CHECK_TOKENIZER = (3.5, 0.0)
MERGE = (4.0, 9.0)  # with both comparisons of log probabilities
CONVERT = (5.0, 4.5)
QUANTIZE = (0.5, 2.0)  # each file
VERIFY_GGUF = (2.0, 2.0)  # each file
ONNX = (20.0, 30.0)
UPLOAD = (0.5, 0.7)  # each file


def plan_exports(training: "TrainingContext") -> "tuple[PlannedPhase, ...]":
    """The phases after the evaluation of the trained model."""
    config = training.config
    quantization_count = len(config.export_config.gguf_quantizations)
    return estimate_exports(list_requested_kinds(config), quantization_count, count_parameters(training.base_folder))


def estimate_exports(kinds: "Sequence[ArtifactKind]", quantization_count: int, parameters: float) -> "tuple[PlannedPhase, ...]":
    """The phases in which these kinds are exported, in the order of the exporters."""

    def estimate(cost: tuple[float, float], count: int = 1) -> float:
        return count * (cost[0] + cost[1] * parameters / PARAMETERS_MEASURED)

    phases: list[PlannedPhase] = []
    files = 1
    is_merged = False
    for kind in kinds:
        if kind != "adapter" and not is_merged:
            phases.append(PlannedPhase("merging", estimate(MERGE)))
            is_merged = True
        match kind:
            case "adapter":
                phases.append(PlannedPhase("verifying", estimate(CHECK_TOKENIZER)))
            case "onnx":
                phases.append(PlannedPhase("converting", estimate(ONNX)))
            case "gguf" | "lora_gguf":
                count = quantization_count if kind == "gguf" else 1
                files += count
                phases.append(PlannedPhase("converting", estimate(CONVERT) + estimate(QUANTIZE, count)))
                phases.append(PlannedPhase("verifying", estimate(VERIFY_GGUF, count)))
            case _:  # "merged", which is made by now
                files += 1
    return (*phases, PlannedPhase("uploading", estimate(UPLOAD, files)))


def count_parameters(folder: "Path") -> int:
    """The numbers in a model folder's weights, by the headers of its files."""
    return sum(prod(tensor.shape) for name in list_weight_files(folder) for tensor in read_header(folder / name))
