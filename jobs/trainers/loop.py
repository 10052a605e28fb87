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

from jobs.base_model import fetch_base
from jobs.data.render import Rendered, TokenRow, use_chat_template
from jobs.errors import JobFailed, failure_of
from jobs.evaluation.answers import Features, answers, at_once, samples_of
from jobs.evaluation.harness import lm_eval_metrics
from jobs.evaluation.questions import Question, questions_of
from jobs.evaluation.text_metrics import task_metrics
from jobs.exporters import refuse_impossible
from jobs.exporters.folders import PROCESSOR_FILES, copy_files
from jobs.patience import download_patiently
from jobs.settings import parallelism
from jobs.system_metrics import system_metrics
from jobs.trained import Probe, TrainedModel
from jobs.trainers.course import BestPolicy, Course
from jobs.trainers.healing import BatchPlan, free_memory, is_out_of_memory, plan_with_less_memory
from jobs.trainers.model import (
    HEADROOM,
    Machine,
    compiles,
    end_turns,
    load_adapter,
    look_at_the_machine,
    ready_unsloth,
    refuse_broken,
    training_bytes,
)
from jobs.trainers.saving import SavePolicy, TrainingState
from jobs.trainers.several import (
    ALONE,
    FILLS,
    Choice,
    Crew,
    Errand,
    Evenly,
    Places,
    arguments_for,
    arrive,
    choose,
    look_for_places,
    quiet_context,
    save_random_states,
    shared,
    together,
)
from jobs.trainers.sharded import (
    Room,
    Whole,
    gather_all,
    gather_weights,
    lend,
    load_optimizer,
    measuring,
    obstacle_of,
    parallelism_of,
    save_optimizer,
    shard,
)
from schema.events import Sampled
from schema.job import EvalMetrics, Progress
from schema.training import TrainingConfig

if TYPE_CHECKING:
    from jobs.checkpoints import Restored
    from jobs.context import JobContext

PROBES = 16
CALIBRATION_ROWS = 256  # for an importance matrix: more change it little
ONE_EACH = "only provider huggingface trains on several"
ADAM_COPIES = 3  # a trained weight in a checkpoint: itself, and Adam's two moments of it
TURN_TOKENS = ["<start_of_turn>", "<end_of_turn>"]
# What the library logs beside its losses, and we tell elsewhere, or not at all.
NOT_METRICS = {"loss", "learning_rate", "grad_norm", "epoch", "total_flos", "num_tokens", "step_time", "num_input_tokens_seen"}


@dataclass(frozen=True)
class Ground:
    """What a training stands on, in the attempt's folder."""

    config: TrainingConfig
    context: "JobContext"
    base_folder: Path
    splits: dict[str, Path]  # the rows, by split
    tokenizer: Any
    template_is_ours: bool  # the base had no chat template of its own
    machine: Machine
    restored: "Restored | None"

    @property
    def pad_id(self) -> int:
        """What fills short rows."""
        return int(self.tokenizer.pad_token_id or 0)

    @property
    def adapts(self) -> bool:
        """Only an adapter is trained."""
        return self.config.method != "Full"


class Lesson(Protocol):
    """What a trainer type brings: its rows, its model, the library's trainer that has its loss, and how it is measured."""

    @property
    def items(self) -> int:
        """What an epoch goes over: rows, or blocks of packed rows."""
        ...

    @property
    def shown(self) -> Sequence[TokenRow]:
        """Held-out rows as tokens: prompts to answer, and texts on which exported files are compared."""
        ...

    @property
    def is_measured(self) -> bool:
        """There are held-out rows."""
        ...

    @property
    def train_rows(self) -> Sequence[TokenRow]:
        """The training rows as tokens: for an importance matrix, and to be counted."""
        ...

    def model(self, weights: Path) -> Any:
        """The model, with a fresh adapter if only that is trained. `weights` are the base's, or of a checkpoint of the whole model."""
        ...

    def trainer(self, model: Any, arguments: dict[str, Any], obedient: Callable[[type], type], course: Course) -> Any:
        """The library's trainer of this loss, its class made `obedient`. Its `model` is the one that is trained."""
        ...

    def window(self, trainer: Any) -> MutableMapping[str, list[float]]:
        """What the library has gathered since it last logged, by name."""
        ...

    @property
    def recipe(self) -> "Callable[[Ground], Lesson]":
        """Makes what another process of the same training needs of the lesson; can be pickled."""
        ...

    @property
    def shares(self) -> Evenly:
        """How several processes come to the loss of one."""
        ...

    def tokens_in(self, inputs: Any) -> int:
        """Real tokens, not padding, in a batch."""
        ...

    def measure(self, trainer: Any, pulse: Callable[[], None]) -> EvalMetrics:
        """The model on the held-out rows. `pulse` is called now and then, and may raise."""
        ...


