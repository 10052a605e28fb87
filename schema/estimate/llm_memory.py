"""Peak memory of training a language model on one device.

At the peak of a step either the loss head or the backward pass of the last layer runs, while everything that autograd saved is still
there; or, in trainings with few tokens, all gradients are there. `bench/memory.py` compares the estimate with measured peaks.

Not estimated: fragments and rounding of the caching allocator, and what a kernel allocates and frees inside one operation. For both,
USABLE_MEMORY_FRACTION and GPU_WORKSPACE_BYTES leave room.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heappush, heappushpop

from schema.estimate.llm_activations import MEASURED, ActivationBytes, WayToTrain
from schema.estimate.llm_shapes import ModelShape

# --- coefficients ---

PAIRED_TRAINER_TYPES = ("dpo", "orpo", "reward")  # a row is a pair: two sequences
REFERENCE_TRAINER_TYPES = ("dpo", "kto")  # with an adapter, the reference is the same model with the adapter disabled

FP32_BYTES, BF16_BYTES = 4, 2
# NF4 with double quantization: 4 bits, a scale of 8 bits for 64 weights, and an fp32 scale for 256 of those. By bitsandbytes' definition.
QUANTIZED_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
ADAM_BYTES = 8  # the two moments of a trained weight in fp32, by the definition of Adam
OPTIMIZER_BYTES: Mapping[str, float] = {  # per trained weight, by the name that transformers gives the optimizer
    "adamw_torch_fused": ADAM_BYTES,
    "adamw_torch": ADAM_BYTES,
    "adamw_8bit": 2 + 8 / 256,  # two moments of 8 bits, and their fp32 scales for 256 weights
    "lion_8bit": 1 + 4 / 256,
    # The driver moves the state of these to main memory when the GPU's is full.
    "paged_adamw_8bit": 0,
    "paged_adamw_32bit": 0,
    "paged_lion_8bit": 0,
    "adafactor": 0.1,  # a row and a column for each matrix
    "sgd": 0,
}

# Architectures that were not measured take the largest coefficients of those that were, of the same kind.
DEFAULT_MODEL_TYPE, DEFAULT_MIXTURE_MODEL_TYPE = "gemma3_text", "qwen3_moe"

# The chunks of jobs/llm/loss.py, in fp32 logits, and what is allocated for each of their logits: measured by bench/memory.py.
CHUNK_BYTES: Mapping[bool, int] = {False: 32 << 20, True: 512 << 20}  # by whether the training is on a GPU
CHUNKED_LOGIT_BYTES = 10
# Per logit in the trainers that keep the logits of all labels: measured by bench/memory.py on a CPU. On a GPU TRL's kernels keep less.
KEPT_LOGIT_BYTES: Mapping[str, float] = {"sft": 14, "dpo": 14, "kto": 17, "orpo": 18, "grpo": 14, "reward": 0}
UNLABELED_LOGIT_TRAINER_TYPES = ("orpo",)  # keep the logits of all other tokens too, padding included
# Per label of a batch of held-out rows: the logits, a copy in fp32, and their log probabilities. An evaluation of two rows of 1,024 labels
# with Gemma 3 270M took 5.5 GB beside the weights.
EVALUATED_LOGIT_BYTES = 10
HEAD_GRADIENT_COPIES = 2  # of a trained head: the sum over the chunks, and the gradient of one

# For each weight of a layer's adapted experts, in the layer's backward pass: the gradients of the sums of weights and updates, and the
# updates computed again. Fitted to one training of a mixture of experts in bench/memory.py.
EXPERT_BACKWARD_BYTES = 32

VISION_ACTIVATION_BYTES = 90  # of a patch, per hidden unit and layer of a trained vision tower

UNSHARDED_LAYERS = 3  # FSDP layers that are whole at once: the computing one, the prefetched one, and the previous one's gradients
UNSHARDED_LAYER_BYTES = 4  # per parameter of such a layer; consistent with fp32
UNSHARDED_EMBEDDING_BYTES = 8  # per embedding weight under FSDP; consistent with fp32 weight and gradient, whole throughout a step

# Of free memory. An estimate may be 15 % too low, and the caching allocator loses a few percent.
USABLE_MEMORY_FRACTION = 0.8
GPU_WORKSPACE_BYTES = 64 << 20  # cuBLAS keeps 32 MiB for each of its two handles on Hopper GPUs, and less on others; by PyTorch's notes

MAX_BUDGET_TOKENS = 1 << 20  # more in one batch would gain nothing


# --- what is estimated ---


@dataclass(frozen=True)
class BatchShape:
    """The tokens of one forward pass, with the padding."""

    sequences: int
    sequence_tokens: int
    labels: int

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return self.sequences * self.sequence_tokens


@dataclass(frozen=True)
class LongestRows:
    """The longest rows of a training: those that shuffling may bring together in one batch."""

    tokens: tuple[int, ...]  # of the longest rows, descending; of a pair its longer sequence
    labels: tuple[int, ...]  # of the rows with the most labels, descending
    sequences_per_row: int = 1  # 2 for pairs
    concatenated: bool = False  # the rows of a batch become one sequence, without padding
    keeps_logits: bool = False  # the loss keeps the logits of all labels, where the trainer type usually does not

    def largest_batch(self, batch_size: int) -> BatchShape:
        """The largest batch of `batch_size` rows."""
        labels = sum(self.labels[:batch_size])
        if self.concatenated:
            return BatchShape(1, sum(self.tokens[:batch_size]), labels)
        sequences = min(batch_size, len(self.tokens)) * self.sequences_per_row
        return BatchShape(sequences, max(self.tokens, default=0), labels)


def find_longest_rows(rows: Iterable[tuple[int, int]], count: int) -> LongestRows:
    """The longest `count` of the rows, given as their numbers of tokens and labels."""
    tokens: list[int] = []
    labels: list[int] = []
    for row in rows:
        for heap, value in zip((tokens, labels), row, strict=True):
            if len(heap) < count:
                heappush(heap, value)
            else:
                heappushpop(heap, value)
    return LongestRows(tuple(sorted(tokens, reverse=True)), tuple(sorted(labels, reverse=True)))


@dataclass(frozen=True)
class TrainingShape:
    """The settings of a training on which its memory and time depend; batches are those of one device."""

    trainer_type: str
    method: str  # "Full", "LoRA" or "QLoRA"
    batch_size: int  # rows
    max_seq_length: int  # tokens
    gradient_accumulation_steps: int = 1
    train_vision_tower: bool = False
    batch: BatchShape | None = None  # the largest batch; None assumes that every row has max_seq_length tokens, all of them labeled
    lora_rank: int = 16
    has_dropout: bool = False
    adapts_experts: bool = False  # of a mixture of experts
    optimizer: str = "adamw_torch_fused"
    computes_bf16: bool = True
    on_gpu: bool = True
    keeps_logits: bool = False  # sft on images computes the logits of all labels at once

    @property
    def largest_batch(self) -> BatchShape:
        """The largest batch, or the largest possible one."""
        if self.batch is not None:
            return self.batch
        sequences = self.batch_size * (2 if self.trainer_type in PAIRED_TRAINER_TYPES else 1)
        return BatchShape(sequences, self.max_seq_length, sequences * self.max_seq_length)

    @property
    def way_to_train(self) -> WayToTrain:
        """Which of the measured ways this is."""
        if self.method == "Full":
            return "full_autocast" if self.computes_bf16 and self.on_gpu else "full_fp32"
        if self.computes_bf16:
            return "adapter_bf16_dropout" if self.has_dropout else "adapter_bf16"
        return "adapter_fp32_dropout" if self.has_dropout else "adapter_fp32"

    @property
    def residual_bytes(self) -> int:
        """Bytes of a hidden unit between two layers."""
        return BF16_BYTES if self.way_to_train.startswith("adapter_bf16") else FP32_BYTES


@dataclass(frozen=True)
class TrainingMemory:
    """The parts of a training's memory, in bytes."""

    weights: float  # of all models
    optimizer_state: float
    gradients: float
    accumulates_gradients: bool  # they are there during the forward pass too
    activations: float  # saved in the forward pass
    head: float  # at the peak of the loss head
    backward: float  # at the peak of the backward pass of a layer
    constant: float

    @property
    def peak(self) -> float:
        """The most that is there at once."""
        steady = self.weights + self.optimizer_state + self.constant
        in_step = self.activations + max(self.head, self.backward)
        return steady + (self.gradients + in_step if self.accumulates_gradients else max(self.gradients, in_step))


