"""The loop that every trainer of language models goes through, whatever its loss.

    1. lay_ground   where to go on: the job's newest checkpoint; the base, the rows, the tokenizer, the machine
    2. teach        measure the base, train, measure at every evaluation, measure again, save

Transformers' trainer, or one of TRL's, moves the weights; `Course` says when it is saved and when it ends. What a trainer type brings
is a `Lesson`. When memory runs out the batch gets smaller, and the training goes on from what was saved.
"""

import math
import shutil
import time
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from jobs.llm.base_model import fetch_base
from jobs.llm.data.tokenize import TokenizedExample, TokenizedSplit, set_default_chat_template
from jobs.llm.distributed import (
    PADDING_BATCH,
    SINGLE_PROCESS,
    DeviceSlots,
    LossReduction,
    ProcessTopology,
    WorkerArgs,
    WorldSizeDecision,
    choose_world_size,
    detect_devices,
    join_process_group,
    make_distributed_arguments,
    null_context,
    save_rng_states,
    shard_training_steps,
    worker_pool,
)
from jobs.llm.evaluation.benchmarks import evaluate_with_lm_eval
from jobs.llm.evaluation.generation import Features, generate_batch, make_samples, max_generation_batch
from jobs.llm.evaluation.prompts import EvalPrompt, make_eval_prompts
from jobs.llm.evaluation.text_metrics import task_metrics
from jobs.llm.exporters import check_exportable
from jobs.llm.exporters.model_files import PROCESSOR_FILES, copy_files
from jobs.llm.fsdp import (
    FullStateDict,
    MemoryEstimate,
    choose_parallelism,
    fsdp_unsupported_reason,
    gather_full_state,
    gather_weights,
    load_optimizer,
    save_optimizer,
    serve_shards,
    shard,
    unsharded_evaluation,
)
from jobs.llm.model import (
    USABLE_MEMORY_FRACTION,
    DeviceConfig,
    check_finite_weights,
    choose_torch_compile,
    detect_device,
    estimate_training_bytes,
    import_unsloth,
    load_adapter,
    set_eos_tokens,
)
from jobs.llm.oom import BatchConfig, free_memory, is_out_of_memory, reduce_batch_size
from jobs.llm.trained_model import HeldOutExample, TrainedModel
from jobs.runtime.errors import JobFailed, failure_of
from jobs.runtime.retry import download_with_retry
from jobs.runtime.save_policy import SavePolicy, TrainingControlState
from jobs.runtime.settings import read_parallelism
from jobs.runtime.system_metrics import system_metrics
from jobs.runtime.training_control import EarlyStoppingPolicy, TrainingControl
from schema.events import SamplesGenerated
from schema.job import EvalMetrics, Progress
from schema.training import TrainingConfig

if TYPE_CHECKING:
    from jobs.runtime.checkpoints import LocalCheckpoint
    from jobs.runtime.context import JobContext

NUM_HELD_OUT_EXAMPLES = 16
CALIBRATION_ROWS = 256  # for an importance matrix: more change it little
UNSLOTH_SINGLE_GPU = "only provider huggingface trains on several"
ADAM_COPIES = 3  # a trained weight in a checkpoint: itself, and Adam's two moments of it
TURN_TOKENS = ["<start_of_turn>", "<end_of_turn>"]
# What the library logs beside its losses, and we tell elsewhere, or not at all.
EXCLUDED_LOG_KEYS = {"loss", "learning_rate", "grad_norm", "epoch", "total_flos", "num_tokens", "step_time", "num_input_tokens_seen"}


@dataclass(frozen=True)
class TrainingContext:
    """What a training stands on, in the attempt's folder."""

    config: TrainingConfig
    context: "JobContext"
    base_folder: Path
    splits: dict[str, Path]  # the rows, by split
    tokenizer: Any
    uses_default_chat_template: bool  # the base had no chat template of its own
    device_config: DeviceConfig
    resume_checkpoint: "LocalCheckpoint | None"

    @property
    def pad_id(self) -> int:
        """What fills short rows."""
        return int(self.tokenizer.pad_token_id or 0)

    @property
    def trains_adapter(self) -> bool:
        """Only an adapter is trained."""
        return self.config.method != "Full"