@runtime_checkable
class Seeing(Protocol):
    """A lesson whose held-out prompts are more than tokens: they have images."""

    def questions(self, count: int) -> list[Question]:
        """The first `count` questions of the held-out rows, the same at every call."""
        ...

    def features_of(self, questions: Sequence[Question]) -> Sequence[Features]:
        """What each question has beside its tokens."""
        ...


def lay_ground(config: TrainingConfig, context: "JobContext") -> Ground:
    """Fetch what the training needs. Raises JobFailed and Stopped."""
    ready_unsloth(config)

    from transformers import AutoTokenizer

    context.phase("downloading")
    source = context.spec.export_of
    restored = context.checkpoints.fetch(source) if source else context.checkpoints.newest()
    base_folder = fetch_base(context)
    refuse_impossible(config, base_folder)
    splits = {
        name: download_patiently(context.stores.datasets, split.key, context.workdir / "data" / f"{name}.jsonl")
        for name, split in context.spec.dataset.splits.items()
    }
    context.phase("tokenizing")
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    template_is_ours = use_chat_template(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    machine = look_at_the_machine(config, context, base_folder)
    return Ground(config, context, base_folder, splits, tokenizer, template_is_ours, machine, restored)


def new_tokens(ground: Ground, rows: Sequence[TokenRow]) -> list[int]:
    """Turn tokens that the base has never seen and the rows have: their embeddings are trained as well.

    In a base that was never tuned to chat they are all but equal to those of other unseen tokens, and no LoRA of the layers between
    can tell them apart.
    """
    if not ground.template_is_ours:
        return []
    turn_tokens = set(ground.tokenizer.convert_tokens_to_ids(TURN_TOKENS)) - {None, ground.tokenizer.unk_token_id}
    found = sorted(turn_tokens & {token for row in rows for token in row.input_ids})
    if found:
        why = "the base model has none of its own; the embeddings of its turn tokens are trained too"
        ground.context.decided("chat_template", "gemma3", why)
    return found


def tell_losses(ground: Ground, split: str, found: Rendered) -> None:
    """Say how many rows were cut or left out."""
    longest = ground.config.hyperparameters.max_seq_length
    if found.cut:
        ground.context.warn("rows_cut", f"{found.cut} rows of {split} are longer than max_seq_length {longest} and were cut")
    if found.dropped:
        message = f"{found.dropped} rows of {split} have nothing to learn within max_seq_length and were left out"
        ground.context.warn("rows_dropped", message)


def refuse_nothing_to_learn(ground: Ground, train: int, held_out: int) -> None:
    """Raises JobFailed without training rows; without held-out ones, says that nothing is measured."""
    if not train:
        raise JobFailed("invalid_data", "no training row has anything to learn in it", "raise max_seq_length, or look at the rows' answers")
    if not held_out:
        message = "the dataset has no held-out row with anything to learn in it, so nothing is measured"
        ground.context.warn("not_evaluated", message)


def teach(lesson: Lesson, ground: Ground) -> TrainedModel:
    """Train, or go on, and leave the model in the attempt's folder. Of a checkpoint that is only to be exported, the model is measured
    and left there. Raises JobFailed and Stopped."""
    context = ground.context
    context.decided(
        "learning_rate", f"{ground.config.hyperparameters.learning_rate:g}", "as asked for, or what suits the trainer and method"
    )
    taught = _study(lesson, ground) if context.spec.export_of else _teach_whatever_happens(lesson, ground)
    taught = _the_best(lesson, ground, taught)
    state, step = taught.course.state, taught.course.published_step
    metrics = taught.metrics if taught.weights else _measured_after(lesson, ground, taught.trainer, taught.course)
    folder = context.workdir / "model"
    model = taught.trainer.model
    model.save_pretrained(folder, state_dict=taught.weights)
    ground.tokenizer.save_pretrained(folder)
    copy_files(ground.base_folder, folder, PROCESSOR_FILES)  # of a base that sees, also where text alone was trained
    if not ground.adapts and model.can_generate():
        model.generation_config.save_pretrained(folder)
    return TrainedModel(
        folder=folder,
        is_adapter=ground.adapts,
        base_folder=ground.base_folder,
        probes=tuple(
            Probe(row.prompt_text, tuple(row.input_ids), row.prompt_tokens) for row in islice(lesson.shown or lesson.train_rows, PROBES)
        ),
        metrics=metrics,
        base_metrics=context.findings.base_metrics,
        train_rows=len(lesson.train_rows),
        train_tokens=state.tokens_seen,
        train_runtime_s=state.train_s,
        calibration=tuple(tuple(row.input_ids) for row in islice(lesson.train_rows, CALIBRATION_ROWS)),
        step=step,
    )


# --- once, or again with a smaller batch ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Taught:
    """The library's trainer with the trained model, and the course it took.

    Of a model that was divided, its `weights` put together, and the metrics: it was measured while there were others to hold it.
    """

    trainer: Any
    course: Course
    weights: dict[str, Any] | None = None
    metrics: EvalMetrics | None = None


def _teach_whatever_happens(lesson: Lesson, ground: Ground) -> Taught:
    """The trained model; when memory runs out the batch gets smaller, and the training goes on from what was saved."""
    context, knobs = ground.context, ground.config.hyperparameters
    asked = BatchPlan(knobs.batch_size, knobs.gradient_accumulation_steps)
    steps = _total_steps(ground.config, lesson)
    machine = replace(ground.machine, compiles=compiles(ground.config, context, ground.machine, ground.base_folder, steps))
    ground = replace(ground, machine=machine)
    places = look_for_places(on_gpu=machine.on_gpu)
    restored, healed = ground.restored, 0
    smaller: BatchPlan | None = None
    while True:
        state = _state_in(restored, asked, smaller)
        context.findings.base_metrics = context.findings.base_metrics or state.base_metrics
        course = _course(ground, state, steps)
        processes = _processes(lesson, ground, course.plan, places)
        sharded = _is_divided(ground, processes)
        try:
            return _teach_once(lesson, ground, restored, course, replace(places, most=processes, sharded=sharded))
        except (RuntimeError, MemoryError) as error:
            no_memory = is_out_of_memory(error)
            if not no_memory and (processes == 1 or course.step > state.step):
                raise
            reason = failure_of(error).message
        # The error is gone here, and with it the last that held the model.
        if no_memory:
            plan = BatchPlan(state.batch_size, state.gradient_accumulation_steps)
            smaller = plan_with_less_memory(plan, course.step + 1, healed)
            healed += 1
            same = f"{smaller.gradient_accumulation_steps} batches of {smaller.batch_size} make the same step"
            why = f"memory ran out in step {course.step + 1} with {plan}; {same}"
            context.decided("batch_size", str(smaller.batch_size), why)
        else:
            context.warn("one_process", f"{processes} processes did not come to a first step, so that one trains alone: {reason}")
            places = replace(places, most=1)
        free_memory()
        context.checkpoints.settle()
        restored = context.checkpoints.newest()  # what this went on from is removed when its first step begins


def _processes(lesson: Lesson, ground: Ground, plan: BatchPlan, places: Places) -> int:
    """How many train, of those for which there is room; told with the reason."""
    if places.most == 1:
        return 1
    choice = choose(plan, lesson.items, places.most) if _shares(ground) else Choice(1, ONE_EACH, ONE_EACH)
    ground.context.decided("processes", str(choice.processes), choice.why)
    if choice.idle:
        message = f"there is room for {places.most} processes, and this training uses {choice.processes}: {choice.idle}"
        ground.context.warn("idle_gpus" if places.gpus else "idle_processors", message)
    return choice.processes


def _shares(ground: Ground) -> bool:
    """Whether the provider can train in several processes."""
    return ground.config.provider == "huggingface"


def _is_divided(ground: Ground, processes: int) -> bool:
    """Whether each process has a part of the model instead of the whole; told with the reason."""
    found = parallelism_of(processes, obstacle_of(ground.config), parallelism(), _room(ground, processes))
    ground.context.decided("parallelism", found.value, found.why)
    return found.value == "fsdp"


def _room(ground: Ground, processes: int) -> Room | None:
    """Memory of a GPU, and what of it is needed; None without one."""
    import torch

    if not ground.machine.on_gpu:
        return None
    needed = partial(training_bytes, ground.config, ground.base_folder, recomputes=ground.machine.gradient_checkpointing)
    return Room(whole=needed(), part=needed(parts=processes), there=torch.cuda.mem_get_info()[0] * HEADROOM)


def _course(ground: Ground, state: TrainingState, total_steps: int) -> Course:
    knobs, judged = ground.config.hyperparameters, ground.config.eval_config
    best = BestPolicy(judged.load_best_model_at_end, judged.early_stopping_patience, judged.early_stopping_threshold)
    return Course(ground.context, SavePolicy(knobs.save_strategy, knobs.save_steps), state, total_steps=total_steps, best=best)


def _state_in(restored: "Restored | None", asked: BatchPlan, smaller: BatchPlan | None) -> TrainingState:
    """Where to go on, and with which batch: the one that this attempt came down to, or an earlier one did, or that was asked for."""
    state = TrainingState.read(restored.folder) if restored else None
    plan = smaller or (asked.if_it_fits(BatchPlan(state.batch_size, state.gradient_accumulation_steps)) if state else asked)
    batch = {"batch_size": plan.batch_size, "gradient_accumulation_steps": plan.gradient_accumulation_steps}
    return state.model_copy(update=batch) if state else TrainingState.model_validate(batch)


def _total_steps(config: TrainingConfig, lesson: Lesson) -> int:
    """Optimizer steps of the whole training, as transformers' trainer counts them."""
    knobs = config.hyperparameters
    if knobs.max_steps > 0:
        return knobs.max_steps
    return knobs.epochs * math.ceil(lesson.items / (knobs.batch_size * knobs.gradient_accumulation_steps))


def _teach_once(lesson: Lesson, ground: Ground, restored: "Restored | None", course: Course, places: Places) -> Taught:
    """Train from the base or from what was restored until the course ends, in so many processes. Raises Stopped."""
    folder = restored.folder if restored else None
    if places.most == 1 or (course.is_done and not places.sharded):
        return _led(lesson, ground, folder, course, ALONE)
    ground = _uncompiled(ground)
    told = {"state": course.state, "total_steps": course.total_steps, "checkpoint": folder}
    with together(ground, lesson.recipe, places, told) as crew:
        return _led(lesson, ground, folder, course, crew)


def _uncompiled(ground: Ground) -> Ground:
    """The same without torch.compile, which would tear apart what several processes average while it is made; told."""
    if not ground.machine.compiles:
        return ground
    if ground.config.hyperparameters.torch_compile:
        ground.context.warn("not_compiled", "torch_compile is for a training in one process, and this one has several; it goes on without")
    ground.context.decided("torch_compile", "false", "several processes save more")
    return replace(ground, machine=replace(ground.machine, compiles=False))


def _led(lesson: Lesson, ground: Ground, folder: Path | None, course: Course, crew: Crew) -> Taught:
    """The training, by the process that decides."""
    context = ground.context
    trainer = _trainer(lesson, ground, folder, course, crew)
    with measuring(crew, trainer.model):
        _measure_before(lesson, ground, folder, trainer, course)
    context.phase("training")
    course.checkpoint_bytes = ADAM_COPIES * sum(part.nbytes for part in trainer.model.parameters() if part.requires_grad)
    with context.stop.politely():
        if crew.tell(not course.is_done):
            crew.meet()
            crew.first_step.begins()
            trainer.train(resume_from_checkpoint=str(folder) if folder else None)
            if not crew.sharded:  # what is divided is looked at when it is put together
                refuse_broken(trainer.model, course.step)
        course.end()
    if not crew.sharded:
        return Taught(trainer, course)
    best = crew.tell(_better(ground, course))
    if best is not None:
        del trainer
        free_memory()
        trainer = _trainer(lesson, ground, best, course, crew)
    with measuring(crew, trainer.model):
        metrics = _measured_after(lesson, ground, trainer, course)
    weights = gather_weights(crew, trainer.model)
    refuse_broken(trainer.model, course.step, weights)
    return Taught(trainer, course, weights, metrics)


def follow(errand: Errand) -> None:
    """The same training in another process: what is decided, measured, told and saved comes from rank 0."""
    context = quiet_context(errand)
    ground = Ground(**errand.ground, context=context, restored=None)
    lesson = errand.recipe(ground)
    course = Course(context, SavePolicy("no", 1), errand.state, total_steps=errand.total_steps)
    crew = arrive(errand)
    trainer = _trainer(lesson, ground, errand.checkpoint, course, crew)
    lend(crew, trainer.model)
    if crew.tell(None):
        crew.meet()
        trainer.train(resume_from_checkpoint=str(errand.checkpoint) if errand.checkpoint else None)
    if not crew.sharded:
        return
    best = crew.tell(None)
    if best is not None:
        del trainer
        free_memory()
        trainer = _trainer(lesson, ground, best, course, crew)
    lend(crew, trainer.model)
    gather_weights(crew, trainer.model)


def _study(lesson: Lesson, ground: Ground) -> Taught:
    """The model of a checkpoint that is not trained any further."""
    restored = ground.restored
    assert restored is not None
    state = TrainingState.read(restored.folder)
    ground.context.findings.base_metrics = state.base_metrics
    course = _course(ground, state, state.step)
    places = look_for_places(on_gpu=ground.machine.on_gpu)
    if places.most > 1 and _shares(ground) and _is_divided(ground, places.most):
        return _teach_once(lesson, ground, restored, course, replace(places, sharded=True))
    return Taught(_trainer(lesson, ground, restored.folder, course), course)


def _the_best(lesson: Lesson, ground: Ground, taught: Taught) -> Taught:
    """The same, or the model of the best checkpoint, where that is to be published and it was another one."""
    course = taught.course
    best = None if taught.weights else _better(ground, course)
    if best is None:
        return taught
    del taught
    free_memory()
    return Taught(_trainer(lesson, ground, best, course), course)


def _better(ground: Ground, course: Course) -> Path | None:
    """The checkpoint that is published instead of the model as it is, if any; told with the reason."""
    if not course.wants_best or ground.context.spec.export_of or course.best_step in (None, course.step):
        return None
    ground.context.checkpoints.settle()
    best = ground.context.checkpoints.best()
    if best is None:
        ground.context.warn("best_checkpoint_gone", f"the checkpoint of step {course.best_step} cannot be read; the last one is published")
        return None
    why = f"eval_loss was lowest there: {best.checkpoint.eval_loss}"
    ground.context.decided("published_step", str(best.checkpoint.step), why)
    course.published_step = best.checkpoint.step
    return best.folder


# --- the library's trainer -----------------------------------------------------------------------------------------------


def _trainer(lesson: Lesson, ground: Ground, checkpoint: Path | None, course: Course, crew: Crew = ALONE) -> Any:
    """The library's trainer around the model of the base, or of a checkpoint, obeying the course."""
    from transformers import PrinterCallback

    model = _model(lesson, ground, checkpoint, crew)
    if model.can_generate():
        end_turns(model, ground.tokenizer)
    loop = _Loop(lesson, ground, course, checkpoint, crew)
    arguments = _arguments(lesson, ground, course) | arguments_for(crew.processes, course.plan.gradient_accumulation_steps)
    trainer = lesson.trainer(model, arguments, loop.obedient, course)
    trainer.remove_callback(PrinterCallback)  # its losses are not ours
    trainer.add_callback(loop.reporting(trainer))
    if crew.sharded:
        trainer.is_distributed_loading_by_transformers = True  # the library's word for a model that it neither moves nor wraps
    if checkpoint and ground.adapts and not crew.sharded:
        load_adapter(trainer.model, checkpoint)
    if ground.machine.gradient_checkpointing and ground.adapts:
        trainer.model.enable_input_require_grads()
    return trainer


def _model(lesson: Lesson, ground: Ground, checkpoint: Path | None, crew: Crew) -> Any:
    """The model of the base, or of a checkpoint of all weights; or this process's part of it, which is never whole on the GPU."""
    import torch

    weights = checkpoint if checkpoint and not ground.adapts else ground.base_folder
    if not crew.sharded:
        return lesson.model(weights)
    beside = replace(ground, machine=replace(ground.machine, device=torch.device("cpu")))
    model = lesson.recipe(beside).model(weights)
    if checkpoint and ground.adapts:
        load_adapter(model, checkpoint)
    return shard(model, ground.machine)


def _arguments(lesson: Lesson, ground: Ground, course: Course) -> dict[str, Any]:
    """What every kind of trainer of the library is told."""
    config, machine, plan = ground.config, ground.machine, course.plan
    knobs = config.hyperparameters
    return {
        "output_dir": str(ground.context.workdir / "checkpoints"),
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
        "eval_strategy": config.eval_config.eval_strategy if lesson.is_measured else "no",
        "eval_steps": config.eval_config.eval_steps,
        "bf16": machine.autocast,
        "activation_checkpointing": machine.gradient_checkpointing,
        "use_cpu": not machine.on_gpu,
        "report_to": [],
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": machine.on_gpu,
        "dataloader_num_workers": machine.workers,
        "torch_compile": machine.compiles,
    }


@dataclass
class _Loop:
    """What goes on between the library's trainer and the course."""

    lesson: Lesson
    ground: Ground
    course: Course
    restored: Path | None
    crew: Crew
    whole: Whole | None = None  # of a divided model, while it is saved
    step_loss: Any = field(default=0.0)  # of the optimizer step at work, over its micro-batches
    step_tokens: int = 0

    def obedient(self, kind: type) -> type:
        """A class of trainer with our measurements, and with checkpoints that are handed over."""
        loop, course, lesson, crew = self, self.course, self.lesson, self.crew

        class Obedient(shared(kind, lesson, crew)):
            """The library's trainer, as the course wants it."""

            def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
                loop.step_tokens += 0 if FILLS in inputs else lesson.tokens_in(inputs)
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
                if crew.leads:
                    with measuring(crew, self.model):
                        loss = self.measured()
                else:
                    lend(crew, self.model)
                obey(crew, self.control)
                return {"eval_loss": loss}

            def measured(self) -> float:
                self.control.should_evaluate = False
                found = course.evaluate(lambda pulse: _measured(lesson, loop.ground, self, "during", course.step, pulse))
                if found is None or course.is_done:
                    self.control.should_save = self.control.should_training_stop = True
                if course.must_save_best:
                    self.control.should_save = True
                return math.nan if found is None or found.eval_loss is None else found.eval_loss

            def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
                weights = loop.whole.weights if loop.whole else None
                self.model.save_pretrained(output_dir, state_dict=weights)  # no tokenizer, 33 MB of it, and no pickled arguments

            def _send_telemetry(self) -> None:
                """TRL's would tell its makers that something is trained here, and on what."""

            def create_model_card(self, *_: Any, **__: Any) -> None:
                """The library's would be in every checkpoint; ours is written once."""

            def _save_checkpoint(self, model: Any, trial: Any) -> None:
                states, loop.whole = crew.random_states(), gather_all(crew, self)
                if not crew.leads:
                    return
                refuse_broken(self.model, course.step, loop.whole.weights if loop.whole else None)
                folder = Path(self.args.output_dir or "", f"checkpoint-{course.step}")
                course.window_metrics = {name: tuple(values) for name, values in lesson.window(self).items()}

                def write() -> None:
                    super(Obedient, self)._save_checkpoint(model, trial)
                    save_random_states(folder, states)

                course.save(folder, self.state.epoch or 0.0, write)
                loop.whole = None

            def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
                if loop.whole is None:
                    super()._save_optimizer_and_scheduler(output_dir)
                else:
                    save_optimizer(self, loop.whole, Path(output_dir))

            def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
                if checkpoint is None or not crew.sharded:
                    super()._load_optimizer_and_scheduler(checkpoint)
                else:
                    load_optimizer(self, Path(checkpoint))

            def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
                """The model has these weights already; what was being gathered for the next point goes on."""
                if crew.leads:
                    lesson.window(self).update({name: list(values) for name, values in course.window_metrics.items()})

        Obedient.__name__ = kind.__name__
        return Obedient

    def reporting(self, trainer: Any) -> Any:
        """What tells the course what happens, the library what the course says, and the world how it goes."""
        from transformers import TrainerCallback

        loop, course, context, crew = self, self.course, self.ground.context, self.crew

        class Report(TrainerCallback):
            def __init__(self) -> None:
                self.last, self.last_tokens = time.monotonic(), course.tokens_seen

            def on_train_begin(self, args: Any, state: Any, control: Any, **found: Any) -> None:
                state.compute_steps(args, state.max_steps)  # what was saved may be of another plan
                follow_schedule(found["lr_scheduler"])
                self.last = time.monotonic()
                crew.differ(args.seed)
                course.begin()

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                if loop.restored:
                    crew.meet()  # all have read it by now
                    if crew.leads:
                        shutil.rmtree(loop.restored, ignore_errors=True)  # as large as the next one; a container's disk is memory
                    loop.restored = None
                course.step_begins()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                loss, tokens = crew.total(float(loop.step_loss) / crew.processes, loop.step_tokens)
                loop.step_loss, loop.step_tokens = 0.0, 0
                crew.bring_home(loop.lesson.window(trainer))
                crew.first_step.is_done()
                course.tokens_seen += int(tokens)
                course.step_done(state.global_step, loss)
                context.progress(self.progress())
                if crew.leads and not (state.epoch.is_integer() or course.is_done):  # at an epoch's end the measurements come first
                    self.decide(control, epoch_ended=False)
                obey(crew, control)

            def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if course.stopping:
                    control.should_evaluate = False
                elif crew.leads:
                    self.decide(control, epoch_ended=True)
                obey(crew, control)

            def decide(self, control: Any, *, epoch_ended: bool) -> None:
                if not course.is_done and course.must_end():
                    control.should_training_stop = True
                control.should_save = course.must_save(epoch_ended=epoch_ended)

            def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
                state.log_history.clear()  # it would be in every checkpoint, and nobody reads it
                if not crew.leads or not logs or "loss" not in logs:
                    return
                now = time.monotonic()
                speed = (course.tokens_seen - self.last_tokens) / max(now - self.last, 1e-9)
                self.last, self.last_tokens = now, course.tokens_seen
                told = {"loss": course.logged_loss()} | {name: logs[name] for name in ("learning_rate", "grad_norm") if name in logs}
                told |= {name: value for name, value in logs.items() if name not in NOT_METRICS and isinstance(value, int | float | None)}
                values = {name: value if value is not None and math.isfinite(value) else None for name, value in told.items()}
                notes = {name: "nothing gave one" if told[name] is None else f"it is {told[name]}" for name in told if values[name] is None}
                values |= {"tokens_per_second": speed} | memory() | system_metrics(context.workdir)
                context.metrics(state.global_step, values, epoch=state.epoch, notes=notes, progress=self.progress())

            def progress(self) -> Progress:
                state = trainer.state
                return Progress(
                    step=state.global_step,
                    total_steps=state.max_steps,
                    epoch=state.epoch or 0.0,
                    total_epochs=float(state.num_train_epochs),
                    eta_s=course.eta_s,
                )

        return Report()


def obey(crew: Crew, control: Any) -> None:
    """Let every process do next what rank 0 does."""
    wishes = crew.agree(control.should_training_stop, control.should_save, control.should_evaluate)
    control.should_training_stop, control.should_save, control.should_evaluate = wishes


def follow_schedule(scheduler: Any) -> None:
    """Let the next step have the learning rate that the schedule has for it now: more epochs make it another one than was saved."""
    rates = [base * factor(scheduler.last_epoch) for factor, base in zip(scheduler.lr_lambdas, scheduler.base_lrs, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def memory() -> dict[str, float]:
    """Bytes that this process holds, and that it holds on the GPU."""
    import psutil
    import torch

    found = {"rss_bytes": float(psutil.Process().memory_info().rss)}
    if torch.cuda.is_available():
        found["gpu_memory_bytes"] = float(torch.cuda.max_memory_allocated())
    return found


# --- measuring -----------------------------------------------------------------------------------------------------------


def _is_judged(lesson: Lesson, ground: Ground) -> bool:
    """There is something to measure base and trained model on."""
    return lesson.is_measured or bool(ground.config.eval_config.lm_eval_tasks)


def _measure_before(lesson: Lesson, ground: Ground, folder: Path | None, trainer: Any, course: Course) -> None:
    """The base, or what the training that goes on from `folder` had no time for."""
    context = ground.context
    if not _is_judged(lesson, ground) or (folder is not None and not course.evaluation_is_due):
        return
    context.phase("evaluating")
    if folder is None and context.findings.base_metrics is None:
        measured = _measured(lesson, ground, trainer, "before", 0, context.check)
        context.evaluated("before", 0, _on_benchmarks(ground, trainer.model, measured))
    if course.evaluation_is_due:
        course.evaluate(lambda _: _measured(lesson, ground, trainer, "during", course.step, context.check))


def _measured_after(lesson: Lesson, ground: Ground, trainer: Any, course: Course) -> EvalMetrics | None:
    """The model that is published; None where there is nothing to measure it on."""
    context, step = ground.context, course.published_step
    if not _is_judged(lesson, ground):
        return None
    context.phase("evaluating")
    metrics = course.state.measured.get(step) or _measured(lesson, ground, trainer, "after", step, context.check)
    metrics = _on_benchmarks(ground, trainer.model, metrics)
    context.evaluated("after", step, metrics)
    return metrics


def _on_benchmarks(ground: Ground, model: Any, metrics: EvalMetrics) -> EvalMetrics:
    """The metrics, with those of the tasks of lm-evaluation-harness that were asked for."""
    judged = ground.config.eval_config
    if not judged.lm_eval_tasks:
        return metrics
    size = ground.config.hyperparameters.batch_size
    values, notes = lm_eval_metrics(
        model, ground.tokenizer, judged.lm_eval_tasks, limit=judged.lm_eval_limit, batch_size=size, pulse=ground.context.check
    )
    return metrics.model_copy(update={"values": metrics.values | values, "notes": metrics.notes | notes})


def _measured(lesson: Lesson, ground: Ground, trainer: Any, when: Any, step: int, pulse: Callable[[], None]) -> EvalMetrics:
    """What the lesson measures, and what the model answers to held-out prompts."""
    import torch

    machine = ground.machine
    with torch.autocast(machine.device.type, torch.bfloat16, enabled=machine.autocast):
        metrics = lesson.measure(trainer, pulse) if lesson.is_measured else EvalMetrics()
        return _asked(lesson, ground, trainer.model, metrics, (when, step), pulse)


def _asked(
    lesson: Lesson, ground: Ground, model: Any, metrics: EvalMetrics, when: tuple[Any, int], pulse: Callable[[], None]
) -> EvalMetrics:
    """The metrics, with those of the model's answers; a few of these are shown."""
    judged = ground.config.eval_config
    wanted = max(judged.task_rows if judged.compute_eval_metrics else 0, judged.sample_prompts)
    if not wanted or not model.can_generate():
        return metrics
    sees = isinstance(lesson, Seeing)
    questions = lesson.questions(wanted) if sees else questions_of(lesson.shown, ground.tokenizer, wanted)
    if not questions:
        values, notes = task_metrics([], []) if judged.compute_eval_metrics else ({}, {})
        return metrics.model_copy(update={"values": metrics.values | values, "notes": metrics.notes | notes})
    features = lesson.features_of(questions) if sees else None
    prompts = [question.prompt_ids for question in questions]
    said = answers(
        model,
        ground.tokenizer,
        prompts,
        max_new_tokens=judged.max_new_tokens,
        batch_size=at_once(ground.config.hyperparameters.batch_size, prompts, judged.max_new_tokens),
        pulse=pulse,
        features=features,
    )
    references = [question.reference for question in questions]
    if judged.sample_prompts:
        shown = samples_of([question.prompt_text for question in questions], references, said, judged.sample_prompts)
        ground.context.sampled(Sampled(when=when[0], step=when[1], samples=shown))
    if not judged.compute_eval_metrics:
        return metrics
    values, notes = task_metrics(said[: judged.task_rows], references[: judged.task_rows])
    return metrics.model_copy(update={"values": metrics.values | values, "notes": metrics.notes | notes})


def objective(metrics: dict[str, float], likelihood: EvalMetrics, began: float) -> EvalMetrics:
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
            "eval_runtime": time.monotonic() - began,
            "values": values,
            "notes": notes,
        }
    )
