"""Supervised fine-tuning: learn to say what the rows say.

    1. the base model, on the device and in the precision that this machine does well
    2. rows to tokens and labels
    3. LoRA, or all weights
    4. measure the base, train, measure again
    5. save

The loss is computed at labelled positions only: a vocabulary of 262,144 makes the head the dearest layer, and most positions of
a conversation are not learned.
"""

import math
import time
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from jobs.base_model import fetch_base
from jobs.data.render import NO_LABEL, Rendered, TokenRow, read_rows, render, use_chat_template
from jobs.errors import JobFailed
from jobs.probe import fast_bf16
from jobs.trained import Probe, TrainedModel
from jobs.turn_tokens import train_few_rows_only
from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT
from schema.job import EvalMetrics, Progress
from schema.training import SftConfig

if TYPE_CHECKING:
    from jobs.context import JobContext

TURN_TOKENS = ["<start_of_turn>", "<end_of_turn>"]
PROBES = 16
CHECKPOINTS_KEPT = 2


def train(config: SftConfig, context: "JobContext") -> TrainedModel:
    """Train as the config says, and leave the model in the attempt's folder. Raises JobFailed."""
    context.phase("downloading")
    base_folder = fetch_base(context)
    splits = {
        name: context.stores.datasets.download(split.key, context.workdir / "data" / f"{name}.jsonl")
        for name, split in context.spec.dataset.splits.items()
    }

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments, set_seed
    from transformers import Trainer as HfTrainer

    if config.method == "QLoRA" or config.provider != "huggingface" or config.modality != "text":
        raise JobFailed("invalid_config", "this image trains text with provider huggingface and method LoRA or Full")
    knobs = config.hyperparameters
    set_seed(knobs.seed)

    # --- rows ---
    context.phase("tokenizing")
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    template_is_ours = use_chat_template(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    pad_id = int(tokenizer.pad_token_id or 0)
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

    # --- device and precision ---
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    context.decided("device", str(device), torch.cuda.get_device_name() if on_gpu else "no GPU was found")
    bf16 = torch.cuda.is_bf16_supported() if on_gpu else fast_bf16()
    lora = config.method == "LoRA"
    # Full fine-tuning in pure bf16 loses small updates; with fp32 weights autocast does the products in bf16.
    dtype = torch.bfloat16 if bf16 and lora else torch.float32
    autocast = bf16 and not lora and on_gpu
    why = "the processor multiplies bf16 fast" if bf16 else "the processor is slow at bf16"
    context.decided("dtype", str(dtype).removeprefix("torch."), why if lora else "all weights are trained: small updates need fp32")
    attention = "flash_attention_2" if knobs.use_fa2 else "sdpa"
    try:
        model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype, attn_implementation=attention, trust_remote_code=False)
    except ImportError as error:
        raise JobFailed(
            "invalid_config", "use_fa2 needs the flash-attn package and an Ampere or newer GPU", "set use_fa2 to false"
        ) from error
    model.to(device)
    model.config.use_cache = False
    end_of_turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    if end_of_turn not in (None, tokenizer.unk_token_id):
        model.generation_config.eos_token_id = sorted({tokenizer.eos_token_id, end_of_turn})

    # --- what is trained ---
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
                trainable_token_indices=new_tokens or None,
                task_type="CAUSAL_LM",
            ),
        )
        train_few_rows_only(model)
    # Recomputing activations costs a third of the speed; on a GPU memory is what runs out first.
    checkpointing = on_gpu
    if checkpointing:
        model.enable_input_require_grads()
    context.decided(
        "gradient_checkpointing", str(checkpointing).lower(), "memory is dearer than time on a GPU" if on_gpu else "memory suffices"
    )

    arguments = TrainingArguments(
        output_dir=str(context.workdir / "checkpoints"),
        learning_rate=knobs.learning_rate,
        per_device_train_batch_size=knobs.batch_size,
        per_device_eval_batch_size=knobs.batch_size,
        gradient_accumulation_steps=knobs.gradient_accumulation_steps,
        num_train_epochs=knobs.epochs,
        max_steps=knobs.max_steps,
        lr_scheduler_type=knobs.lr_scheduler_type,
        warmup_steps=knobs.warmup_ratio,  # below 1 it is a share of all steps
        weight_decay=knobs.weight_decay,
        max_grad_norm=knobs.max_grad_norm,
        seed=knobs.seed,
        save_strategy=knobs.save_strategy,
        save_steps=knobs.save_steps,
        save_total_limit=CHECKPOINTS_KEPT,
        logging_steps=knobs.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy=config.eval_config.eval_strategy if eval_rows else "no",
        eval_steps=config.eval_config.eval_steps,
        bf16=autocast,
        activation_checkpointing=checkpointing,
        use_cpu=not on_gpu,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
    )

    def measure_now() -> EvalMetrics:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return measure(model, eval_rows, pad_id, config)

    class Trainer(HfTrainer):
        """Transformers' trainer with the loss at labelled positions, and our measurements."""

        tokens_seen = 0
        step_loss: Any = 0.0  # of the optimizer step at work, over its micro-batches
        measured: ClassVar[dict[int, EvalMetrics]] = {}  # by step: the end of an epoch is often an evaluation step as well

        def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            self.tokens_seen += inputs.pop("real_tokens")
            labels = inputs.pop("labels")
            logits, wanted = labelled_logits(model, inputs, labels)
            loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum") / (num_items_in_batch or wanted.numel())
            self.step_loss = self.step_loss + loss.detach()
            return (loss, None) if return_outputs else loss

        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            step = self.state.global_step
            if step not in self.measured:
                self.measured[step] = measure_now()
                context.evaluated("during", step, self.measured[step])
            found = self.measured[step].eval_loss
            return {"eval_loss": math.nan if found is None else found}

    class Report(TrainerCallback):
        """Tells the world how the training goes, and stops it when asked."""

        def __init__(self) -> None:
            self.began = self.last = time.monotonic()
            self.last_tokens = 0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            context.check()
            loss, trainer.step_loss = float(trainer.step_loss), 0.0
            if not math.isfinite(loss):
                raise diverged(f"the loss is no number any more at step {trainer.state.global_step}")
            context.progress(self.progress())

        def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            context.checkpoint_saved(Path(args.output_dir, f"checkpoint-{state.global_step}"), state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if not logs or "loss" not in logs:
                return
            now = time.monotonic()
            speed = (trainer.tokens_seen - self.last_tokens) / max(now - self.last, 1e-9)
            self.last, self.last_tokens = now, trainer.tokens_seen
            told = {name: logs[name] for name in ("loss", "learning_rate", "grad_norm") if name in logs}
            values = {name: value if math.isfinite(value) else None for name, value in told.items()}
            notes = {name: f"it is {told[name]}" for name, value in values.items() if value is None}
            values |= {"tokens_per_second": speed} | memory()
            context.metrics(state.global_step, values, epoch=state.epoch, notes=notes, progress=self.progress())

        def progress(self) -> Progress:
            state = trainer.state
            done = state.global_step / max(state.max_steps, 1)
            eta = (time.monotonic() - self.began) * (1 / done - 1) if done else None
            return Progress(
                step=state.global_step,
                total_steps=state.max_steps,
                epoch=state.epoch or 0.0,
                total_epochs=float(state.num_train_epochs),
                eta_s=eta,
            )

    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=blocks,  # type: ignore[arg-type]  # any sequence of things that the collator knows
        eval_dataset=eval_rows or None,  # type: ignore[arg-type]
        # FlashAttention tells packed rows apart in a single sequence only: for it a batch is one long block.
        data_collator=lambda batch: collate([list(chain(*batch))] if knobs.packing and knobs.use_fa2 else batch, pad_id),
        processing_class=tokenizer,
        callbacks=[report := Report()],
    )
    trainer.model_accepts_loss_kwargs = True  # the loss is divided by all labels of an optimizer step, not by micro-batch

    # --- measure, train, measure ---
    base_metrics = metrics = None
    if eval_rows:
        context.phase("evaluating")
        base_metrics = measure_now()
        context.evaluated("before", 0, base_metrics)
    context.phase("training")
    report.began = report.last = began = time.monotonic()
    trainer.train()
    runtime_s = time.monotonic() - began
    refuse_broken(model, trainer.state.global_step)
    if eval_rows:
        context.phase("evaluating")
        step = trainer.state.global_step
        metrics = trainer.measured.get(step) or measure_now()
        context.evaluated("after", step, metrics)

    # --- save ---
    folder = context.workdir / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if not lora:
        model.generation_config.save_pretrained(folder)
    probes = [Probe(row.prompt_text, tuple(row.input_ids), row.prompt_tokens) for row in islice(eval_rows or train_rows, PROBES)]
    return TrainedModel(folder, lora, base_folder, tuple(probes), metrics, base_metrics, len(train_rows), trainer.tokens_seen, runtime_s)


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


