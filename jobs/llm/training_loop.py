"""The training loop of every language-model trainer, whatever its loss.

    1. prepare_training   (training_context.py) download and detect what the training needs
    2. run_training       evaluate the base, train, evaluate again, save the model
       a. several GPUs    parallelism.py decides, worker_pool.py starts the worker processes
       b. training        instrumented_trainer.py builds the library's trainer, which calls TrainingControl at each step
       c. evaluation      evaluate.py

A trainer type adds a TrainingTask. When memory runs out, the loop reduces the batch size and resumes from the last checkpoint.
"""

import math
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.data.user_prompts import make_user_prompts
from jobs.llm.distributed import SINGLE_PROCESS, ProcessTopology
from jobs.llm.earlier_model import attach_original_base
from jobs.llm.evaluate import evaluate_after_training, evaluate_before_training, has_evaluation_data
from jobs.llm.exporters.model_files import PROCESSOR_FILES, copy_files
from jobs.llm.exporters.preflight import start_export_check
from jobs.llm.fsdp import gather_weights, serve_shards, unsharded_evaluation
from jobs.llm.hardware import choose_torch_compile
from jobs.llm.instrumented_trainer import build_instrumented_trainer
from jobs.llm.memory_plan import MemoryPlan
from jobs.llm.memory_planner import get_training_shape, plan_memory
from jobs.llm.model import check_finite_weights
from jobs.llm.oom import free_memory, is_out_of_memory, recover_from_oom
from jobs.llm.parallelism import DeviceSlots, detect_devices, resolve_sharding, resolve_world_size, supports_multiple_processes
from jobs.llm.phase_estimates import plan_exports
from jobs.llm.remote_code import forbid_remote_code
from jobs.llm.trained_model import HeldOutExample, TrainedModel
from jobs.llm.training_context import TrainingContext, TrainingTask
from jobs.llm.worker_pool import WorkerArgs, join_process_group, null_context, worker_pool
from jobs.runtime.background_task import BackgroundTask
from jobs.runtime.early_stopping import EarlyStoppingPolicy
from jobs.runtime.errors import failure_of
from jobs.runtime.remaining_time import PlannedPhase
from jobs.runtime.save_policy import SavePolicy, TrainingControlState
from jobs.runtime.training_control import TrainingControl
from schema.estimate.disk import estimate_checkpoint_bytes
from schema.job import EvalMetrics

if TYPE_CHECKING:
    from jobs.runtime.checkpoints import LocalCheckpoint

NUM_HELD_OUT_EXAMPLES = 16
CALIBRATION_ROWS = 256  # of the importance matrix: more rows change it little


@dataclass(frozen=True)
class TrainingOutcome:
    """The library's trainer with the trained model, and the control of its training.

    A sharded model also has its gathered weights and its metrics, because evaluating it needs the worker processes.
    """

    trainer: Any
    control: TrainingControl
    full_weights: dict[str, Any] | None = None
    metrics: EvalMetrics | None = None