class TrainingTask(Protocol):
    """What a trainer type brings: its rows, its model, the library's trainer that has its loss, and how it is measured."""

    @property
    def examples_per_epoch(self) -> int:
        """What an epoch goes over: rows, or blocks of packed rows."""
        ...

    @property
    def held_out_examples(self) -> Sequence[TokenizedExample]:
        """Held-out rows as tokens: prompts to answer, and texts on which exported files are compared."""
        ...

    @property
    def has_held_out_rows(self) -> bool:
        """There are held-out rows."""
        ...

    @property
    def train_examples(self) -> Sequence[TokenizedExample]:
        """The training rows as tokens: for an importance matrix, and to be counted."""
        ...

    def build_model(self, weights: Path) -> Any:
        """The model, with a fresh adapter if only that is trained. `weights` are the base's, or of a checkpoint of the whole model."""
        ...

    def build_trainer(self, model: Any, arguments: dict[str, Any], instrument: Callable[[type], type], control: TrainingControl) -> Any:
        """The library's trainer of this loss, its class made `obedient`. Its `model` is the one that is trained."""
        ...

    def logged_metrics_buffer(self, trainer: Any) -> MutableMapping[str, list[float]]:
        """What the library has gathered since it last logged, by name."""
        ...

    @property
    def worker_task_factory(self) -> "Callable[[TrainingContext], TrainingTask]":
        """Makes what another process of the same training needs of the lesson; can be pickled."""
        ...

    @property
    def loss_reduction(self) -> LossReduction:
        """How several processes come to the loss of one."""
        ...

    def count_tokens(self, inputs: Any) -> int:
        """Real tokens, not padding, in a batch."""
        ...

    def evaluate(self, trainer: Any, check_stop: Callable[[], None]) -> EvalMetrics:
        """The model on the held-out rows. `pulse` is called now and then, and may raise."""
        ...


@runtime_checkable
class MultimodalTask(Protocol):
    """A lesson whose held-out prompts are more than tokens: they have images."""

    def eval_prompts(self, count: int) -> list[EvalPrompt]:
        """The first `count` questions of the held-out rows, the same at every call."""
        ...

    def prompt_features(self, eval_prompts: Sequence[EvalPrompt]) -> Sequence[Features]:
        """What each question has beside its tokens."""
        ...