def measure(model: Any, rows: list[TokenRow], pad_id: int, config: SftConfig) -> EvalMetrics:
    """The model on held-out rows: every labelled token counts the same."""
    import torch

    began = time.monotonic()
    was_training = model.training
    model.eval()
    loss, tokens, right = 0.0, 0, 0
    gathered: list[Any] = []
    size = config.hyperparameters.batch_size
    by_length = sorted(rows, key=lambda row: len(row.input_ids))  # little padding; the sums do not mind the order
    with torch.no_grad():
        for start in range(0, len(by_length), size):
            batch = collate([[row] for row in by_length[start : start + size]], pad_id)
            batch.pop("real_tokens")
            labels = batch.pop("labels").to(model.device)
            logits, wanted = labelled_logits(model, {name: part.to(model.device) for name, part in batch.items()}, labels)
            loss += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
            tokens += wanted.numel()
            if config.eval_config.batch_eval_metrics:
                right += int((logits.argmax(-1) == wanted).sum())
            elif config.eval_config.compute_eval_metrics:
                gathered.append((logits.argmax(-1).cpu(), wanted.cpu()))
    model.train(was_training)
    right += sum(int((found == wanted).sum()) for found, wanted in gathered)
    mean = loss / tokens
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


def diverged(message: str) -> JobFailed:
    """A training that has lost its numbers: going on would only cost."""
    return JobFailed("invalid_config", message, "lower learning_rate, or raise warmup_ratio")


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
