"""The library's trainer (transformers' or TRL's) with our checkpoints, evaluation, stop handling and metrics.

`build_instrumented_trainer` builds a task's trainer: its class gets InstrumentedTrainer as a mixin, and TrainingControlCallback reports
every step to TrainingControl and passes its decisions to the library.
"""

import math
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.distributed import (
    PADDING_BATCH,
    SINGLE_PROCESS,
    ProcessTopology,
    make_distributed_arguments,
    save_rng_states,
    shard_training_steps,
)
from jobs.llm.eva import initialize_from_activations
from jobs.llm.evaluate import base_is_due, evaluate_base_during_training, evaluate_step
from jobs.llm.fsdp import (
    FullStateDict,
    gather_full_state,
    load_optimizer,
    save_optimizer,
    serve_shards,
    shard,
    unsharded_evaluation,
)
from jobs.llm.lora_init import initialize_adapter, zero_initial_gradients
from jobs.llm.model import check_finite_weights, load_adapter, set_eos_tokens
from jobs.llm.model_choices import log_model_choices
from jobs.llm.optimization import check_optimizer, check_schedule_length, clip_gradients, make_optimizer_arguments
from jobs.llm.training_context import TrainingContext, TrainingTask
from jobs.runtime.batch_config import BatchConfig
from jobs.runtime.system_metrics import system_metrics
from jobs.runtime.training_control import TrainingControl
from schema.job import Progress

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # InstrumentedTrainer is a mixin; importing this module must not import transformers

# What the library logs and we log ourselves, or not at all.
EXCLUDED_LOG_KEYS = {"loss", "learning_rate", "grad_norm", "epoch", "total_flos", "num_tokens", "step_time", "num_input_tokens_seen"}


@dataclass
class TrainerSession:
    """What the trainer and its callback share."""

    task: TrainingTask
    training: TrainingContext
    control: TrainingControl
    topology: ProcessTopology
    resume_checkpoint: Path | None  # deleted when the first step begins
    full_state: FullStateDict | None = None  # of a sharded model, while a checkpoint is saved
    step_loss: Any = 0.0  # of the current optimizer step, summed over its batches
    step_tokens: int = 0
    last_loss: float | None = None  # of the last optimizer step, of all processes
    embedding_grad_norm: Any = None  # of the trained token embeddings, in the last step


def build_instrumented_trainer(
    task: TrainingTask,
    training: TrainingContext,
    checkpoint: Path | None,
    control: TrainingControl,
    topology: ProcessTopology = SINGLE_PROCESS,
) -> Any:
    """The task's trainer with the model of the checkpoint, or of the base if there is none. Raises JobFailed."""
    from transformers import PrinterCallback, TrainerCallback

    hyperparameters = training.config.hyperparameters
    if not control.is_done:  # a finished training, or a checkpoint to export, is only evaluated, perhaps on another device
        check_optimizer(hyperparameters, training.device_config, sharded=topology.sharded)
        check_schedule_length(hyperparameters, control.total_steps)
    if training.trains_adapter:
        weights, adapter = training.base_folder, checkpoint
    else:
        weights, adapter = checkpoint or training.base_folder, None
    model = _build_sharded_model(task, training, weights, adapter) if topology.sharded else task.build_model(weights)
    if model.can_generate():
        set_eos_tokens(model, training.chat_format.stop_token_ids)
    session = TrainerSession(task, training, control, topology, resume_checkpoint=checkpoint)

    def instrument(trainer_class: type) -> type:
        """The class with InstrumentedTrainer as a mixin. It keeps its name, which the library writes into its messages."""
        sharded_class = shard_training_steps(trainer_class, task, topology)
        return type(trainer_class.__name__, (InstrumentedTrainer, sharded_class), {"session": session})

    class Callback(TrainingControlCallback, TrainerCallback):
        """TrainerCallback has the events that TrainingControlCallback does not handle."""

    arguments = make_training_arguments(task, training, control) | make_distributed_arguments(
        topology.world_size, BatchConfig.from_details(control.details).gradient_accumulation_steps
    )
    trainer = task.build_trainer(model, arguments, instrument, control)
    log_model_choices(trainer.model, training)
    trainer.remove_callback(PrinterCallback)  # it prints the library's losses
    trainer.add_callback(Callback(session, trainer))
    if topology.sharded:
        trainer.is_distributed_loading_by_transformers = True  # keeps the trainer from moving or wrapping the model
    if adapter is not None and not topology.sharded:
        load_adapter(trainer.model, adapter)
    elif adapter is None and not topology.sharded and training.trains_adapter:
        initialize_adapter(trainer.model, hyperparameters)
        if hyperparameters.lora_init == "eva" and topology.is_main_process:  # the others get its weights
            tokens = initialize_from_activations(trainer, hyperparameters.seed, training.context.check_stop)
            training.context.log_decision("lora_init", "eva", f"the layers' inputs at {tokens} labeled tokens gave their directions")
    if training.device_config.gradient_checkpointing and training.trains_adapter:
        trainer.model.enable_input_require_grads()
    return trainer


