"""Supervised fine-tuning: learn to say what the rows say.

    1. where to go on: the job's newest checkpoint, if there is one
    2. rows to tokens and labels
    3. the base model, on the device and in the precision that this machine does well; LoRA, or all weights
    4. measure the base, train, measure again
    5. save

The loss is computed at labelled positions only: a vocabulary of 262,144 makes the head the dearest layer, and most positions of
a conversation are not learned.
"""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.base_model import fetch_base
from jobs.data.render import NO_LABEL, Rendered, TokenRow, read_rows, render, use_chat_template
from jobs.errors import JobFailed
from jobs.patience import download_patiently
from jobs.probe import fast_bf16
from jobs.trained import Probe, TrainedModel
from jobs.trainers.course import Course, diverged
from jobs.trainers.healing import BatchPlan, free_memory, is_out_of_memory, plan_with_less_memory
from jobs.trainers.saving import SavePolicy, TrainingState
from jobs.turn_tokens import train_few_rows_only
from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT
from schema.job import EvalMetrics, Progress
from schema.training import SftConfig

if TYPE_CHECKING:
    from jobs.checkpoints import Restored
    from jobs.context import JobContext

TURN_TOKENS = ["<start_of_turn>", "<end_of_turn>"]
PROBES = 16
ADAM_COPIES = 3  # a trained weight in a checkpoint: itself, and Adam's two moments of it


@dataclass(frozen=True)
class Rows:
    """What is learned and what is measured, as tokens."""

    tokenizer: Any
    train: list[TokenRow]
    held_out: list[TokenRow]
    blocks: list[list[TokenRow]]  # the train rows as they go through the model: one by one, or packed
    new_tokens: list[int]  # tokens that the base has never seen: their embeddings are trained as well

    @property
    def pad_id(self) -> int:
        """What fills short rows."""
        return int(self.tokenizer.pad_token_id or 0)


@dataclass(frozen=True)
class Machine:
    """What the attempt runs on, and in which precision."""

    device: Any
    dtype: Any
    autocast: bool
    on_gpu: bool


def train(config: SftConfig, context: "JobContext") -> TrainedModel:
    """Train as the config says, or go on where an attempt before left off, and leave the model in the attempt's folder.

    Of a checkpoint that is only to be exported, the model is measured and left there. Raises JobFailed and Stopped.
    """
    if config.method == "QLoRA" or config.provider != "huggingface" or config.modality != "text":
        raise JobFailed("invalid_config", "this image trains text with provider huggingface and method LoRA or Full")

    # --- what there is ---
    context.phase("downloading")
    source = context.spec.export_of
    restored = context.checkpoints.fetch(source) if source else context.checkpoints.newest()
    base_folder = fetch_base(context)
    splits = {
        name: download_patiently(context.stores.datasets, split.key, context.workdir / "data" / f"{name}.jsonl")
        for name, split in context.spec.dataset.splits.items()
    }
    context.phase("tokenizing")
    rows = _prepare(config, context, base_folder, splits)
    machine = _look_at_the_machine(config, context)

    # --- train ---
    if source and restored:
        state = TrainingState.read(restored.folder)
        context.findings.base_metrics = state.base_metrics
        model = _build(config, rows, machine, base_folder, restored.folder)
    else:
        model, state = _train_whatever_happens(config, context, rows, machine, base_folder, restored)

    # --- measure ---
    metrics = None
    if rows.held_out:
        context.phase("evaluating")
        metrics = state.measured.get(state.step) or _measure(model, rows, machine, config, context.check)
        context.evaluated("after", state.step, metrics)

    # --- save ---
    folder = context.workdir / "model"
    is_adapter = config.method == "LoRA"
    model.save_pretrained(folder)
    rows.tokenizer.save_pretrained(folder)
    if not is_adapter:
        model.generation_config.save_pretrained(folder)
    shown = islice(rows.held_out or rows.train, PROBES)
    probes = tuple(Probe(row.prompt_text, tuple(row.input_ids), row.prompt_tokens) for row in shown)
    base_metrics = context.findings.base_metrics
    counts = len(rows.train), state.tokens_seen, state.train_s
    return TrainedModel(folder, is_adapter, base_folder, probes, metrics, base_metrics, *counts)


