"""What exporting a trained language model takes: its phases, memory, files and their sizes, as `jobs/llm/exporters` works.

The seconds were measured on two cores with Gemma 3 270M (536 MB of weights). They grow with the weights; a faster machine needs less.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from schema.estimate.disk import GGUF_BITS, ONNX_BYTES_PER_PARAMETER
from schema.estimate.llm import ONNX_MAX_PARAMETERS, estimate_comparison_bytes
from schema.estimate.llm_shapes import ModelShape

PARAMETERS_MEASURED = 268e6

# Seconds whatever the size (libraries, tokenizers, processes that start), and seconds for PARAMETERS_MEASURED.
CHECK_TOKENIZER = (3.5, 0.0)
MERGE = (4.0, 9.0)  # with both comparisons of log probabilities
CONVERT = (5.0, 4.5)
QUANTIZE = (0.5, 2.0)  # each file
VERIFY_GGUF = (2.0, 2.0)  # each file
ONNX = (20.0, 30.0)
UPLOAD = (0.5, 0.7)  # each file

TOKENIZER_BYTES_PER_TOKEN = 130  # tokenizer.json of Gemma (262,144 tokens, 33 MB) and of Llama (128,256 tokens, 17 MB)
# Small models keep their embeddings in at least eight bits, and rows of a width that is no multiple of 256 in a finer form.
GGUF_EMBEDDING_BITS = 8.5
GGUF_BLOCK = 256
FALLBACK_BITS = {"q2_k": 4.5, "q3_k_m": 4.5, "q4_k_s": 5.5, "q4_k_m": 5.9, "q5_k_s": 6.0, "q5_k_m": 6.5, "q6_k": 8.5}
ONNX_TRACING_FACTOR = 5  # of the float32 weights, in main memory


@dataclass(frozen=True)
class ExportPlan:
    """What is exported from a training."""

    kinds: tuple[str, ...]  # in the order in which they are made
    quantizations: tuple[str, ...]  # of GGUF files
    merged_bytes_per_parameter: int
    adapter_parameters: int  # 0: all weights were trained

    @property
    def makes_merged(self) -> bool:
        """Whether a whole model is written, also one that is not published."""
        return any(kind != "adapter" for kind in self.kinds)


@dataclass(frozen=True)
class PlannedArtifact:
    """A file or folder that will be published."""

    name: str
    kind: str
    size_bytes: float


@dataclass(frozen=True)
class ExportMemory:
    """The most that an export needs at once, in bytes."""

    device: float  # to compare what was written with what was trained; of the GPU where there is one
    host: float  # of main memory, where that is not the device


def plan_export_phases(kinds: Sequence[str], quantization_count: int, parameters: float) -> tuple[tuple[str, float], ...]:
    """The phases in which these kinds are exported, in the order of the exporters, with their seconds."""

    def estimate(cost: tuple[float, float], count: int = 1) -> float:
        return count * (cost[0] + cost[1] * parameters / PARAMETERS_MEASURED)

    phases: list[tuple[str, float]] = []
    files = 1
    is_merged = False
    for kind in kinds:
        if kind != "adapter" and not is_merged:
            phases.append(("merging", estimate(MERGE)))
            is_merged = True
        match kind:
            case "adapter":
                phases.append(("verifying", estimate(CHECK_TOKENIZER)))
            case "onnx":
                phases.append(("converting", estimate(ONNX)))
            case "gguf" | "lora_gguf":
                count = quantization_count if kind == "gguf" else 1
                files += count
                phases.append(("converting", estimate(CONVERT) + estimate(QUANTIZE, count)))
                phases.append(("verifying", estimate(VERIFY_GGUF, count)))
            case _:  # "merged", which is made by now
                files += 1
    return (*phases, ("uploading", estimate(UPLOAD, files)))


def plan_artifacts(model: ModelShape, plan: ExportPlan) -> tuple[PlannedArtifact, ...]:
    """The artifacts that will be published, with their sizes."""
    tokenizer = TOKENIZER_BYTES_PER_TOKEN * model.vocab_size
    artifacts: list[PlannedArtifact] = []
    for kind in plan.kinds:
        match kind:
            case "adapter":
                artifacts.append(PlannedArtifact("adapter", kind, 4 * plan.adapter_parameters + tokenizer))
            case "merged":
                artifacts.append(PlannedArtifact("merged", kind, model.parameters * plan.merged_bytes_per_parameter + tokenizer))
            case "onnx":
                artifacts.append(PlannedArtifact("onnx", kind, model.parameters * ONNX_BYTES_PER_PARAMETER + tokenizer))
            case "gguf":
                artifacts += [
                    PlannedArtifact(f"gguf-{name}", kind, estimate_gguf_bytes(model, name, plan.merged_bytes_per_parameter))
                    for name in plan.quantizations
                ]
            case _:  # "lora_gguf"
                artifacts.append(PlannedArtifact("lora-gguf", kind, 2 * plan.adapter_parameters))
    return tuple(artifacts)


def estimate_gguf_bytes(model: ModelShape, quantization: str, merged_bytes_per_parameter: int) -> float:
    """The size of a GGUF file, with its vocabulary."""
    vocabulary = TOKENIZER_BYTES_PER_TOKEN * model.vocab_size / 5
    if quantization == "none":
        return model.parameters * merged_bytes_per_parameter + vocabulary
    bits = GGUF_BITS[quantization]
    if model.hidden_size % GGUF_BLOCK:
        bits = FALLBACK_BITS.get(quantization, bits)
    embeddings = min(float(model.embedding_parameters), model.parameters)
    embedding_bits = max(bits, GGUF_EMBEDDING_BITS) if bits < GGUF_EMBEDDING_BITS else bits
    return ((model.parameters - embeddings) * bits + embeddings * embedding_bits) / 8 + vocabulary


def estimate_export_memory(model: ModelShape, plan: ExportPlan, *, on_gpu: bool, has_bf16: bool = True) -> ExportMemory:
    """What an export needs at the very least: it compares in bf16 where fp32 does not fit."""
    device = estimate_comparison_bytes(round(model.parameters * (2 if has_bf16 else 4))) if plan.makes_merged else 0.0
    tracing = ONNX_TRACING_FACTOR * ONNX_BYTES_PER_PARAMETER * model.parameters if "onnx" in plan.kinds else 0.0
    return ExportMemory(device, tracing) if on_gpu else ExportMemory(max(device, tracing), 0.0)


def explain_impossible_export(model: ModelShape, plan: ExportPlan) -> str | None:
    """Why something cannot be exported on any hardware; None if it can."""
    if "onnx" in plan.kinds and model.parameters > ONNX_MAX_PARAMETERS:
        limit = f"export format onnx supports models of up to {ONNX_MAX_PARAMETERS / 1e9:g} billion parameters"
        return f"{limit}, and this one has {model.parameters / 1e9:.1f}"
    return None