# --- estimates ---


def estimate_training_bytes(
    model: ModelShape, training: TrainingShape, *, gradient_checkpointing: bool = False, num_shards: int = 1
) -> float:
    """Peak memory of a training on one device: weights, gradients, optimizer state, activations and loss head."""
    return estimate_training_memory(model, training, gradient_checkpointing=gradient_checkpointing, num_shards=num_shards).peak


def estimate_training_memory(
    model: ModelShape, training: TrainingShape, *, gradient_checkpointing: bool = False, num_shards: int = 1
) -> TrainingMemory:
    """The parts of a training's memory on one device.

    With `num_shards` above 1, weights, gradients and optimizer state are sharded; a few layers and the embeddings stay whole.
    """
    trains_all = training.method == "Full"
    trained = model.parameters if trains_all else _count_adapter_parameters(model, training)
    unsharded = 0.0
    if num_shards > 1:
        embeddings = UNSHARDED_EMBEDDING_BYTES * model.vocab_size * model.hidden_size
        unsharded = embeddings + UNSHARDED_LAYERS * UNSHARDED_LAYER_BYTES * model.parameters / model.layers
    layer_bytes, backward_bytes = _estimate_layer_bytes(model, training)
    kept_bytes = training.largest_batch.tokens * model.hidden_size * training.residual_bytes
    activations = model.layers * (kept_bytes if gradient_checkpointing else layer_bytes)
    if gradient_checkpointing:  # a layer is computed again before its backward pass
        backward_bytes += layer_bytes
    if training.train_vision_tower:
        activations += _estimate_vision_bytes(model, training, gradient_checkpointing=gradient_checkpointing)
    return TrainingMemory(
        weights=_estimate_weights_bytes(model, training) / num_shards,
        optimizer_state=trained * OPTIMIZER_BYTES.get(training.optimizer, ADAM_BYTES) / num_shards,
        gradients=trained * FP32_BYTES / num_shards,
        accumulates_gradients=training.gradient_accumulation_steps > 1,
        activations=activations,
        head=_estimate_head_bytes(model, training),
        backward=backward_bytes,
        constant=unsharded + (GPU_WORKSPACE_BYTES if training.on_gpu else 0),
    )