def _build_sharded_model(task: TrainingTask, training: TrainingContext, weights: Path, adapter: Path | None) -> Any:
    """This process's shard of the model. The whole model is loaded on the CPU, so it never has to fit on the GPU."""
    import torch

    on_cpu = replace(training, device_config=replace(training.device_config, device=torch.device("cpu")))
    model = task.worker_task_factory(on_cpu).build_model(weights)
    if adapter is not None:
        load_adapter(model, adapter)
    elif training.trains_adapter:
        initialize_adapter(model, training.config.hyperparameters)
    return shard(model, training.device_config)


def make_training_arguments(task: TrainingTask, training: TrainingContext, control: TrainingControl) -> dict[str, Any]:
    """The arguments that the library's trainer gets for every task, by the names of transformers.TrainingArguments."""
    config, device_config, batch_config = training.config, training.device_config, BatchConfig.from_details(control.details)
    hyperparameters = config.hyperparameters
    return {
        "output_dir": str(training.context.workdir / "checkpoints"),
        "per_device_train_batch_size": batch_config.batch_size,
        "per_device_eval_batch_size": batch_config.batch_size,
        "num_train_epochs": hyperparameters.epochs,
        "max_steps": hyperparameters.max_steps,
        "neftune_noise_alpha": getattr(hyperparameters, "neftune_noise_alpha", None),  # only SFT has the field
        "seed": hyperparameters.seed,
        "save_strategy": "no",  # TrainingControl decides when to save
        "logging_steps": hyperparameters.logging_steps,
        "logging_nan_inf_filter": False,
        "eval_strategy": config.eval_config.eval_strategy if task.has_held_out_rows else "no",
        "eval_steps": config.eval_config.eval_steps,
        "bf16": device_config.autocast,
        "activation_checkpointing": device_config.gradient_checkpointing,
        "use_cpu": not device_config.on_gpu,
        "report_to": [],
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": device_config.on_gpu,
        "dataloader_num_workers": device_config.dataloader_num_workers,
        "torch_compile": device_config.torch_compile,
    } | make_optimizer_arguments(hyperparameters)