def run_training(task: TrainingTask, training: TrainingContext) -> TrainedModel:
    """Train, or resume training, and save the model in the attempt's folder. Raises JobFailed and Stopped.

    For a job that only exports a checkpoint, evaluate and save the checkpoint's model.
    """
    import torch

    context, hyperparameters = training.context, training.config.hyperparameters
    user_prompts = make_user_prompts(training)
    export_check = start_export_check(training, user_prompts)
    context.log_decision(
        "learning_rate", f"{hyperparameters.learning_rate:g}", "set in the request, or the default of the trainer type and method"
    )
    outcome = _load_checkpoint_for_export(task, training) if context.spec.export_of else _train_with_oom_retry(task, training, export_check)
    control, metrics, full_weights = outcome.control, outcome.metrics, outcome.full_weights
    if full_weights is None:  # a sharded model was loaded and evaluated while the workers ran
        best = _find_best_checkpoint(training, control)
        if best is not None:
            del outcome
            free_memory()
            outcome = TrainingOutcome(build_instrumented_trainer(task, training, best, control), control)
    state = control.state  # before the evaluation, which is not training time
    if full_weights is None:
        metrics = evaluate_after_training(task, training, outcome.trainer, control)
    model = outcome.trainer.model
    folder = context.workdir / "model"
    model.save_pretrained(folder, state_dict=full_weights)
    training.tokenizer.save_pretrained(folder)
    copy_files(training.base_folder, folder, PROCESSOR_FILES)  # of a vision-language base, also when only text was trained
    if not training.trains_adapter and model.can_generate():
        model.generation_config.save_pretrained(folder)
    trained = TrainedModel(
        folder=folder,
        is_adapter=training.trains_adapter,
        base_folder=training.base_folder,
        held_out_examples=tuple(
            HeldOutExample(row.prompt_text, tuple(row.input_ids), row.prompt_tokens)
            for row in islice(task.held_out_examples or task.train_examples, NUM_HELD_OUT_EXAMPLES)
        ),
        chat_format=training.chat_format,
        user_prompts=user_prompts,
        metrics=metrics,
        base_metrics=context.state.base_metrics,
        train_rows=len(task.train_examples),
        train_tokens=state.tokens_seen,
        train_runtime_s=state.train_s,
        calibration=tuple(tuple(row.input_ids) for row in islice(task.train_examples, CALIBRATION_ROWS)),
        step=control.published_step,
        tokenizer=training.tokenizer,
        cuda=torch.version.cuda,
    )
    return attach_original_base(trained, context)


def _load_checkpoint_for_export(task: TrainingTask, training: TrainingContext) -> TrainingOutcome:
    """The model of the checkpoint to export, without training it."""
    checkpoint = training.resume_checkpoint
    assert checkpoint is not None
    state = TrainingControlState.read(checkpoint.folder)
    training.context.state.base_metrics = state.base_metrics
    control = _make_training_control(task, training, state, total_steps=state.step)
    _plan_phases(task, training, control)
    slots = detect_devices(on_gpu=training.device_config.on_gpu)
    can_shard = slots.max_world_size > 1 and supports_multiple_processes(training.config)
    if can_shard and resolve_sharding(training, get_training_shape(training), slots.max_world_size):
        return _train_attempt(task, training, checkpoint, control, replace(slots, sharded=True))
    return TrainingOutcome(build_instrumented_trainer(task, training, checkpoint.folder, control), control)


def _train_with_oom_retry(task: TrainingTask, training: TrainingContext, export_check: BackgroundTask[None] | None) -> TrainingOutcome:
    """Train. When memory runs out, continue with less (oom.py); when several processes cannot start, train in one."""
    context, config = training.context, training.config
    total_steps = _total_steps(task, training)
    slots = detect_devices(on_gpu=training.device_config.on_gpu)
    needs, planned = plan_memory(task, training, slots.max_world_size)
    torch_compile = choose_torch_compile(config, context, training.device_config, needs.model, needs.training, total_steps)
    checkpoint, oom_retries = training.resume_checkpoint, 0
    reduced: MemoryPlan | None = None
    while True:
        state = _initial_control_state(checkpoint, planned, reduced)
        plan = MemoryPlan.from_details(state.details)
        device_config = replace(training.device_config, gradient_checkpointing=plan.gradient_checkpointing, torch_compile=torch_compile)
        training = replace(training, device_config=device_config)
        context.state.base_metrics = context.state.base_metrics or state.base_metrics
        control = _make_training_control(task, training, state, total_steps)
        control.background_check = export_check
        world_size = resolve_world_size(training, plan.batch_config, task.examples_per_epoch, slots)
        sharded = resolve_sharding(
            training, needs.with_batch(plan.batch_config.batch_size, plan.batch_config.gradient_accumulation_steps), world_size
        )
        try:
            return _train_attempt(task, training, checkpoint, control, replace(slots, max_world_size=world_size, sharded=sharded))
        except (RuntimeError, MemoryError) as error:
            ran_out_of_memory = is_out_of_memory(error)
            if not ran_out_of_memory and (world_size == 1 or control.step > state.step):
                raise
            reason = failure_of(error).message
        # Python has deleted the error here, and with its traceback the last reference to the model.
        if ran_out_of_memory:
            failed_step = control.step + 1
            may_recompute = config.hyperparameters.gradient_checkpointing is not False
            reduced = recover_from_oom(plan, failed_step, oom_retries, may_recompute=may_recompute)
            reason = f"out of memory in step {failed_step} with {plan.batch_config}"
            if reduced.gradient_checkpointing != plan.gradient_checkpointing:
                oom_retries = 0  # every batch needs less from now on
                context.log_decision("gradient_checkpointing", "true", f"{reason} and without it")
            else:
                oom_retries += 1
                reason += f"; gradient_accumulation_steps {reduced.batch_config.gradient_accumulation_steps} keeps the effective batch size"
                context.log_decision("batch_size", str(reduced.batch_config.batch_size), reason)
        else:
            message = f"{world_size} processes did not finish their first step; a single process trains instead: {reason}"
            context.warn("single_process_fallback", message)
            slots = replace(slots, max_world_size=1)
        free_memory()
        context.checkpoints.wait_until_uploaded()
        checkpoint = context.checkpoints.fetch_latest()  # again: the first step deleted the checkpoint that this try resumed from


