"""How long a language model job takes, phase by phase, as ranges. Pure; `devices.py` has the speed of the hardware.

The range holds for hardware that does nothing else. Its upper end is meant to be kept nine times in ten: a price is decided by it.
"""

from dataclasses import dataclass
from math import ceil

from schema.estimate.devices import Device
from schema.estimate.disk import ASSUMED_SAVE_BYTES_PER_S
from schema.estimate.llm import ADAPTER_FLOP_PER_PARAMETER, FULL_FLOP_PER_PARAMETER, limit_generation_batch
from schema.estimate.llm_shapes import ModelShape
from schema.estimate.ranges import NOTHING, Range

# --- coefficients ---

FORWARD_FLOP_PER_PARAMETER = 2  # per token, by definition
# Forward passes without gradients beside the trained ones, in which the tokens of an example pass: DPO asks its reference; KTO asks the
# model about answers of other rows, and its reference about both.
EXTRA_FORWARDS = {"dpo": 1, "kto": 3}

OPERATIONS_PER_LAYER = 302  # of a forward and a backward pass, counted on a Gemma layer
FORWARD_SHARE = 1 / 3  # of these in a forward pass
LAUNCH_S = {True: Range(6e-6, 15e-6), False: Range(4e-6, 40e-6)}  # of one operation, by whether it is on a GPU; 10 µs is usual there

# One thread renders and tokenizes 547,000 tokens a second of Gemma's vocabulary (`bench/rendering.py`), a slow machine a fifth of that.
TOKENIZED_PER_S = Range(110e3, 1.1e6)
MIN_TOKENIZING_S = Range(0.5, 4.0)
# Importing the libraries, loading the tokenizer and the model, trying the exports: measured 10 to 14 s with Gemma 3 270M on two cores.
PREPARE_S = Range(6.0, 30.0)
LOAD_BYTES_PER_S = Range(0.1e9, 2e9)  # of a base from the machine's disk into memory

# Until the attempt's process begins, by launcher. A local process starts in 0.1 s and claims its job in 1 to 2 s. Cloud Run pulls the
# image: an assumption, not measured. A launcher of another name may do either.
STARTS = {"local": Range(0.5, 5.0), "cloud-run": Range(20.0, 240.0)}
UNKNOWN_START = Range(0.5, 300.0)

# How fast a base arrives. From the store of a deployment to the machine, which for a folder is a copy; from the Hub over the internet.
STORE_BYTES_PER_S = {"local": Range(0.2e9, 4e9)}
REMOTE_STORE_BYTES_PER_S = Range(50e6, 500e6)
HUB_BYTES_PER_S = Range(10e6, 200e6)
UPLOAD_BYTES_PER_S = {"local": Range(0.1e9, 2e9)}
REMOTE_UPLOAD_BYTES_PER_S = Range(20e6, 300e6)
SAVE_BYTES_PER_S = Range(ASSUMED_SAVE_BYTES_PER_S, 1e9)
MIN_SAVE_S = Range(0.1, 3.0)  # of a small checkpoint; on a laptop 0.8 % of a training

EVALUATION_START_S = Range(0.2, 2.0)


@dataclass(frozen=True)
class Work:
    """What passes through the model in a training."""

    trainer_type: str
    method: str
    tokens: float  # of the whole training, with padding
    passes: float  # forward and backward passes
    gradient_checkpointing: bool = False
    steps: int = 0
    generated_batches: float = 0.0  # of GRPO
    generated_tokens: int = 0  # of the longest completion in a batch
    generation_batch: int = 1


def estimate_training(model: ModelShape, device: Device, work: Work) -> Range:
    """The optimizer steps, without evaluations and checkpoints."""
    per_parameter = FULL_FLOP_PER_PARAMETER if work.method == "Full" else ADAPTER_FLOP_PER_PARAMETER
    extra = EXTRA_FORWARDS.get(work.trainer_type, 0)
    per_parameter += FORWARD_FLOP_PER_PARAMETER * ((1 if work.gradient_checkpointing else 0) + extra)
    computing = _compute(device, work.tokens * per_parameter * _computed_parameters(model), _uses_bf16(device, work.method))
    passes = work.passes * (1 + FORWARD_SHARE * extra)
    launching = LAUNCH_S[device.on_gpu].scale(passes * model.layers * OPERATIONS_PER_LAYER)
    trained = model.parameters if work.method == "Full" else model.count_adapter_parameters(16)
    updating = Range(24 * trained / device.memory_bytes_per_s.high, 48 * trained / device.memory_bytes_per_s.low).scale(work.steps)
    generating = estimate_generation(model, device, work.generation_batch, work.generated_tokens).scale(work.generated_batches)
    return computing + launching + updating + generating


