"""What the planner of language models works with: the sizes of the base, the lengths of an epoch's rows, the hardware, the exports."""

from dataclasses import dataclass, replace
from typing import Literal

from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT, Dataset
from schema.estimate.devices import Device, find_gpu, make_cpu
from schema.estimate.llm_export import ExportPlan
from schema.estimate.llm_memory import PAIRED_TRAINER_TYPES, LongestRows, TrainingShape
from schema.estimate.llm_models import find_known_shape
from schema.estimate.llm_plan import TrainingNeeds
from schema.estimate.llm_shapes import ModelShape, read_model_shape
from schema.estimate.llm_steps import StepPlan, choose_grpo_accumulation, plan_grpo_steps, plan_steps
from schema.estimate.row_lengths import RowLengths, guess_lengths, merge_lengths, read_histogram
from schema.ingestion import TokenLengths
from schema.mixing import count_mixed_rows
from schema.training.llm import GrpoConfig, LlmTrainingConfig, SftConfig
from service.core.dry_run.facts import JobFacts
from service.core.models.sizes import StoredBase
from service.core.ports import Profile

TEXT_SHARE = 0.75  # of the bytes of a row that are text: the rest is JSON
MERGED_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
SizeSource = Literal["model_store", "known_name", "unknown"]


@dataclass(frozen=True)
class LlmFacts:
    """What is known of a training of a language model."""

    model: ModelShape | None  # None: the sizes of the base are not known
    size_from: SizeSource
    train: RowLengths  # of an epoch, before truncation; of a pair the longer sequence
    held_out: RowLengths
    max_positions: int | None = None  # of the base; None: not known

    @property
    def is_counted(self) -> bool:
        """Whether the rows' tokens were counted by the base's tokenizer."""
        return bool(self.train.top)


def read_llm_facts(config: LlmTrainingConfig, facts: JobFacts) -> LlmFacts:
    """The facts of a job of this family."""
    model, size_from = find_shape(config.base_model_id, facts.base)
    counts = [each.dataset.splits[TRAIN_SPLIT].rows for each in facts.datasets]
    taken = count_mixed_rows(counts, [each.weight for each in facts.datasets]) if len(counts) > 1 else counts
    # KTO learns from the two answers of a pair one by one.
    copies = 2 if config.trainer_type_name() == "kto" and any(each.dataset.dataset_type == "preference" for each in facts.datasets) else 1
    parts: list[RowLengths] = []
    held_out: list[RowLengths] = []
    for each, lengths, rows in zip(facts.datasets, facts.token_lengths, taken, strict=True):
        parts.append(_read_lengths(each.dataset, lengths, TRAIN_SPLIT).resize(rows * copies))
        held_out.append(_read_lengths(each.dataset, lengths, EVAL_SPLIT))
    positions = facts.base.config.get("max_position_embeddings") if facts.base else None
    return LlmFacts(
        model=model,
        size_from=size_from,
        train=merge_lengths(parts),
        held_out=merge_lengths(held_out),
        max_positions=positions if isinstance(positions, int) and positions > 0 else None,
    )


def find_shape(base_model_id: str, base: StoredBase | None) -> tuple[ModelShape | None, SizeSource]:
    """The sizes of a base: from its files in the model store, or by its name."""
    if base is not None:
        return read_model_shape(base.config, base.weights_bytes), "model_store"
    known = find_known_shape(base_model_id)
    return known, "known_name" if known else "unknown"


def make_device(profile: Profile) -> Device:
    """The hardware of a profile, as the estimator knows it."""
    if profile.device == "cuda":
        return find_gpu(profile.device_name, profile.gpu_memory_bytes)
    return make_cpu(profile.device_name, profile.cpus, profile.memory_bytes, has_bf16=profile.has_bf16 or False)


def make_training_shape(config: LlmTrainingConfig, device: Device) -> TrainingShape:
    """The settings on which memory and time depend, without the lengths of the rows."""
    hyperparameters = config.hyperparameters
    accumulation = hyperparameters.accumulation_steps
    if isinstance(config, GrpoConfig) and config.hyperparameters.gradient_accumulation_steps is None:
        accumulation = choose_grpo_accumulation(hyperparameters.batch_size, config.hyperparameters.num_generations, 1)
    trains_adapter = config.method != "Full"
    return TrainingShape(
        trainer_type=config.trainer_type_name(),
        method=config.method,
        batch_size=hyperparameters.batch_size,
        max_seq_length=hyperparameters.max_seq_length,
        gradient_accumulation_steps=accumulation,
        train_vision_tower=isinstance(config, SftConfig) and config.hyperparameters.train_vision_tower,
        lora_rank=hyperparameters.lora_rank,
        has_dropout=trains_adapter and hyperparameters.lora_dropout > 0,
        optimizer=hyperparameters.optim,
        computes_bf16=device.has_bf16 and (device.on_gpu or trains_adapter),
        on_gpu=device.on_gpu,
        keeps_logits=config.modality == "vision",
    )