def _total_steps(task: TrainingTask, training: TrainingContext) -> int:
    """Optimizer steps of the whole training, as transformers' trainer counts them."""
    hyperparameters = training.config.hyperparameters
    return hyperparameters.max_steps if hyperparameters.max_steps > 0 else hyperparameters.epochs * _steps_per_epoch(task, training)


def _steps_per_epoch(task: TrainingTask, training: TrainingContext) -> int:
    hyperparameters = training.config.hyperparameters
    return math.ceil(task.examples_per_epoch / (hyperparameters.batch_size * hyperparameters.accumulation_steps))


def _initial_control_state(checkpoint: "LocalCheckpoint | None", planned: MemoryPlan, reduced: MemoryPlan | None) -> TrainingControlState:
    """The state to start or resume from. Its use of memory is what this attempt reduced, or an earlier attempt did, or the planned one."""
    state = TrainingControlState.read(checkpoint.folder) if checkpoint else None
    plan = reduced or planned
    if state and not reduced:
        plan = planned.adopt_if_compatible(MemoryPlan.from_details(state.details))
    return (state or TrainingControlState()).model_copy(update={"details": plan.details})


def _make_training_control(task: TrainingTask, training: TrainingContext, state: TrainingControlState, total_steps: int) -> TrainingControl:
    hyperparameters, eval_config = training.config.hyperparameters, training.config.eval_config
    save_policy = SavePolicy(hyperparameters.save_strategy, hyperparameters.save_steps)
    early_stopping = EarlyStoppingPolicy(
        eval_config.load_best_model_at_end, eval_config.early_stopping_patience, eval_config.early_stopping_threshold
    )
    control = TrainingControl(training.context, save_policy, state, total_steps=total_steps, early_stopping=early_stopping)
    if task.has_held_out_rows and eval_config.eval_strategy != "no":
        control.evaluation_interval = eval_config.eval_steps if eval_config.eval_strategy == "steps" else _steps_per_epoch(task, training)
    return control


def _plan_phases(task: TrainingTask, training: TrainingContext, control: TrainingControl) -> None:
    """Plan the phases from the first step on."""
    evaluating = [PlannedPhase("evaluating", control.evaluation_s)] if has_evaluation_data(task, training) else []
    training.context.remaining.plan([PlannedPhase("training", None), *evaluating, *plan_exports(training)])


def _train_attempt(
    task: TrainingTask, training: TrainingContext, checkpoint: "LocalCheckpoint | None", control: TrainingControl, slots: DeviceSlots
) -> TrainingOutcome:
    """Train from the checkpoint, or from the base, in as many processes as there are slots. Raises Stopped."""
    folder = checkpoint.folder if checkpoint else None
    if slots.max_world_size == 1 or (control.is_done and not slots.sharded):
        return _train_rank_zero(task, training, folder, control, SINGLE_PROCESS)
    if training.device_config.torch_compile:
        if training.config.hyperparameters.torch_compile:
            message = "torch_compile supports a single process, and this training has several; training continues without it"
            training.context.warn("torch_compile_skipped", message)
        # Compiling would split the graph wherever DDP averages gradients.
        training.context.log_decision("torch_compile", "false", "several processes save more time")
        training = replace(training, device_config=replace(training.device_config, torch_compile=False))
    resume_args = {"state": control.state, "total_steps": control.total_steps, "checkpoint": folder}
    with worker_pool(training, task.worker_task_factory, slots, resume_args) as topology:
        return _train_rank_zero(task, training, folder, control, topology)