def _prepare(config: SftConfig, context: "JobContext", base_folder: Path, splits: dict[str, Path]) -> Rows:
    """Rows to tokens and labels. Raises JobFailed when there is nothing to learn in them."""
    from transformers import AutoTokenizer

    knobs = config.hyperparameters
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    template_is_ours = use_chat_template(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    rendered = {
        name: render(read_rows(path), context.spec.dataset.dataset_type, tokenizer, knobs.max_seq_length) for name, path in splits.items()
    }
    for name, found in rendered.items():
        _tell_losses(context, name, found, knobs.max_seq_length)
    train_rows = rendered[TRAIN_SPLIT].rows
    eval_rows = rendered[EVAL_SPLIT].rows if EVAL_SPLIT in rendered else []
    if not train_rows:
        raise JobFailed("invalid_data", "no training row has anything to learn in it", "raise max_seq_length, or look at the rows' answers")
    if not eval_rows:
        context.warn("not_evaluated", "the dataset has no held-out row with anything to learn in it, so nothing is measured")
    # A base that was never tuned to chat has never seen the turn tokens: their embeddings are all but equal to those of other
    # unseen tokens, and no LoRA of the layers between can tell them apart. So those few rows are trained as well.
    turn_tokens = set(tokenizer.convert_tokens_to_ids(TURN_TOKENS)) - {None, tokenizer.unk_token_id}
    new_tokens = sorted(turn_tokens & {token for row in train_rows for token in row.input_ids}) if template_is_ours else []
    if new_tokens:
        context.decided("chat_template", "gemma3", "the base model has none of its own; the embeddings of its turn tokens are trained too")
    blocks = _packed(train_rows, knobs.max_seq_length) if knobs.packing else [[row] for row in train_rows]
    return Rows(tokenizer, train_rows, eval_rows, blocks, new_tokens)


def _look_at_the_machine(config: SftConfig, context: "JobContext") -> Machine:
    """The device and the precision, and why."""
    import torch

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    context.decided("device", str(device), torch.cuda.get_device_name() if on_gpu else "no GPU was found")
    bf16 = torch.cuda.is_bf16_supported() if on_gpu else fast_bf16()
    lora = config.method == "LoRA"
    # Full fine-tuning in pure bf16 loses small updates; with fp32 weights autocast does the products in bf16.
    dtype = torch.bfloat16 if bf16 and lora else torch.float32
    why = "the processor multiplies bf16 fast" if bf16 else "the processor is slow at bf16"
    context.decided("dtype", str(dtype).removeprefix("torch."), why if lora else "all weights are trained: small updates need fp32")
    # Recomputing activations costs a third of the speed; on a GPU memory is what runs out first.
    context.decided("gradient_checkpointing", str(on_gpu).lower(), "memory is dearer than time on a GPU" if on_gpu else "memory suffices")
    return Machine(device, dtype, autocast=bf16 and not lora and on_gpu, on_gpu=on_gpu)


def _build(config: SftConfig, rows: Rows, machine: Machine, base_folder: Path, checkpoint: Path | None) -> Any:
    """The model as it is trained, with the weights of the base, or of a checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    knobs = config.hyperparameters
    set_seed(knobs.seed)
    lora = config.method == "LoRA"
    weights = checkpoint if checkpoint and not lora else base_folder
    attention = "flash_attention_2" if knobs.use_fa2 else "sdpa"
    try:
        model = AutoModelForCausalLM.from_pretrained(weights, dtype=machine.dtype, attn_implementation=attention, trust_remote_code=False)
    except ImportError as error:
        raise JobFailed(
            "invalid_config", "use_fa2 needs the flash-attn package and an Ampere or newer GPU", "set use_fa2 to false"
        ) from error
    model.to(machine.device)
    model.config.use_cache = False
    end_of_turn = rows.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    if end_of_turn not in (None, rows.tokenizer.unk_token_id):
        model.generation_config.eos_token_id = sorted({rows.tokenizer.eos_token_id, end_of_turn})
    if lora:
        from peft import LoraConfig, get_peft_model

        targets = sorted(
            {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)} - {"lm_head"}
        )
        model = get_peft_model(
            model,
            LoraConfig(
                r=knobs.lora_rank,
                lora_alpha=knobs.lora_alpha,
                lora_dropout=knobs.lora_dropout,
                target_modules=targets,
                trainable_token_indices=rows.new_tokens or None,
                task_type="CAUSAL_LM",
            ),
        )
        if checkpoint:
            model.load_adapter(str(checkpoint), "default", is_trainable=True, torch_device=str(machine.device))
        train_few_rows_only(model)
    if machine.on_gpu:
        model.enable_input_require_grads()
    return model


def _train_whatever_happens(
    config: SftConfig, context: "JobContext", rows: Rows, machine: Machine, base_folder: Path, restored: "Restored | None"
) -> tuple[Any, TrainingState]:
    """The trained model; when memory runs out the batch gets smaller, and the training goes on from what was saved."""
    knobs = config.hyperparameters
    asked = BatchPlan(knobs.batch_size, knobs.gradient_accumulation_steps)
    policy = SavePolicy(knobs.save_strategy, knobs.save_steps)
    healed = 0
    smaller: BatchPlan | None = None
    while True:
        state = _state_in(restored, asked, smaller)
        context.findings.base_metrics = context.findings.base_metrics or state.base_metrics
        course = Course(context, policy, state, total_steps=_total_steps(config, rows))
        try:
            return _train_on(config, context, rows, machine, base_folder, restored, course), course.state
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # The error is gone here, and with it the last that held the model.
        plan = BatchPlan(state.batch_size, state.gradient_accumulation_steps)
        smaller = plan_with_less_memory(plan, course.step + 1, healed)
        healed += 1
        same = f"{smaller.gradient_accumulation_steps} batches of {smaller.batch_size} make the same step"
        why = f"memory ran out in step {course.step + 1} with {plan}; {same}"
        context.decided("batch_size", str(smaller.batch_size), why)
        free_memory()
        context.checkpoints.settle()
        restored = context.checkpoints.newest()


def _state_in(restored: "Restored | None", asked: BatchPlan, smaller: BatchPlan | None) -> TrainingState:
    """Where to go on, and with which batch: the one that this attempt came down to, or an earlier one did, or that was asked for."""
    state = TrainingState.read(restored.folder) if restored else None
    plan = smaller or (asked.if_it_fits(BatchPlan(state.batch_size, state.gradient_accumulation_steps)) if state else asked)
    batch = {"batch_size": plan.batch_size, "gradient_accumulation_steps": plan.gradient_accumulation_steps}
    return state.model_copy(update=batch) if state else TrainingState.model_validate(batch)


def _total_steps(config: SftConfig, rows: Rows) -> int:
    """Optimizer steps of the whole training, as transformers' trainer counts them."""
    knobs = config.hyperparameters
    if knobs.max_steps > 0:
        return knobs.max_steps
    return knobs.epochs * math.ceil(len(rows.blocks) / (knobs.batch_size * knobs.gradient_accumulation_steps))


def _train_on(
    config: SftConfig,
    context: "JobContext",
    rows: Rows,
    machine: Machine,
    base_folder: Path,
    restored: "Restored | None",
    course: Course,
) -> Any:
    """Train from the base or from what was restored until the course ends. Returns the model; raises Stopped."""
    folder = restored.folder if restored else None
    model = _build(config, rows, machine, base_folder, folder)
    if rows.held_out and (restored is None or course.evaluation_is_due):
        context.phase("evaluating")
        if restored is None and context.findings.base_metrics is None:
            context.evaluated("before", 0, _measure(model, rows, machine, config, context.check))
        if course.evaluation_is_due:
            course.evaluate(lambda _: _measure(model, rows, machine, config, context.check))
    context.phase("training")
    course.checkpoint_bytes = ADAM_COPIES * sum(part.nbytes for part in model.parameters() if part.requires_grad)
    with context.stop.politely():
        if not course.is_done:
            trainer = _trainer(config, context, rows, machine, model, course, folder)
            trainer.train(resume_from_checkpoint=str(folder) if folder else None)
            refuse_broken(model, course.step)
        course.end()
    return model


def _trainer(
    config: SftConfig, context: "JobContext", rows: Rows, machine: Machine, model: Any, course: Course, restored: Path | None
) -> Any:
    """Transformers' trainer, with our loss, our measurements and our checkpoints."""
    import torch
    from transformers import PrinterCallback, TrainerCallback, TrainingArguments
    from transformers import Trainer as HfTrainer

    knobs = config.hyperparameters
    plan = course.plan
    arguments = TrainingArguments(
        output_dir=str(context.workdir / "checkpoints"),
        learning_rate=knobs.learning_rate,
        per_device_train_batch_size=plan.batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        num_train_epochs=knobs.epochs,
        max_steps=knobs.max_steps,
        lr_scheduler_type=knobs.lr_scheduler_type,
        warmup_steps=knobs.warmup_ratio,  # below 1 it is a share of all steps
        weight_decay=knobs.weight_decay,
        max_grad_norm=knobs.max_grad_norm,
        seed=knobs.seed,
        save_strategy="no",  # the course says when
        logging_steps=knobs.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy=config.eval_config.eval_strategy if rows.held_out else "no",
        eval_steps=config.eval_config.eval_steps,
        bf16=machine.autocast,
        activation_checkpointing=machine.on_gpu,
        use_cpu=not machine.on_gpu,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=machine.on_gpu,
    )

    class Trainer(HfTrainer):
        """Transformers' trainer with the loss at labelled positions, our measurements, and checkpoints that are handed over."""

        step_loss: Any = 0.0  # of the optimizer step at work, over its micro-batches

        def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            course.tokens_seen += inputs.pop("real_tokens")
            labels = inputs.pop("labels")
            logits, wanted = labelled_logits(model, inputs, labels)
            loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum") / (num_items_in_batch or wanted.numel())
            self.step_loss = self.step_loss + loss.detach()
            return (loss, None) if return_outputs else loss

        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            self.control.should_evaluate = False
            found = course.evaluate(lambda pulse: _measure(model, rows, machine, config, pulse))
            if found is None:
                self.control.should_save = self.control.should_training_stop = True
            return {"eval_loss": math.nan if found is None or found.eval_loss is None else found.eval_loss}

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            self.model.save_pretrained(output_dir)  # no tokenizer, 33 MB of it, and no pickled arguments: nobody reads them

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            refuse_broken(model, course.step)
            folder = Path(arguments.output_dir or "", f"checkpoint-{course.step}")
            course.save(folder, self.state.epoch or 0.0, lambda: super(Trainer, self)._save_checkpoint(model, trial))

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            """The model was built with these weights."""

    class Report(TrainerCallback):
        """Tells the course what happens, tells the library what the course says, and the world how it goes."""

        def __init__(self) -> None:
            self.last, self.last_tokens = time.monotonic(), course.tokens_seen

        def on_train_begin(self, args: Any, state: Any, control: Any, **found: Any) -> None:
            state.compute_steps(args, state.max_steps)  # what was saved may be of another plan
            follow_schedule(found["lr_scheduler"])
            self.last = time.monotonic()
            course.begin()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if restored and restored.exists():
                shutil.rmtree(restored, ignore_errors=True)  # read by now, and as large as the next one; a container's disk is its memory
            course.step_begins()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            loss, trainer.step_loss = float(trainer.step_loss), 0.0
            course.step_done(state.global_step, loss)
            context.progress(self.progress())
            if not (state.epoch.is_integer() or course.is_done):  # at an epoch's end the measurements come first
                self.decide(control, epoch_ended=False)

        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if course.stopping:
                control.should_evaluate = False
            else:
                self.decide(control, epoch_ended=True)

        def decide(self, control: Any, *, epoch_ended: bool) -> None:
            if not course.is_done and course.must_end():
                control.should_training_stop = True
            control.should_save = course.must_save(epoch_ended=epoch_ended)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            state.log_history.clear()  # it would be in every checkpoint, and nobody reads it
            if not logs or "loss" not in logs:
                return
            now = time.monotonic()
            speed = (course.tokens_seen - self.last_tokens) / max(now - self.last, 1e-9)
            self.last, self.last_tokens = now, course.tokens_seen
            told = {"loss": course.logged_loss()} | {name: logs[name] for name in ("learning_rate", "grad_norm") if name in logs}
            values = {name: value if math.isfinite(value) else None for name, value in told.items()}
            notes = {name: f"it is {told[name]}" for name, value in values.items() if value is None}
            values |= {"tokens_per_second": speed} | memory()
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

    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows.blocks,  # type: ignore[arg-type]  # any sequence of things that the collator knows
        eval_dataset=rows.held_out or None,  # type: ignore[arg-type]
        # FlashAttention tells packed rows apart in a single sequence only: for it a batch is one long block.
        data_collator=lambda batch: collate([list(chain(*batch))] if knobs.packing and knobs.use_fa2 else batch, rows.pad_id),
        processing_class=rows.tokenizer,
        callbacks=[Report()],
    )
    trainer.remove_callback(PrinterCallback)  # its losses are not ours
    trainer.model_accepts_loss_kwargs = True  # the loss is divided by all labels of an optimizer step, not by micro-batch
    return trainer


