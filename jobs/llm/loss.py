"""How likely a model finds what it is to say: the loss at labelled positions, and the same measured on held-out rows.

The head is computed at labelled positions only: a vocabulary of 262,144 makes it the dearest layer, and most positions of a
conversation are not learned. In training it is computed for some of them at a time, so that their logits never fill the memory.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jobs.llm.data.tokenize import IGNORE_INDEX, TokenizedExample
from jobs.llm.oom import free_memory, is_out_of_memory
from jobs.runtime.errors import JobFailed
from schema.job import EvalMetrics
from schema.training import TrainingConfig

# Of logits in fp32 that are there at once, with about three times as much beside them: enough for products to be fast.
LOGITS_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}


class ChunkedLmHeadLoss:
    """The loss of a language model at the labelled positions of a batch: its head is computed there alone, some positions at a time.

    What the layers made is taken where it goes into the head, inside the model's own forward, so that what wraps the model (an adapter,
    autocast, torch.compile) stays around it. A part's gradient is made as soon as its loss is known: no logits wait for the way back,
    and none are computed twice. A model that does more to its logits than a soft cap is found out at the first batch, and keeps them.
    """

    def __init__(self, model: Any) -> None:
        import torch

        self._model = model
        self._head = model.get_output_embeddings()
        self._softcap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self._head_parameters: list[Any] = []  # the trained weights that the head multiplies by
        self._chunk_positions = 0  # positions; 0 until the first batch
        self._probe_logits: Any = None  # what we make of its first position
        self._is_chunkable = True  # the head and the soft cap are all that the model does
        self._pending_loss_args: tuple[Any, Any, Any] | None = None
        self._loss: Any = None
        self._head.register_forward_pre_hook(torch.compiler.disable(self._lm_head_pre_hook))

    def compute_loss(self, model: Any, inputs: dict[str, Any], labels: Any, divisor: Any = None) -> Any:
        """The sum over the labels of a batch (B, T), divided by their number or by what is given. `model` is ours, or wraps it."""
        import torch

        keep = labels[:, 1:] != IGNORE_INDEX  # the position before a label predicts it
        wanted = labels[:, 1:][keep]
        divisor = divisor or wanted.numel()
        if self._is_chunkable:
            is_first = not self._chunk_positions
            told, loss = self._forward(model, inputs, (keep, wanted, divisor))
            if is_first:
                self._is_chunkable = loss is not None and torch.allclose(told.float(), self._probe_logits.float(), rtol=1e-2, atol=1e-5)
            if self._is_chunkable:
                return loss
        logits, wanted = compute_labeled_logits(model, inputs, labels)
        return torch.nn.functional.cross_entropy(logits, wanted, reduction="sum") / divisor

    def _forward(self, model: Any, inputs: dict[str, Any], loss_args: tuple[Any, Any, Any]) -> tuple[Any, Any]:
        """The model's own logits of the first labelled position, and the loss of all; None where the model passed its head by."""
        self._pending_loss_args, self._loss = loss_args, None
        try:
            told = model(**inputs, use_cache=False).logits
        finally:
            self._pending_loss_args = None
        loss, self._loss = self._loss, None
        return told, loss

    def _lm_head_pre_hook(self, _: Any, states: tuple[Any, ...]) -> tuple[Any] | None:
        """Before the head: make the loss of what goes into it (B, T, H), and let a single position pass, the first labelled one."""
        import torch

        if self._pending_loss_args is None:
            return None
        (keep, wanted, divisor), self._pending_loss_args = self._pending_loss_args, None  # the head is called from here, too
        chosen = states[0][:, :-1][keep]
        probe = (chosen if len(chosen) else states[0][0])[:1]  # a batch that teaches nothing shows what the model does as well
        if not self._chunk_positions:
            self._probe_head(probe)
        weights = self._head_parameters if torch.is_grad_enabled() else []
        self._loss = _chunked_loss_class().apply(chosen, wanted, self._compute_logits, self._chunk_positions, divisor, *weights)
        return (probe.detach(),)

    def _probe_head(self, states: Any) -> None:
        """What the head makes of a position, and which trained weights it needs for that."""
        import torch

        trained = [part for part in self._model.parameters() if part.requires_grad]
        with torch.enable_grad():
            logits = self._compute_logits(states.detach())
            found = torch.autograd.grad(logits.sum(), trained, allow_unused=True) if logits.requires_grad else [None] * len(trained)
        self._head_parameters = [part for part, slope in zip(trained, found, strict=True) if slope is not None]
        self._probe_logits = logits.detach()
        self._chunk_positions = max(1, LOGITS_CHUNK_BYTES[states.device.type] // (4 * logits.shape[-1]))

    def _compute_logits(self, states: Any) -> Any:
        import torch

        logits = self._head(states)
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap


@cache
def _chunked_loss_class() -> Any:
    """What torch's autograd applies to states (N, H), tokens (N), the way from states to logits, how many at once, a divisor, and the
    trained weights on that way."""
    import torch

    class ChunkedLoss(torch.autograd.Function):
        """The sum of the loss over the divisor; its gradients are made on the way there."""

        @staticmethod
        def forward(ctx: Any, states: Any, wanted: Any, logits_of: Any, at_once: int, divisor: Any, *weights: Any) -> Any:
            learns = any(ctx.needs_input_grad)
            loss = torch.zeros((), device=states.device)
            by_states, *by_weights = [torch.zeros_like(part) for part in (states, *weights)] if learns else [None]
            for start in range(0, len(states), at_once):
                place = slice(start, start + at_once)
                with torch.set_grad_enabled(learns):
                    chosen = states[place].detach().requires_grad_(learns)
                    logits = logits_of(chosen)
                tokens = wanted[place].unsqueeze(1)
                likely = torch.log_softmax(logits.detach(), -1, dtype=torch.float32)
                loss -= likely.gather(1, tokens).sum()
                if by_states is not None:
                    slope = likely.exp_().scatter_add_(1, tokens, likely.new_full(tokens.shape, -1)).div_(divisor)
                    by_states[place], *more = torch.autograd.grad(logits, (chosen, *weights), slope.to(logits.dtype))
                    for total, part in zip(by_weights, more, strict=True):
                        total += part
            if by_states is not None:
                ctx.save_for_backward(by_states, *by_weights)
            return loss / divisor

        @staticmethod
        def backward(ctx: Any, scale: Any) -> Any:
            by_states, *by_weights = (slope * scale for slope in ctx.saved_tensors)
            return (by_states, None, None, None, None, *by_weights)

    return ChunkedLoss


def compute_labeled_logits(model: Any, inputs: dict[str, Any], labels: Any) -> tuple[Any, Any]:
    """Logits (N, vocabulary) in fp32 and tokens (N) at the N labelled positions of a batch (B, T).

    The position before a label predicts it. The model computes logits where any row of the batch has one.
    """
    wanted = labels[:, 1:]
    columns = (wanted != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)
    logits = model(**inputs, logits_to_keep=columns, use_cache=False).logits
    wanted = wanted[:, columns]
    keep = wanted != IGNORE_INDEX
    return logits[keep].float(), wanted[keep]


def evaluate_likelihood(
    model: Any,
    rows: Sequence[TokenizedExample],
    pad_id: int,
    config: TrainingConfig,
    check_stop: Callable[[], None] = lambda: None,
    collate_fn: Callable[[Sequence[Any]], dict[str, Any]] | None = None,
) -> EvalMetrics:
    """The model on held-out rows: every labelled token counts the same. `pulse` is called before each batch, and may raise.

    `collator` makes batches of rows that are more than tokens: what `collate` makes of a row each, and what the model takes beside it.

    When memory runs out, here and not in training, fewer rows are measured at once. Raises JobFailed when a single one is too many.
    """
    began = time.monotonic()
    was_training = model.training
    model.eval()
    batch_of = collate_fn or (lambda some: collate([[row] for row in some], pad_id))
    batches: list[BatchEvaluation] = []
    size = config.hyperparameters.batch_size
    by_length = sorted(rows, key=lambda row: len(row.input_ids))  # little padding; the sums do not mind the order
    done = 0
    try:
        while done < len(by_length):
            check_stop()
            found = _evaluate_batch_or_none(model, batch_of(by_length[done : done + size]), config)
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
    right = sum(batch.count_correct() for batch in batches)
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
class BatchEvaluation:
    """What a batch of held-out rows came to."""

    loss: float  # the sum over its labels
    tokens: int
    correct: int = 0
    predictions_and_labels: tuple[Any, Any] | None = None  # what was said and what was wanted, counted at the end

    def count_correct(self) -> int:
        """Labels that were predicted."""
        return (
            self.correct
            if self.predictions_and_labels is None
            else int((self.predictions_and_labels[0] == self.predictions_and_labels[1]).sum())
        )


def _evaluate_batch_or_none(model: Any, batch: dict[str, Any], config: TrainingConfig) -> BatchEvaluation | None:
    """A batch of held-out rows; None when there is not enough memory for it."""
    import torch

    batch.pop("non_padding_tokens")
    try:
        with torch.no_grad():
            labels = batch.pop("labels").to(model.device)
            logits, wanted = compute_labeled_logits(model, {name: part.to(model.device) for name, part in batch.items()}, labels)
            loss, tokens = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item(), wanted.numel()
            if config.eval_config.batch_eval_metrics:
                return BatchEvaluation(loss, tokens, correct=int((logits.argmax(-1) == wanted).sum()))
            if config.eval_config.compute_eval_metrics:
                return BatchEvaluation(loss, tokens, predictions_and_labels=(logits.argmax(-1).cpu(), wanted.cpu()))
            return BatchEvaluation(loss, tokens)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def collate(blocks: list[list[TokenizedExample]], pad_id: int) -> dict[str, Any]:
    """Blocks of rows as tensors (B, T). In a block of several rows positions begin anew with each row, and no mask is given:
    that is how attention knows where a row begins. The first token of a row is never a label, for nothing before it is its own."""
    import torch

    longest = max(sum(len(row.input_ids) for row in block) for block in blocks)
    packed = any(len(block) > 1 for block in blocks)
    ids = torch.full((len(blocks), longest), pad_id)
    labels = torch.full_like(ids, IGNORE_INDEX)
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
    return {"input_ids": ids, "labels": labels, "non_padding_tokens": real, **shape}