def estimate_generation(model: ModelShape, device: Device, batch: int, new_tokens: int) -> Range:
    """Generating so many tokens for one batch of prompts. Answers may end early."""
    weights = _computed_parameters(model) * (2 if device.has_bf16 else 4)
    reading = Range(weights / device.memory_bytes_per_s.high, weights / device.memory_bytes_per_s.low)
    computing = _compute(device, batch * FORWARD_FLOP_PER_PARAMETER * _computed_parameters(model), device.has_bf16)
    launching = LAUNCH_S[device.on_gpu].scale(model.layers * OPERATIONS_PER_LAYER * FORWARD_SHARE)
    return (reading + computing + launching).scale(new_tokens).spread(0.2, 1.0)


def estimate_evaluation(model: ModelShape, device: Device, *, tokens: float, rows: int, prompts: int, new_tokens: int, batch: int) -> Range:
    """One evaluation: the loss on held-out rows, and the generated answers."""
    computing = _compute(device, tokens * FORWARD_FLOP_PER_PARAMETER * _computed_parameters(model), device.has_bf16)
    passes = ceil(rows / max(1, batch))
    launching = LAUNCH_S[device.on_gpu].scale(passes * model.layers * OPERATIONS_PER_LAYER * FORWARD_SHARE)
    total = EVALUATION_START_S + computing + launching
    if not prompts:
        return total
    mean_tokens = ceil(tokens / rows) if rows else 1
    size = min(prompts, limit_generation_batch(batch, mean_tokens, new_tokens))
    return total + estimate_generation(model, device, size, new_tokens).scale(ceil(prompts / size))


def estimate_start(launcher: str) -> Range:
    """From the launch to the beginning of the attempt's process."""
    return STARTS.get(launcher, UNKNOWN_START)


def estimate_download(weights_bytes: float, launcher: str, *, is_stored: bool) -> Range:
    """Getting the base to the machine."""
    speed = STORE_BYTES_PER_S.get(launcher, REMOTE_STORE_BYTES_PER_S) if is_stored else HUB_BYTES_PER_S
    return Range(weights_bytes / speed.high, weights_bytes / speed.low) + Range(0.2, 3.0)


def estimate_preparation(tokens: float, weights_bytes: float) -> Range:
    """Rows to tokens, and everything until the first step."""
    loading = Range(weights_bytes / LOAD_BYTES_PER_S.high, weights_bytes / LOAD_BYTES_PER_S.low)
    return MIN_TOKENIZING_S + Range(tokens / TOKENIZED_PER_S.high, tokens / TOKENIZED_PER_S.low) + PREPARE_S + loading


def estimate_saves(checkpoint_bytes: float, count: float) -> Range:
    """Saving so many checkpoints. Most of it happens beside the next steps, so the lower end is small."""
    if count <= 0:
        return NOTHING
    return (MIN_SAVE_S + Range(checkpoint_bytes / SAVE_BYTES_PER_S.high, checkpoint_bytes / SAVE_BYTES_PER_S.low)).scale(count)


def estimate_upload(artifact_bytes: float, launcher: str) -> Range:
    """Uploading the artifacts."""
    speed = UPLOAD_BYTES_PER_S.get(launcher, REMOTE_UPLOAD_BYTES_PER_S)
    return Range(0.2, 3.0) + Range(artifact_bytes / speed.high, artifact_bytes / speed.low)


def _computed_parameters(model: ModelShape) -> float:
    """The parameters that a token passes: in a mixture of experts, those of its experts only."""
    if not model.experts_per_token or not model.experts:
        return model.parameters
    unused = model.layers * model.expert_parameters * max(0.0, 1 - model.experts_per_token / model.experts)
    return max(model.parameters - unused, 0.02 * model.parameters)


def _uses_bf16(device: Device, method: str) -> bool:
    return device.has_bf16 and (device.on_gpu or method != "Full")  # on a processor all weights are trained in fp32


def _compute(device: Device, flop: float, bf16: bool) -> Range:
    speed = device.flop_per_s if bf16 or not device.on_gpu else device.flop_per_s.spread(0.25, 0.5)
    if not device.on_gpu and not bf16:
        speed = speed.spread(0.5, 1.0)  # 5.4 s for a step in fp32 that took 3 s in bf16, on two cores that have it
    return Range(flop / speed.high, flop / speed.low)