def estimate_evaluation_bytes(model: ModelShape, training: TrainingShape, labels: int) -> float:
    """Peak memory of computing the loss on a batch of held-out rows with so many labels, beside what the training keeps."""
    memory = estimate_training_memory(model, replace(training, batch=BatchShape(1, 1, 1)))
    return memory.weights + memory.optimizer_state + memory.constant + labels * model.vocab_size * EVALUATED_LOGIT_BYTES


def usable_memory_bytes(free_bytes: float) -> float:
    """The part of a device's free memory that a training may be planned to take."""
    return free_bytes * USABLE_MEMORY_FRACTION


def find_token_budget(
    model: ModelShape, training: TrainingShape, available_bytes: float, *, gradient_checkpointing: bool = False, num_shards: int = 1
) -> int:
    """The most tokens that one forward pass may have, as rows that are concatenated to one sequence; 0 if not even one fits."""

    def fits(tokens: int) -> bool:
        shape = replace(training, batch=BatchShape(1, tokens, tokens))
        needed = estimate_training_bytes(model, shape, gradient_checkpointing=gradient_checkpointing, num_shards=num_shards)
        return needed <= available_bytes

    low, high = 0, MAX_BUDGET_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def find_least_bytes(model: ModelShape, training: TrainingShape, num_shards: int = 1) -> float:
    """What a training takes at the very least: a single short row, gradient checkpointing, and no room for fragments."""
    shape = replace(training, batch_size=1, batch=BatchShape(1, 1, 1))
    memory = estimate_training_memory(model, shape, gradient_checkpointing=True, num_shards=num_shards)
    return memory.peak - memory.constant


def explain_misfit(
    model: ModelShape, training: TrainingShape, device_bytes: float, *, device: str, methods: Sequence[str] = (), num_shards: int = 1
) -> str | None:
    """Why a training cannot fit into a device however small its batches are, and which of the methods would; None if it may fit."""
    needed = find_least_bytes(model, training, num_shards)
    if needed <= device_bytes:
        return None
    fitting = [method for method in methods if find_least_bytes(model, replace(training, method=method)) <= device_bytes]
    shared = f" in each of {num_shards} processes" if num_shards > 1 else ""
    message = f"method {training.method} needs at least {needed / 1e9:.0f} GB{shared}, and {device} has {device_bytes / 1e9:.0f} GB"
    return f"{message}; method {' or '.join(fitting)} would fit" if fitting else f"{message}; use a smaller base model or a larger device"