def make_needs(config: LlmTrainingConfig, facts: LlmFacts, model: ModelShape, device: Device) -> TrainingNeeds:
    """What the memory of the training depends on. Rows that nobody counted are taken to have max_seq_length tokens, all of them labeled."""
    shape = make_training_shape(config, device)
    count, max_length = shape.batch_size * shape.gradient_accumulation_steps, shape.max_seq_length
    packing = config.hyperparameters.packing
    counts_rows = bool(facts.train.top) and not packing and config.trainer_type_name() != "grpo"
    longest = facts.train.list_longest(count, max_length) if counts_rows else (max_length,) * min(count, max(1, facts.train.rows))
    rows = LongestRows(
        longest,
        longest if shape.trainer_type != "grpo" else _grpo_labels(config, longest),
        sequences_per_row=2 if shape.trainer_type in PAIRED_TRAINER_TYPES else 1,
        concatenated=concatenates_rows(config, on_gpu=device.on_gpu),
        keeps_logits=shape.keeps_logits,
    )
    if shape.trainer_type in PAIRED_TRAINER_TYPES:
        rows = replace(rows, labels=tuple(2 * tokens for tokens in rows.labels))
    return TrainingNeeds(model, replace(shape, batch=rows.largest_batch(shape.batch_size)), rows)


def _grpo_labels(config: LlmTrainingConfig, longest: tuple[int, ...]) -> tuple[int, ...]:
    completion = config.hyperparameters.max_completion_length if isinstance(config, GrpoConfig) else 0
    return tuple(min(tokens, completion) for tokens in longest)


def concatenates_rows(config: LlmTrainingConfig, *, on_gpu: bool) -> bool:
    """Whether an attempt will train the rows of a batch as one sequence, as far as that shows before the base is loaded."""
    if not isinstance(config, SftConfig) or config.modality == "vision":
        return False
    if config.hyperparameters.packing:
        return config.hyperparameters.use_fa2
    return on_gpu and config.hyperparameters.micro_batches == "auto"


def make_step_plan(config: LlmTrainingConfig, facts: LlmFacts, *, on_gpu: bool) -> StepPlan:
    """The steps and tokens of the training."""
    hyperparameters = config.hyperparameters
    if isinstance(config, GrpoConfig):
        grpo = config.hyperparameters
        return plan_grpo_steps(
            facts.train.truncate(max(1, grpo.max_seq_length - grpo.max_completion_length)),
            batch_size=grpo.batch_size,
            accumulation_steps=grpo.gradient_accumulation_steps,
            epochs=grpo.epochs,
            max_steps=grpo.max_steps,
            num_generations=grpo.num_generations,
            num_iterations=grpo.num_iterations,
            completion_tokens=grpo.max_completion_length,
            on_gpu=on_gpu,
        )
    steps = plan_steps(
        facts.train.truncate(hyperparameters.max_seq_length),
        batch_size=hyperparameters.batch_size,
        accumulation_steps=hyperparameters.accumulation_steps,
        epochs=hyperparameters.epochs,
        max_steps=hyperparameters.max_steps,
        packing=hyperparameters.max_seq_length if hyperparameters.packing else None,
        trainer_type=config.trainer_type_name(),
    )
    # A row of whose answer nothing is left when it is cut is dropped.
    return replace(steps, exact=steps.exact and facts.train.longest <= hyperparameters.max_seq_length)


def make_export_plan(config: LlmTrainingConfig, model: ModelShape) -> ExportPlan:
    """What is exported, in the order of the exporters."""
    export = config.export_config
    kinds = [*config.export_formats, *(["gguf"] if export.include_gguf else []), *(["lora_gguf"] if export.include_lora_gguf else [])]
    stored = 4 if model.stored_bytes_per_parameter >= 4 else 2
    return ExportPlan(
        kinds=tuple(kinds),
        quantizations=tuple(export.gguf_quantizations),
        merged_bytes_per_parameter=MERGED_BYTES[export.merged_dtype] if export.merged_dtype else stored,
        adapter_parameters=0 if config.method == "Full" else model.count_adapter_parameters(config.hyperparameters.lora_rank),
    )


def _read_lengths(dataset: Dataset, lengths: TokenLengths | None, split: str) -> RowLengths:
    """The lengths of the rows of a split: counted, or guessed from the characters of all rows or from their size."""
    rows = dataset.splits[split].rows if split in dataset.splits else 0
    if lengths is not None and lengths.rows:
        counted = read_histogram(lengths.histogram, lengths.total_tokens, lengths.longest, exact=lengths.exact)
        of_split = counted.resize(rows)
        if split not in lengths.split_tokens:
            return of_split
        clipped = tuple((int(limit), tokens) for limit, tokens in lengths.clipped_tokens.items()) if split == TRAIN_SPLIT else ()
        return replace(of_split.scale_to(lengths.split_tokens[split]), exact=lengths.exact, clipped=clipped)
    if dataset.report is not None and dataset.report.characters:
        return guess_lengths(rows, dataset.report.characters * rows / max(1, dataset.rows))
    return guess_lengths(rows, TEXT_SHARE * (dataset.splits[split].size_bytes if split in dataset.splits else 0))