def prepare_training(config: TrainingConfig, context: "JobContext") -> TrainingContext:
    """Fetch what the training needs. Raises JobFailed and Stopped."""
    import_unsloth(config)

    from transformers import AutoTokenizer

    context.enter_phase("downloading")
    source = context.spec.export_of
    restored = context.checkpoints.fetch(source) if source else context.checkpoints.fetch_latest()
    base_folder = fetch_base(context)
    check_exportable(config, base_folder)
    splits = {
        name: download_with_retry(context.stores.datasets, split.key, context.workdir / "data" / f"{name}.jsonl")
        for name, split in context.spec.dataset.splits.items()
    }
    context.enter_phase("tokenizing")
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    template_is_ours = set_default_chat_template(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    machine = detect_device(config, context, base_folder)
    return TrainingContext(config, context, base_folder, splits, tokenizer, template_is_ours, machine, restored)


def untrained_special_tokens(training: TrainingContext, rows: Sequence[TokenizedExample]) -> list[int]:
    """Turn tokens that the base has never seen and the rows have: their embeddings are trained as well.

    In a base that was never tuned to chat they are all but equal to those of other unseen tokens, and no LoRA of the layers between
    can tell them apart.
    """
    if not training.uses_default_chat_template:
        return []
    turn_tokens = set(training.tokenizer.convert_tokens_to_ids(TURN_TOKENS)) - {None, training.tokenizer.unk_token_id}
    found = sorted(turn_tokens & {token for row in rows for token in row.input_ids})
    if found:
        why = "the base model has none of its own; the embeddings of its turn tokens are trained too"
        training.context.log_decision("chat_template", "gemma3", why)
    return found


def warn_truncation(training: TrainingContext, split: str, tokenized: TokenizedSplit) -> None:
    """Say how many rows were cut or left out."""
    longest = training.config.hyperparameters.max_seq_length
    if tokenized.truncated:
        training.context.warn(
            "rows_truncated", f"{tokenized.truncated} rows of {split} are longer than max_seq_length {longest} and were cut"
        )
    if tokenized.dropped:
        message = f"{tokenized.dropped} rows of {split} have nothing to learn within max_seq_length and were left out"
        training.context.warn("rows_dropped", message)


def require_examples(training: TrainingContext, train_count: int, held_out_count: int) -> None:
    """Raises JobFailed without training rows; without held-out ones, says that nothing is measured."""
    if not train_count:
        raise JobFailed("invalid_data", "no training row has anything to learn in it", "raise max_seq_length, or look at the rows' answers")
    if not held_out_count:
        message = "the dataset has no held-out row with anything to learn in it, so nothing is measured"
        training.context.warn("evaluation_skipped", message)


def run_training(task: TrainingTask, training: TrainingContext) -> TrainedModel:
    """Train, or go on, and leave the model in the attempt's folder. Of a checkpoint that is only to be exported, the model is measured
    and left there. Raises JobFailed and Stopped."""
    context = training.context
    context.log_decision(
        "learning_rate", f"{training.config.hyperparameters.learning_rate:g}", "as asked for, or what suits the trainer and method"
    )
    taught = _load_checkpoint_for_export(task, training) if context.spec.export_of else _train_with_oom_retry(task, training)
    taught = _load_best_model(task, training, taught)
    state, step = taught.control.state, taught.control.published_step
    metrics = taught.metrics if taught.weights else _evaluate_after_training(task, training, taught.trainer, taught.control)
    folder = context.workdir / "model"
    model = taught.trainer.model
    model.save_pretrained(folder, state_dict=taught.weights)
    training.tokenizer.save_pretrained(folder)
    copy_files(training.base_folder, folder, PROCESSOR_FILES)  # of a base that sees, also where text alone was trained
    if not training.trains_adapter and model.can_generate():
        model.generation_config.save_pretrained(folder)
    return TrainedModel(
        folder=folder,
        is_adapter=training.trains_adapter,
        base_folder=training.base_folder,
        held_out_examples=tuple(
            HeldOutExample(row.prompt_text, tuple(row.input_ids), row.prompt_tokens)
            for row in islice(task.held_out_examples or task.train_examples, NUM_HELD_OUT_EXAMPLES)
        ),
        metrics=metrics,
        base_metrics=context.state.base_metrics,
        train_rows=len(task.train_examples),
        train_tokens=state.tokens_seen,
        train_runtime_s=state.train_s,
        calibration=tuple(tuple(row.input_ids) for row in islice(task.train_examples, CALIBRATION_ROWS)),
        step=step,
    )


# --- once, or again with a smaller batch ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingOutcome:
    """The library's trainer with the trained model, and the course it took.

    Of a model that was divided, its `weights` put together, and the metrics: it was measured while there were others to hold it.
    """

    trainer: Any
    control: TrainingControl
    weights: dict[str, Any] | None = None
    metrics: EvalMetrics | None = None


def _train_with_oom_retry(task: TrainingTask, training: TrainingContext) -> TrainingOutcome:
    """The trained model; when memory runs out the batch gets smaller, and the training goes on from what was saved."""
    context, knobs = training.context, training.config.hyperparameters
    asked = BatchConfig(knobs.batch_size, knobs.gradient_accumulation_steps)
    steps = _total_steps(training.config, task)
    machine = replace(
        training.device_config,
        torch_compile=choose_torch_compile(training.config, context, training.device_config, training.base_folder, steps),
    )
    training = replace(training, device_config=machine)
    places = detect_devices(on_gpu=machine.on_gpu)
    restored, healed = training.resume_checkpoint, 0
    smaller: BatchConfig | None = None
    while True:
        state = _initial_control_state(restored, asked, smaller)
        context.state.base_metrics = context.state.base_metrics or state.base_metrics
        course = _make_training_control(training, state, steps)
        processes = _resolve_world_size(task, training, course.batch_config, places)
        sharded = _use_fsdp(training, processes)
        try:
            return _train_attempt(task, training, restored, course, replace(places, max_world_size=processes, sharded=sharded))
        except (RuntimeError, MemoryError) as error:
            no_memory = is_out_of_memory(error)
            if not no_memory and (processes == 1 or course.step > state.step):
                raise
            reason = failure_of(error).message
        # The error is gone here, and with it the last that held the model.
        if no_memory:
            plan = BatchConfig(state.batch_size, state.gradient_accumulation_steps)
            smaller = reduce_batch_size(plan, course.step + 1, healed)
            healed += 1
            same = f"{smaller.gradient_accumulation_steps} batches of {smaller.batch_size} make the same step"
            why = f"memory ran out in step {course.step + 1} with {plan}; {same}"
            context.log_decision("batch_size", str(smaller.batch_size), why)
        else:
            context.warn(
                "single_process_fallback", f"{processes} processes did not come to a first step, so that one trains alone: {reason}"
            )
            places = replace(places, max_world_size=1)
        free_memory()
        context.checkpoints.wait_until_uploaded()
        restored = context.checkpoints.fetch_latest()  # what this went on from is removed when its first step begins


def _resolve_world_size(task: TrainingTask, training: TrainingContext, batch_config: BatchConfig, slots: DeviceSlots) -> int:
    """How many train, of those for which there is room; told with the reason."""
    if slots.max_world_size == 1:
        return 1
    choice = (
        choose_world_size(batch_config, task.examples_per_epoch, slots.max_world_size)
        if _supports_multiple_processes(training)
        else WorldSizeDecision(1, UNSLOTH_SINGLE_GPU, UNSLOTH_SINGLE_GPU)
    )
    training.context.log_decision("world_size", str(choice.world_size), choice.reason)
    if choice.idle_reason:
        message = f"there is room for {slots.max_world_size} processes, and this training uses {choice.world_size}: {choice.idle_reason}"
        training.context.warn("idle_gpus" if slots.gpus else "idle_cpu_slots", message)
    return choice.world_size


def _supports_multiple_processes(training: TrainingContext) -> bool:
    """Whether the provider can train in several processes."""
    return training.config.provider == "huggingface"


def _use_fsdp(training: TrainingContext, world_size: int) -> bool:
    """Whether each process has a part of the model instead of the whole; told with the reason."""
    found = choose_parallelism(
        world_size, fsdp_unsupported_reason(training.config), read_parallelism(), _estimate_memory(training, world_size)
    )
    training.context.log_decision("parallelism", found.value, found.reason)
    return found.value == "fsdp"


def _estimate_memory(training: TrainingContext, world_size: int) -> MemoryEstimate | None:
    """Memory of a GPU, and what of it is needed; None without one."""
    import torch

    if not training.device_config.on_gpu:
        return None
    needed = partial(
        estimate_training_bytes, training.config, training.base_folder, gradient_checkpointing=training.device_config.gradient_checkpointing
    )
    return MemoryEstimate(
        full_model_bytes=needed(),
        shard_bytes=needed(num_shards=world_size),
        available_bytes=torch.cuda.mem_get_info()[0] * USABLE_MEMORY_FRACTION,
    )


def _make_training_control(training: TrainingContext, state: TrainingControlState, total_steps: int) -> TrainingControl:
    knobs, judged = training.config.hyperparameters, training.config.eval_config
    best = EarlyStoppingPolicy(judged.load_best_model_at_end, judged.early_stopping_patience, judged.early_stopping_threshold)
    return TrainingControl(
        training.context, SavePolicy(knobs.save_strategy, knobs.save_steps), state, total_steps=total_steps, early_stopping=best
    )


def _initial_control_state(
    resume_checkpoint: "LocalCheckpoint | None", requested: BatchConfig, reduced: BatchConfig | None
) -> TrainingControlState:
    """Where to go on, and with which batch: the one that this attempt came down to, or an earlier one did, or that was asked for."""
    state = TrainingControlState.read(resume_checkpoint.folder) if resume_checkpoint else None
    plan = reduced or (
        requested.adopt_if_compatible(BatchConfig(state.batch_size, state.gradient_accumulation_steps)) if state else requested
    )
    batch = {"batch_size": plan.batch_size, "gradient_accumulation_steps": plan.gradient_accumulation_steps}
    return state.model_copy(update=batch) if state else TrainingControlState.model_validate(batch)


def _total_steps(config: TrainingConfig, task: TrainingTask) -> int:
    """Optimizer steps of the whole training, as transformers' trainer counts them."""
    knobs = config.hyperparameters
    if knobs.max_steps > 0:
        return knobs.max_steps
    return knobs.epochs * math.ceil(task.examples_per_epoch / (knobs.batch_size * knobs.gradient_accumulation_steps))


def _train_attempt(
    task: TrainingTask, training: TrainingContext, resume_checkpoint: "LocalCheckpoint | None", control: TrainingControl, slots: DeviceSlots
) -> TrainingOutcome:
    """Train from the base or from what was restored until the course ends, in so many processes. Raises Stopped."""
    folder = resume_checkpoint.folder if resume_checkpoint else None
    if slots.max_world_size == 1 or (control.is_done and not slots.sharded):
        return _train_rank_zero(task, training, folder, control, SINGLE_PROCESS)
    training = _disable_torch_compile(training)
    told = {"state": control.state, "total_steps": control.total_steps, "checkpoint": folder}
    with worker_pool(training, task.worker_task_factory, slots, told) as crew:
        return _train_rank_zero(task, training, folder, control, crew)


def _disable_torch_compile(training: TrainingContext) -> TrainingContext:
    """The same without torch.compile, which would tear apart what several processes average while it is made; told."""
    if not training.device_config.torch_compile:
        return training
    if training.config.hyperparameters.torch_compile:
        training.context.warn(
            "torch_compile_skipped", "torch_compile is for a training in one process, and this one has several; it goes on without"
        )
    training.context.log_decision("torch_compile", "false", "several processes save more")
    return replace(training, device_config=replace(training.device_config, torch_compile=False))


def _train_rank_zero(
    task: TrainingTask, training: TrainingContext, folder: Path | None, control: TrainingControl, topology: ProcessTopology
) -> TrainingOutcome:
    """The training, by the process that decides."""
    context = training.context
    trainer = _build_trainer(task, training, folder, control, topology)
    with unsharded_evaluation(topology, trainer.model):
        _evaluate_before_training(task, training, folder, trainer, control)
    context.enter_phase("training")
    control.checkpoint_bytes = ADAM_COPIES * sum(part.nbytes for part in trainer.model.parameters() if part.requires_grad)
    with context.stop.defer_stop():
        if topology.broadcast_object(not control.is_done):
            topology.barrier()
            topology.startup_watchdog.start()
            trainer.train(resume_from_checkpoint=str(folder) if folder else None)
            if not topology.sharded:  # what is divided is looked at when it is put together
                check_finite_weights(trainer.model, control.step)
        control.raise_if_stopped()
    if not topology.sharded:
        return TrainingOutcome(trainer, control)
    best = topology.broadcast_object(_best_checkpoint_to_publish(training, control))
    if best is not None:
        del trainer
        free_memory()
        trainer = _build_trainer(task, training, best, control, topology)
    with unsharded_evaluation(topology, trainer.model):
        metrics = _evaluate_after_training(task, training, trainer, control)
    weights = gather_weights(topology, trainer.model)
    check_finite_weights(trainer.model, control.step, weights)
    return TrainingOutcome(trainer, control, weights, metrics)


def train_worker_rank(worker_args: WorkerArgs) -> None:
    """The same training in another process: what is decided, measured, told and saved comes from rank 0."""
    context = null_context(worker_args)
    ground = TrainingContext(**worker_args.training, context=context, resume_checkpoint=None)
    lesson = worker_args.worker_task_factory(ground)
    course = TrainingControl(context, SavePolicy("no", 1), worker_args.state, total_steps=worker_args.total_steps)
    crew = join_process_group(worker_args)
    trainer = _build_trainer(lesson, ground, worker_args.checkpoint, course, crew)
    serve_shards(crew, trainer.model)
    if crew.broadcast_object(None):
        crew.barrier()
        trainer.train(resume_from_checkpoint=str(worker_args.checkpoint) if worker_args.checkpoint else None)
    if not crew.sharded:
        return
    best = crew.broadcast_object(None)
    if best is not None:
        del trainer
        free_memory()
        trainer = _build_trainer(lesson, ground, best, course, crew)
    serve_shards(crew, trainer.model)
    gather_weights(crew, trainer.model)


def _load_checkpoint_for_export(task: TrainingTask, training: TrainingContext) -> TrainingOutcome:
    """The model of a checkpoint that is not trained any further."""
    restored = training.resume_checkpoint
    assert restored is not None
    state = TrainingControlState.read(restored.folder)
    training.context.state.base_metrics = state.base_metrics
    course = _make_training_control(training, state, state.step)
    places = detect_devices(on_gpu=training.device_config.on_gpu)
    if places.max_world_size > 1 and _supports_multiple_processes(training) and _use_fsdp(training, places.max_world_size):
        return _train_attempt(task, training, restored, course, replace(places, sharded=True))
    return TrainingOutcome(_build_trainer(task, training, restored.folder, course), course)


def _load_best_model(task: TrainingTask, training: TrainingContext, outcome: TrainingOutcome) -> TrainingOutcome:
    """The same, or the model of the best checkpoint, where that is to be published and it was another one."""
    course = outcome.control
    best = None if outcome.weights else _best_checkpoint_to_publish(training, course)
    if best is None:
        return outcome
    del outcome
    free_memory()
    return TrainingOutcome(_build_trainer(task, training, best, course), course)


def _best_checkpoint_to_publish(training: TrainingContext, control: TrainingControl) -> Path | None:
    """The checkpoint that is published instead of the model as it is, if any; told with the reason."""
    if not control.load_best_model_at_end or training.context.spec.export_of or control.best_step in (None, control.step):
        return None
    training.context.checkpoints.wait_until_uploaded()
    best = training.context.checkpoints.fetch_best()
    if best is None:
        training.context.warn(
            "best_checkpoint_unavailable", f"the checkpoint of step {control.best_step} cannot be read; the last one is published"
        )
        return None
    why = f"eval_loss was lowest there: {best.checkpoint.eval_loss}"
    training.context.log_decision("published_step", str(best.checkpoint.step), why)
    control.published_step = best.checkpoint.step
    return best.folder


# --- the library's trainer -----------------------------------------------------------------------------------------------


def _build_trainer(
    task: TrainingTask,
    training: TrainingContext,
    checkpoint: Path | None,
    control: TrainingControl,
    topology: ProcessTopology = SINGLE_PROCESS,
) -> Any:
    """The library's trainer around the model of the base, or of a checkpoint, obeying the course."""
    from transformers import PrinterCallback

    model = _build_model(task, training, checkpoint, topology)
    if model.can_generate():
        set_eos_tokens(model, training.tokenizer)
    loop = InstrumentedTrainer(task, training, control, checkpoint, topology)
    arguments = _make_training_arguments(task, training, control) | make_distributed_arguments(
        topology.world_size, control.batch_config.gradient_accumulation_steps
    )
    trainer = task.build_trainer(model, arguments, loop.instrument_trainer, control)
    trainer.remove_callback(PrinterCallback)  # its losses are not ours
    trainer.add_callback(loop.make_callback(trainer))
    if topology.sharded:
        trainer.is_distributed_loading_by_transformers = True  # the library's word for a model that it neither moves nor wraps
    if checkpoint and training.trains_adapter and not topology.sharded:
        load_adapter(trainer.model, checkpoint)
    if training.device_config.gradient_checkpointing and training.trains_adapter:
        trainer.model.enable_input_require_grads()
    return trainer


def _build_model(task: TrainingTask, training: TrainingContext, checkpoint: Path | None, topology: ProcessTopology) -> Any:
    """The model of the base, or of a checkpoint of all weights; or this process's part of it, which is never whole on the GPU."""
    import torch

    weights = checkpoint if checkpoint and not training.trains_adapter else training.base_folder
    if not topology.sharded:
        return task.build_model(weights)
    beside = replace(training, device_config=replace(training.device_config, device=torch.device("cpu")))
    model = task.worker_task_factory(beside).build_model(weights)
    if checkpoint and training.trains_adapter:
        load_adapter(model, checkpoint)
    return shard(model, training.device_config)


def _make_training_arguments(task: TrainingTask, training: TrainingContext, control: TrainingControl) -> dict[str, Any]:
    """What every kind of trainer of the library is told."""
    config, machine, plan = training.config, training.device_config, control.batch_config
    knobs = config.hyperparameters
    return {
        "output_dir": str(training.context.workdir / "checkpoints"),
        "learning_rate": knobs.learning_rate,
        "per_device_train_batch_size": plan.batch_size,
        "per_device_eval_batch_size": plan.batch_size,
        "num_train_epochs": knobs.epochs,
        "max_steps": knobs.max_steps,
        "lr_scheduler_type": knobs.lr_scheduler_type,
        "warmup_steps": knobs.warmup_ratio,  # below 1 it is a share of all steps
        "weight_decay": knobs.weight_decay,
        "max_grad_norm": knobs.max_grad_norm,
        "seed": knobs.seed,
        "save_strategy": "no",  # the course says when
        "logging_steps": knobs.logging_steps,
        "logging_nan_inf_filter": False,
        "eval_strategy": config.eval_config.eval_strategy if task.has_held_out_rows else "no",
        "eval_steps": config.eval_config.eval_steps,
        "bf16": machine.autocast,
        "activation_checkpointing": machine.gradient_checkpointing,
        "use_cpu": not machine.on_gpu,
        "report_to": [],
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": machine.on_gpu,
        "dataloader_num_workers": machine.dataloader_num_workers,
        "torch_compile": machine.torch_compile,
    }


@dataclass
class InstrumentedTrainer:
    """What goes on between the library's trainer and the course."""

    task: TrainingTask
    training: TrainingContext
    control: TrainingControl
    resume_checkpoint: Path | None
    topology: ProcessTopology
    full_state: FullStateDict | None = None  # of a divided model, while it is saved
    step_loss: Any = field(default=0.0)  # of the optimizer step at work, over its micro-batches
    step_tokens: int = 0

    def instrument_trainer(self, trainer_class: type) -> type:
        """A class of trainer with our measurements, and with checkpoints that are handed over."""
        loop, course, lesson, crew = self, self.control, self.task, self.topology

        class ControlledTrainer(shard_training_steps(trainer_class, lesson, crew)):
            """The library's trainer, as the course wants it."""

            def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
                loop.step_tokens += 0 if PADDING_BATCH in inputs else lesson.count_tokens(inputs)
                loss = super().training_step(model, inputs, num_items_in_batch)
                loop.step_loss = loop.step_loss + loss.detach()
                return loss

            def _move_model_to_device(self, model: Any, device: Any) -> None:
                if not crew.sharded:  # a part is where it belongs
                    super()._move_model_to_device(model, device)

            def store_flos(self) -> None:
                """The library would sum up over the processes what nobody reads, also where one alone is saving."""

            def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
                loss = math.nan
                if crew.is_main_process:
                    with unsharded_evaluation(crew, self.model):
                        loss = self.evaluate_on_main_process()
                else:
                    serve_shards(crew, self.model)
                sync_control_flags(crew, self.control)
                return {"eval_loss": loss}

            def evaluate_on_main_process(self) -> float:
                self.control.should_evaluate = False
                found = course.evaluate(lambda pulse: _evaluate(lesson, loop.training, self, "during", course.step, pulse))
                if found is None or course.is_done:
                    self.control.should_save = self.control.should_training_stop = True
                if course.should_save_best:
                    self.control.should_save = True
                return math.nan if found is None or found.eval_loss is None else found.eval_loss

            def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
                weights = loop.full_state.weights if loop.full_state else None
                self.model.save_pretrained(output_dir, state_dict=weights)  # no tokenizer, 33 MB of it, and no pickled arguments

            def _send_telemetry(self) -> None:
                """TRL's would tell its makers that something is trained here, and on what."""

            def create_model_card(self, *_: Any, **__: Any) -> None:
                """The library's would be in every checkpoint; ours is written once."""

            def _save_checkpoint(self, model: Any, trial: Any) -> None:
                states, loop.full_state = crew.gather_rng_states(), gather_full_state(crew, self)
                if not crew.is_main_process:
                    return
                check_finite_weights(self.model, course.step, loop.full_state.weights if loop.full_state else None)
                folder = Path(self.args.output_dir or "", f"checkpoint-{course.step}")
                course.logged_metrics_buffer = {name: tuple(values) for name, values in lesson.logged_metrics_buffer(self).items()}

                def write() -> None:
                    super(ControlledTrainer, self)._save_checkpoint(model, trial)
                    save_rng_states(folder, states)

                course.save(folder, self.state.epoch or 0.0, write)
                loop.full_state = None

            def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
                if loop.full_state is None:
                    super()._save_optimizer_and_scheduler(output_dir)
                else:
                    save_optimizer(self, loop.full_state, Path(output_dir))

            def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
                if checkpoint is None or not crew.sharded:
                    super()._load_optimizer_and_scheduler(checkpoint)
                else:
                    load_optimizer(self, Path(checkpoint))

            def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
                """The model has these weights already; what was being gathered for the next point goes on."""
                if crew.is_main_process:
                    lesson.logged_metrics_buffer(self).update({name: list(values) for name, values in course.logged_metrics_buffer.items()})

        ControlledTrainer.__name__ = trainer_class.__name__
        return ControlledTrainer

    def make_callback(self, trainer: Any) -> Any:
        """What tells the course what happens, the library what the course says, and the world how it goes."""
        from transformers import TrainerCallback

        loop, course, context, crew = self, self.control, self.training.context, self.topology

        class TrainingControlCallback(TrainerCallback):
            def __init__(self) -> None:
                self.last_logged_at, self.last_logged_tokens = time.monotonic(), course.tokens_seen

            def on_train_begin(self, args: Any, state: Any, control: Any, **found: Any) -> None:
                state.compute_steps(args, state.max_steps)  # what was saved may be of another plan
                reset_lr_to_schedule(found["lr_scheduler"])
                self.last_logged_at = time.monotonic()
                crew.seed_per_rank(args.seed)
                course.start()

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                if loop.resume_checkpoint:
                    crew.barrier()  # all have read it by now
                    if crew.is_main_process:
                        shutil.rmtree(loop.resume_checkpoint, ignore_errors=True)  # as large as the next one; a container's disk is memory
                    loop.resume_checkpoint = None
                course.on_step_begin()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                loss, tokens = crew.all_reduce_sum(float(loop.step_loss) / crew.world_size, loop.step_tokens)
                loop.step_loss, loop.step_tokens = 0.0, 0
                crew.gather_metrics(loop.task.logged_metrics_buffer(trainer))
                crew.startup_watchdog.stop()
                course.tokens_seen += int(tokens)
                course.on_step_end(state.global_step, loss)
                context.report_progress(self.progress())
                if crew.is_main_process and not (
                    state.epoch.is_integer() or course.is_done
                ):  # at an epoch's end the measurements come first
                    self.set_control_flags(control, epoch_ended=False)
                sync_control_flags(crew, control)

            def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if course.stop_reason:
                    control.should_evaluate = False
                elif crew.is_main_process:
                    self.set_control_flags(control, epoch_ended=True)
                sync_control_flags(crew, control)

            def set_control_flags(self, control: Any, *, epoch_ended: bool) -> None:
                if not course.is_done and course.should_stop():
                    control.should_training_stop = True
                control.should_save = course.should_save(epoch_ended=epoch_ended)

            def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
                state.log_history.clear()  # it would be in every checkpoint, and nobody reads it
                if not crew.is_main_process or not logs or "loss" not in logs:
                    return
                now = time.monotonic()
                speed = (course.tokens_seen - self.last_logged_tokens) / max(now - self.last_logged_at, 1e-9)
                self.last_logged_at, self.last_logged_tokens = now, course.tokens_seen
                told = {"loss": course.pop_mean_loss()} | {name: logs[name] for name in ("learning_rate", "grad_norm") if name in logs}
                told |= {
                    name: value for name, value in logs.items() if name not in EXCLUDED_LOG_KEYS and isinstance(value, int | float | None)
                }
                values = {name: value if value is not None and math.isfinite(value) else None for name, value in told.items()}
                notes = {name: "nothing gave one" if told[name] is None else f"it is {told[name]}" for name in told if values[name] is None}
                values |= {"tokens_per_second": speed} | read_memory_metrics() | system_metrics(context.workdir)
                context.log_metrics(state.global_step, values, epoch=state.epoch, notes=notes, progress=self.progress())

            def progress(self) -> Progress:
                state = trainer.state
                return Progress(
                    step=state.global_step,
                    total_steps=state.max_steps,
                    epoch=state.epoch or 0.0,
                    total_epochs=float(state.num_train_epochs),
                    eta_s=course.eta_s,
                )

        return TrainingControlCallback()


def sync_control_flags(topology: ProcessTopology, control: Any) -> None:
    """Let every process do next what rank 0 does."""
    wishes = topology.broadcast_flags(control.should_training_stop, control.should_save, control.should_evaluate)
    control.should_training_stop, control.should_save, control.should_evaluate = wishes


def reset_lr_to_schedule(scheduler: Any) -> None:
    """Let the next step have the learning rate that the schedule has for it now: more epochs make it another one than was saved."""
    rates = [base * factor(scheduler.last_epoch) for factor, base in zip(scheduler.lr_lambdas, scheduler.base_lrs, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def read_memory_metrics() -> dict[str, float]:
    """Bytes that this process holds, and that it holds on the GPU."""
    import psutil
    import torch

    found = {"rss_bytes": float(psutil.Process().memory_info().rss)}
    if torch.cuda.is_available():
        found["gpu_memory_bytes"] = float(torch.cuda.max_memory_allocated())
    return found


# --- measuring -----------------------------------------------------------------------------------------------------------


def _has_evaluation(task: TrainingTask, training: TrainingContext) -> bool:
    """There is something to measure base and trained model on."""
    return task.has_held_out_rows or bool(training.config.eval_config.lm_eval_tasks)


def _evaluate_before_training(
    task: TrainingTask, training: TrainingContext, folder: Path | None, trainer: Any, control: TrainingControl
) -> None:
    """The base, or what the training that goes on from `folder` had no time for."""
    context = training.context
    if not _has_evaluation(task, training) or (folder is not None and not control.evaluation_is_due):
        return
    context.enter_phase("evaluating")
    if folder is None and context.state.base_metrics is None:
        measured = _evaluate(task, training, trainer, "before", 0, context.check_stop)
        context.log_evaluation("before", 0, _with_lm_eval(training, trainer.model, measured))
    if control.evaluation_is_due:
        control.evaluate(lambda _: _evaluate(task, training, trainer, "during", control.step, context.check_stop))


def _evaluate_after_training(task: TrainingTask, training: TrainingContext, trainer: Any, control: TrainingControl) -> EvalMetrics | None:
    """The model that is published; None where there is nothing to measure it on."""
    context, step = training.context, control.published_step
    if not _has_evaluation(task, training):
        return None
    context.enter_phase("evaluating")
    metrics = control.state.metrics_by_step.get(step) or _evaluate(task, training, trainer, "after", step, context.check_stop)
    metrics = _with_lm_eval(training, trainer.model, metrics)
    context.log_evaluation("after", step, metrics)
    return metrics


def _with_lm_eval(training: TrainingContext, model: Any, metrics: EvalMetrics) -> EvalMetrics:
    """The metrics, with those of the tasks of lm-evaluation-harness that were asked for."""
    judged = training.config.eval_config
    if not judged.lm_eval_tasks:
        return metrics
    size = training.config.hyperparameters.batch_size
    values, notes = evaluate_with_lm_eval(
        model, training.tokenizer, judged.lm_eval_tasks, limit=judged.lm_eval_limit, batch_size=size, check_stop=training.context.check_stop
    )
    return metrics.model_copy(update={"values": metrics.values | values, "notes": metrics.notes | notes})


def _evaluate(
    task: TrainingTask, training: TrainingContext, trainer: Any, when: Any, step: int, check_stop: Callable[[], None]
) -> EvalMetrics:
    """What the lesson measures, and what the model answers to held-out prompts."""
    import torch

    machine = training.device_config
    with torch.autocast(machine.device.type, torch.bfloat16, enabled=machine.autocast):
        metrics = task.evaluate(trainer, check_stop) if task.has_held_out_rows else EvalMetrics()
        return _evaluate_generations(task, training, trainer.model, metrics, (when, step), check_stop)


def _evaluate_generations(
    task: TrainingTask, training: TrainingContext, model: Any, metrics: EvalMetrics, when: tuple[Any, int], check_stop: Callable[[], None]
) -> EvalMetrics:
    """The metrics, with those of the model's answers; a few of these are shown."""
    judged = training.config.eval_config
    wanted = max(judged.task_rows if judged.compute_eval_metrics else 0, judged.sample_prompts)
    if not wanted or not model.can_generate():
        return metrics
    sees = isinstance(task, MultimodalTask)
    questions = task.eval_prompts(wanted) if sees else make_eval_prompts(task.held_out_examples, training.tokenizer, wanted)
    if not questions:
        values, notes = task_metrics([], []) if judged.compute_eval_metrics else ({}, {})
        return metrics.model_copy(update={"values": metrics.values | values, "notes": metrics.notes | notes})
    features = task.prompt_features(questions) if sees else None
    prompts = [question.prompt_ids for question in questions]
    said = generate_batch(
        model,
        training.tokenizer,
        prompts,
        max_new_tokens=judged.max_new_tokens,
        batch_size=max_generation_batch(training.config.hyperparameters.batch_size, prompts, judged.max_new_tokens),
        check_stop=check_stop,
        features=features,
    )
    references = [question.reference for question in questions]
    if judged.sample_prompts:
        shown = make_samples([question.prompt_text for question in questions], references, said, judged.sample_prompts)
        training.context.log_samples(SamplesGenerated(when=when[0], step=when[1], samples=shown))
    if not judged.compute_eval_metrics:
        return metrics
    values, notes = task_metrics(said[: judged.task_rows], references[: judged.task_rows])
    return metrics.model_copy(update={"values": metrics.values | values, "notes": metrics.notes | notes})


def preference_metrics(metrics: dict[str, float], likelihood: EvalMetrics, started_at: float) -> EvalMetrics:
    """What a preference trainer measured, by the library's names without `eval_`, beside the likelihood of the preferred answers.

    `eval_loss` is the trainer's own; `perplexity` and `accuracy` are of the preferred answers.
    """
    found = {name.removeprefix("eval_"): float(value) for name, value in metrics.items()}
    loss = found.pop("loss", math.nan)
    skipped = {"runtime", "samples_per_second", "steps_per_second", "num_tokens", "model_preparation_time", "epoch"}
    values: dict[str, float | None] = {}
    notes = dict(likelihood.notes)
    for name, value in found.items():
        if name not in skipped:
            values[name] = value if math.isfinite(value) else None
            if not math.isfinite(value):
                notes[name] = f"it is {value}"
    if likelihood.eval_loss is not None:
        values["chosen/nll"] = likelihood.eval_loss
    if not math.isfinite(loss):
        notes["eval_loss"] = "not a number"
    return likelihood.model_copy(
        update={
            "eval_loss": loss if math.isfinite(loss) else None,
            "eval_runtime": time.monotonic() - started_at,
            "values": values,
            "notes": notes,
        }
    )