class InstrumentedTrainer(Trainer):
    """A mixin of the library's trainer: counts tokens and losses, and evaluates and saves as TrainingControl decides."""

    session: TrainerSession  # set by `build_instrumented_trainer`

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        session = self.session
        session.step_tokens += 0 if PADDING_BATCH in inputs else session.task.count_tokens(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        session.step_loss = session.step_loss + loss.detach()
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip the gradients, and log the norm of the embeddings' beside the library's `grad_norm`, which is that of all others."""
        zero_initial_gradients(model, self.session.training.config.hyperparameters)
        norm, embedding_norm = clip_gradients(model, self.args.max_grad_norm)
        self.session.embedding_grad_norm = embedding_norm
        return norm

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Rank 0 evaluates the whole model; the other ranks take part in unsharding it."""
        session, topology, training_control = self.session, self.session.topology, self.session.control
        metrics = None
        if topology.is_main_process:
            self.control.should_evaluate = False
            with unsharded_evaluation(topology, self.model):
                metrics = training_control.evaluate(
                    lambda check_stop: evaluate_step(session.task, session.training, self, "during", training_control.step, check_stop)
                )
            if metrics is None or training_control.is_done:
                self.control.should_save = self.control.should_training_stop = True
            if training_control.should_save_best:
                self.control.should_save = True
        else:
            serve_shards(topology, self.model)
        sync_control_flags(topology, self.control)
        return {"eval_loss": math.nan if metrics is None or metrics.eval_loss is None else metrics.eval_loss}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights only: the tokenizer is 33 MB, and the library would pickle the arguments."""
        full_state = self.session.full_state
        self.model.save_pretrained(output_dir, state_dict=full_state.weights if full_state else None)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        session, topology, step = self.session, self.session.topology, self.session.control.step
        rng_states, session.full_state = topology.gather_rng_states(), gather_full_state(topology, self)
        if not topology.is_main_process:
            return
        check_finite_weights(self.model, step, session.full_state.weights if session.full_state else None)
        folder = Path(self.args.output_dir or "", f"checkpoint-{step}")
        buffer = session.task.logged_metrics_buffer(self)
        session.control.logged_metrics_buffer = {name: tuple(values) for name, values in buffer.items()}
        save_library_files = super()._save_checkpoint

        def write_files() -> None:
            save_library_files(model, trial)
            save_rng_states(folder, rng_states)

        session.control.save(folder, self.state.epoch or 0.0, write_files)
        session.full_state = None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.session.full_state is None:
            super()._save_optimizer_and_scheduler(output_dir)
        else:
            save_optimizer(self, self.session.full_state, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.session.topology.sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            load_optimizer(self, Path(checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Restore the buffered metrics. `build_instrumented_trainer` has loaded the weights."""
        session = self.session
        if session.topology.is_main_process:
            buffer = session.control.logged_metrics_buffer
            session.task.logged_metrics_buffer(self).update({name: list(values) for name, values in buffer.items()})

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        if not self.session.topology.sharded:  # a shard is on its device already
            super()._move_model_to_device(model, device)

    def store_flos(self) -> None:
        """Do nothing: the library would run a collective here, also where rank 0 saves alone."""

    def _send_telemetry(self) -> None:
        """Do nothing: TRL would report what is trained here to its authors."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Do nothing: the library would write a card into every checkpoint; `model_card.py` writes one for the model."""


class TrainingControlCallback:
    """Reports each step to TrainingControl, sets the library's control flags, and logs metrics and progress."""

    def __init__(self, session: TrainerSession, trainer: Any) -> None:
        self.session, self.trainer = session, trainer
        self.last_logged_at, self.last_logged_tokens = time.monotonic(), session.control.tokens_seen

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)  # the saved state may be of another number of steps
        reset_lr_to_schedule(kwargs["lr_scheduler"])
        self.last_logged_at = time.monotonic()
        self.session.topology.seed_per_rank(args.seed)
        self.session.control.start()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        session = self.session
        if session.resume_checkpoint:
            session.topology.barrier()  # until every process has read it
            if session.topology.is_main_process:
                # It is as large as the next checkpoint, and in a container the disk is memory.
                shutil.rmtree(session.resume_checkpoint, ignore_errors=True)
            session.resume_checkpoint = None
        session.control.on_step_begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        session, topology = self.session, self.session.topology
        loss, tokens = topology.all_reduce_sum(float(session.step_loss) / topology.world_size, session.step_tokens)
        session.step_loss, session.step_tokens, session.last_loss = 0.0, 0, loss
        topology.gather_metrics(session.task.logged_metrics_buffer(self.trainer))
        topology.startup_watchdog.stop()
        session.control.tokens_seen += int(tokens)
        session.control.on_step_end(state.global_step, loss)
        session.training.context.report_progress(self._progress())
        # At the end of an epoch the evaluation comes first, and on_epoch_end sets the flags.
        if topology.is_main_process and not (state.epoch.is_integer() or session.control.is_done):
            if topology.world_size == 1 and base_is_due(session.task, session.training, self.trainer.model):
                self._evaluate_base()
            self._set_control_flags(control, epoch_ended=False)
        sync_control_flags(topology, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.session.control.stop_reason:
            control.should_evaluate = False
        elif self.session.topology.is_main_process:
            self._set_control_flags(control, epoch_ended=True)
        sync_control_flags(self.session.topology, control)

    def _set_control_flags(self, control: Any, *, epoch_ended: bool) -> None:
        training_control = self.session.control
        if not training_control.is_done and training_control.should_stop():
            control.should_training_stop = True
        control.should_save = training_control.should_save(epoch_ended=epoch_ended)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        state.log_history.clear()  # nobody reads it, and it would be in every checkpoint
        session, context = self.session, self.session.training.context
        if not session.topology.is_main_process or not logs or "loss" not in logs:
            return
        now, tokens_seen = time.monotonic(), session.control.tokens_seen
        tokens_per_second = (tokens_seen - self.last_logged_tokens) / max(now - self.last_logged_at, 1e-9)
        self.last_logged_at, self.last_logged_tokens = now, tokens_seen
        logged = {"loss": session.control.pop_mean_loss()}
        logged |= {name: logs[name] for name in ("learning_rate", "grad_norm") if name in logs}
        if session.embedding_grad_norm is not None:
            logged["embedding_grad_norm"] = float(session.embedding_grad_norm)
        logged |= {name: value for name, value in logs.items() if name not in EXCLUDED_LOG_KEYS and isinstance(value, int | float | None)}
        values = {name: value if value is not None and math.isfinite(value) else None for name, value in logged.items()}
        notes = {
            name: "the library gave no value" if value is None else f"the value is {value}"
            for name, value in logged.items()
            if values[name] is None
        }
        values |= {"tokens_per_second": tokens_per_second} | read_memory_metrics() | system_metrics(context.workdir)
        context.log_metrics(state.global_step, values, epoch=state.epoch, notes=notes, progress=self._progress())

    def _evaluate_base(self) -> None:
        session, started_at = self.session, time.monotonic()
        evaluate_base_during_training(session.task, session.training, self.trainer, session.control)
        session.training.context.report_progress(self._progress())
        self.last_logged_at += time.monotonic() - started_at  # not a part of the training's speed

    def _progress(self) -> Progress:
        state, session = self.trainer.state, self.session
        remaining, training_control = session.training.context.remaining, session.control
        remaining.estimate_current(training_control.eta_s)
        if training_control.evaluation_s is not None:
            remaining.estimate("evaluating", training_control.evaluation_s)
        return Progress(
            step=state.global_step,
            total_steps=state.max_steps,
            epoch=state.epoch or 0.0,
            total_epochs=float(state.num_train_epochs),
            eta_s=training_control.eta_s,
            remaining_s=remaining.read(),
            loss=session.last_loss,
        )


def sync_control_flags(topology: ProcessTopology, control: Any) -> None:
    """Give every process the control flags of rank 0."""
    flags = topology.broadcast_flags(control.should_training_stop, control.should_save, control.should_evaluate)
    control.should_training_stop, control.should_save, control.should_evaluate = flags


def reset_lr_to_schedule(scheduler: Any) -> None:
    """Set the learning rate of the next step from the schedule. The saved rate differs if the job now has more epochs."""
    rates = [base * factor(scheduler.last_epoch) for factor, base in zip(scheduler.lr_lambdas, scheduler.base_lrs, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def read_memory_metrics() -> dict[str, float]:
    """Memory of this process in bytes: resident, and the peak on the GPU."""
    import psutil
    import torch

    metrics = {"rss_bytes": float(psutil.Process().memory_info().rss)}
    if torch.cuda.is_available():
        metrics["gpu_memory_bytes"] = float(torch.cuda.max_memory_allocated())
    return metrics