def follow_schedule(scheduler: Any) -> None:
    """Let the next step have the learning rate that the schedule has for it now: more epochs make it another one than was saved."""
    rates = [base * factor(scheduler.last_epoch) for factor, base in zip(scheduler.lr_lambdas, scheduler.base_lrs, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def _measure(model: Any, rows: Rows, machine: Machine, config: SftConfig, pulse: Callable[[], None]) -> EvalMetrics:
    import torch

    with torch.autocast(machine.device.type, torch.bfloat16, enabled=machine.autocast):
        return measure(model, rows.held_out, rows.pad_id, config, pulse)


def labelled_logits(model: Any, inputs: dict[str, Any], labels: Any) -> tuple[Any, Any]:
    """Logits (N, vocabulary) in fp32 and tokens (N) at the N labelled positions of a batch (B, T).

    The position before a label predicts it. The model computes logits where any row of the batch has one.
    """
    wanted = labels[:, 1:]
    columns = (wanted != NO_LABEL).any(dim=0).nonzero().squeeze(1)
    logits = model(**inputs, logits_to_keep=columns, use_cache=False).logits
    wanted = wanted[:, columns]
    keep = wanted != NO_LABEL
    return logits[keep].float(), wanted[keep]


def measure(model: Any, rows: list[TokenRow], pad_id: int, config: SftConfig, pulse: Callable[[], None] = lambda: None) -> EvalMetrics:
    """The model on held-out rows: every labelled token counts the same. `pulse` is called before each batch, and may raise.

    When memory runs out, here and not in training, fewer rows are measured at once. Raises JobFailed when a single one is too many.
    """
    began = time.monotonic()
    was_training = model.training
    model.eval()
    batches: list[Measured] = []
    size = config.hyperparameters.batch_size
    by_length = sorted(rows, key=lambda row: len(row.input_ids))  # little padding; the sums do not mind the order
    done = 0
    try:
        while done < len(by_length):
            pulse()
            found = _measured_if_it_fits(model, by_length[done : done + size], pad_id, config)
            if found:
                batches.append(found)
                done += size
            elif size == 1:
                hint = "lower max_seq_length, or ask for hardware with more memory"
                raise JobFailed("out_of_memory", "memory ran out while a single held-out row was measured", hint)
            else:
                size //= 2
                free_memory()
    finally:
        model.train(was_training)
    tokens = sum(batch.tokens for batch in batches)
    mean = sum(batch.loss for batch in batches) / tokens
    right = sum(batch.count_right() for batch in batches)
    finite = math.isfinite(mean)
    return EvalMetrics(
        eval_loss=mean if finite else None,
        perplexity=math.exp(mean) if finite and mean < 700 else None,  # e^710 is no double
        accuracy=right / tokens if config.eval_config.compute_eval_metrics else None,
        eval_runtime=time.monotonic() - began,
        eval_rows=len(rows),
        eval_tokens=tokens,
        notes={} if finite else {"eval_loss": "not a number", "perplexity": "the loss is not a number"},
    )


@dataclass(frozen=True)
class Measured:
    """What a batch of held-out rows came to."""

    loss: float  # the sum over its labels
    tokens: int
    right: int = 0
    gathered: tuple[Any, Any] | None = None  # what was said and what was wanted, counted at the end

    def count_right(self) -> int:
        """Labels that were predicted."""
        return self.right if self.gathered is None else int((self.gathered[0] == self.gathered[1]).sum())


def _measured_if_it_fits(model: Any, rows: list[TokenRow], pad_id: int, config: SftConfig) -> Measured | None:
    """A batch of held-out rows; None when there is not enough memory for it."""
    import torch

    batch = collate([[row] for row in rows], pad_id)
    batch.pop("real_tokens")
    try:
        with torch.no_grad():
            labels = batch.pop("labels").to(model.device)
            logits, wanted = labelled_logits(model, {name: part.to(model.device) for name, part in batch.items()}, labels)
            loss, tokens = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item(), wanted.numel()
            if config.eval_config.batch_eval_metrics:
                return Measured(loss, tokens, right=int((logits.argmax(-1) == wanted).sum()))
            if config.eval_config.compute_eval_metrics:
                return Measured(loss, tokens, gathered=(logits.argmax(-1).cpu(), wanted.cpu()))
            return Measured(loss, tokens)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def collate(blocks: list[list[TokenRow]], pad_id: int) -> dict[str, Any]:
    """Blocks of rows as tensors (B, T). In a block of several rows positions begin anew with each row, and no mask is given:
    that is how attention knows where a row begins. The first token of a row is never a label, for nothing before it is its own."""
    import torch

    longest = max(sum(len(row.input_ids) for row in block) for block in blocks)
    packed = any(len(block) > 1 for block in blocks)
    ids = torch.full((len(blocks), longest), pad_id)
    labels = torch.full_like(ids, NO_LABEL)
    mask = torch.zeros_like(ids)
    positions = torch.zeros_like(ids)
    for n, block in enumerate(blocks):
        place = 0
        for row in block:
            until = place + len(row.input_ids)
            ids[n, place:until] = torch.tensor(row.input_ids)
            labels[n, place + 1 : until] = torch.tensor(row.labels[1:])
            positions[n, place:until] = torch.arange(len(row.input_ids))
            mask[n, place:until] = 1
            place = until
        positions[n, place:] = torch.arange(longest - place)  # padding is a row of its own, which nothing learns from
    real = int(mask.sum())
    shape = {"position_ids": positions} if packed else {"attention_mask": mask}
    return {"input_ids": ids, "labels": labels, "real_tokens": real, **shape}


def refuse_broken(model: Any, step: int) -> None:
    """The last update has no loss after it that would show what it did. Raises JobFailed when a trained weight is no number."""
    if not all(bool(part.isfinite().all()) for part in model.parameters() if part.requires_grad):
        raise diverged(f"the weights are no numbers any more after step {step}")


def memory() -> dict[str, float]:
    """Bytes that this process holds, and that it holds on the GPU."""
    import psutil
    import torch

    found = {"rss_bytes": float(psutil.Process().memory_info().rss)}
    if torch.cuda.is_available():
        found["gpu_memory_bytes"] = float(torch.cuda.max_memory_allocated())
    return found


def _packed(rows: list[TokenRow], length: int) -> list[list[TokenRow]]:
    """Rows in blocks of at most `length` tokens, by best fit, longest first."""
    from bisect import bisect_left, insort

    free: list[tuple[int, int]] = []  # (tokens left, block), ascending
    blocks: list[list[TokenRow]] = []
    for row in sorted(rows, key=lambda row: -len(row.input_ids)):
        size = len(row.input_ids)
        best = bisect_left(free, (size, -1))
        left, block = free.pop(best) if best < len(free) else (length, len(blocks))
        if block == len(blocks):
            blocks.append([])
        blocks[block].append(row)
        insort(free, (left - size, block))
    return blocks


def _tell_losses(context: "JobContext", split: str, found: Rendered, max_seq_length: int) -> None:
    if found.cut:
        context.warn("rows_cut", f"{found.cut} rows of {split} are longer than max_seq_length {max_seq_length} and were cut")
    if found.dropped:
        context.warn("rows_dropped", f"{found.dropped} rows of {split} have nothing to learn within max_seq_length and were left out")