# The next two functions run at the same time in different processes. Both must call the collectives in the same order.


def _train_rank_zero(
    task: TrainingTask, training: TrainingContext, checkpoint: Path | None, control: TrainingControl, topology: ProcessTopology
) -> TrainingOutcome:
    """The training in rank 0, which evaluates, decides and saves."""
    context = training.context
    trainer = build_instrumented_trainer(task, training, checkpoint, control, topology)
    with unsharded_evaluation(topology, trainer.model):
        evaluate_before_training(task, training, checkpoint, trainer, control, may_defer=topology.world_size == 1)
    _plan_phases(task, training, control)
    context.enter_phase("training")
    trained_weights_bytes = sum(weight.nbytes for weight in trainer.model.parameters() if weight.requires_grad)
    control.checkpoint_bytes = estimate_checkpoint_bytes(trained_weights_bytes)
    with context.stop.defer_stop():
        if topology.broadcast_json(not control.is_done):
            topology.barrier()
            topology.startup_watchdog.start()
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if not topology.sharded:  # sharded weights are checked when they are gathered
                check_finite_weights(trainer.model, control.step)
        control.raise_if_stopped()
    if not topology.sharded:
        return TrainingOutcome(trainer, control)
    best = _find_best_checkpoint(training, control)
    topology.broadcast_json(best and str(best))
    if best is not None:
        del trainer
        free_memory()
        trainer = build_instrumented_trainer(task, training, best, control, topology)
    with unsharded_evaluation(topology, trainer.model):
        metrics = evaluate_after_training(task, training, trainer, control)
    full_weights = gather_weights(topology, trainer.model)
    check_finite_weights(trainer.model, control.step, full_weights)
    return TrainingOutcome(trainer, control, full_weights, metrics)


def train_worker_rank(worker_args: WorkerArgs) -> None:
    """The same training in a worker process, which follows rank 0's decisions."""
    forbid_remote_code()
    context = null_context(worker_args)
    training = TrainingContext(**worker_args.training, context=context, resume_checkpoint=None)
    task = worker_args.worker_task_factory(training)
    control = TrainingControl(context, SavePolicy("no", 1), worker_args.state, total_steps=worker_args.total_steps)
    topology = join_process_group(worker_args)
    checkpoint = worker_args.checkpoint
    trainer = build_instrumented_trainer(task, training, checkpoint, control, topology)
    serve_shards(topology, trainer.model)
    if topology.broadcast_json(None):
        topology.barrier()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if not topology.sharded:
        return
    best = topology.broadcast_json(None)
    if best is not None:
        del trainer
        free_memory()
        trainer = build_instrumented_trainer(task, training, Path(best), control, topology)
    serve_shards(topology, trainer.model)
    gather_weights(topology, trainer.model)


def _find_best_checkpoint(training: TrainingContext, control: TrainingControl) -> Path | None:
    """The folder of the checkpoint to publish instead of the current model; None to publish the current model. Logs the decision."""
    context = training.context
    if not control.load_best_model_at_end or context.spec.export_of or control.best_step in (None, control.step):
        return None
    context.checkpoints.wait_until_uploaded()
    best = context.checkpoints.fetch_best()
    if best is None:
        message = f"the checkpoint of step {control.best_step}, the best, cannot be read; the last step is published"
        context.warn("best_checkpoint_unavailable", message)
        return None
    context.log_decision("published_step", str(best.checkpoint.step), f"it has the lowest eval_loss: {best.checkpoint.eval_loss}")
    control.published_step = best.checkpoint.step
    return best.folder