# --- parts ---


def find_activation_bytes(model: ModelShape, way: WayToTrain) -> ActivationBytes:
    """The measured coefficients of the architecture, or those that an unknown one gets."""
    default = DEFAULT_MIXTURE_MODEL_TYPE if model.experts_per_token else DEFAULT_MODEL_TYPE
    return MEASURED.get((model.model_type, way), MEASURED[default, way])


def _estimate_layer_bytes(model: ModelShape, training: TrainingShape) -> tuple[float, float]:
    """What a layer saves for its backward pass, and what its backward pass takes beside that."""
    cost, batch = find_activation_bytes(model, training.way_to_train), training.largest_batch
    token_bytes = (
        cost.hidden * model.hidden_size
        + cost.intermediate * model.active_intermediate_size
        + cost.query * model.query_size
        + cost.key_value * model.key_value_size
        + cost.routed_hidden * model.hidden_size * model.experts_per_token
        + cost.rank * training.lora_rank
        + (cost.mask + cost.attention_matrix * model.heads) * batch.sequence_tokens
    )
    experts = model.expert_parameters if training.adapts_experts else 0
    saved = batch.tokens * token_bytes + experts * training.residual_bytes  # the experts with their updates added
    return saved, batch.tokens * cost.backward * model.active_intermediate_size + experts * EXPERT_BACKWARD_BYTES


def _count_adapter_parameters(model: ModelShape, training: TrainingShape) -> int:
    return model.count_adapter_parameters(training.lora_rank, adapts_experts=training.adapts_experts)


def _estimate_head_bytes(model: ModelShape, training: TrainingShape) -> float:
    """The logits of a chunk or of all labels, and what the loss keeps of the hidden states."""
    batch, labels = training.largest_batch, training.largest_batch.labels
    if training.trainer_type != "sft" or training.keeps_logits:
        kept = batch.tokens if training.trainer_type in UNLABELED_LOGIT_TRAINER_TYPES else labels
        return kept * model.vocab_size * KEPT_LOGIT_BYTES[training.trainer_type]
    chunk = max(1, CHUNK_BYTES[training.on_gpu] // (FP32_BYTES * model.vocab_size))
    states = 2 * labels * model.hidden_size * training.residual_bytes  # those at labeled tokens, and their gradient
    gradients = HEAD_GRADIENT_COPIES * FP32_BYTES * model.vocab_size * model.hidden_size if training.method == "Full" else 0
    return min(labels, chunk) * model.vocab_size * CHUNKED_LOGIT_BYTES + states + gradients


def _estimate_weights_bytes(model: ModelShape, training: TrainingShape) -> float:
    """The base, the adapter and the reference model."""
    adapter = FP32_BYTES * _count_adapter_parameters(model, training)
    computed = BF16_BYTES if training.computes_bf16 else FP32_BYTES
    match training.method:
        case "Full":
            models = 2 if training.trainer_type in REFERENCE_TRAINER_TYPES else 1
            cast = BF16_BYTES if training.way_to_train == "full_autocast" else 0  # autocast keeps the weights of a step in bf16
            return model.parameters * (models * FP32_BYTES + cast)
        case "QLoRA":
            quantized = max(0.0, model.parameters - model.embedding_parameters)
            return quantized * QUANTIZED_BYTES + (model.parameters - quantized) * computed + adapter
        case _:
            return model.parameters * computed + adapter


def _estimate_vision_bytes(model: ModelShape, training: TrainingShape, *, gradient_checkpointing: bool) -> float:
    """The activations of a trained vision tower, for one image in each row; a frozen one keeps none."""
    vision = model.vision
    hidden_bytes = training.batch_size * vision.patches * vision.hidden_size
    if gradient_checkpointing:
        return hidden_bytes * (vision.layers * training.residual_bytes + VISION_ACTIVATION_BYTES)
    return hidden_bytes * vision.layers * VISION_ACTIVATION_BYTES
