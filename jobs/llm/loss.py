"""The loss of a language model at the labeled positions, in training and in evaluation.

The LM head is computed at labeled positions only: a vocabulary of 262,144 makes it the most expensive layer, and most positions of a
conversation have no label. In training it is computed for a chunk of positions at a time, so that the logits never fill the memory.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jobs.llm.data.tokenize import IGNORE_INDEX, TokenizedExample
from jobs.llm.oom import run_in_batches
from jobs.llm.turn_ends import TurnEnds
from schema.job import EvalMetrics
from schema.training import TrainingConfig

# Size of a chunk's logits in fp32; about three times as much is allocated beside them. Large enough for fast matrix products.
LOGITS_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}


class ChunkedLmHeadLoss:
    """The cross entropy at the labeled positions of a batch, with the LM head computed for a chunk of positions at a time.

    A forward pre-hook of the head takes the hidden states inside the model's own forward, so that wrappers of the model (an adapter,
    autocast, torch.compile) stay in effect. A chunk's gradient is computed right after its loss: no logits are kept for the backward
    pass, and none are computed twice. The first batch detects a model that does more to its logits than a soft cap; such a model
    computes all its logits at once.
    """

    def __init__(self, model: Any) -> None:
        import torch

        self._model = model
        self._head = model.get_output_embeddings()
        self._softcap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self._head_parameters: list[Any] = []  # the trainable weights that the logits depend on
        self._chunk_positions = 0  # positions per chunk; 0 until the first batch
        self._probe_logits: Any = None  # our logits of the first batch's first labeled position
        self._is_chunkable = True  # the model applies only the head and the soft cap
        self._pending_loss_args: tuple[Any, Any, Any] | None = None
        self._loss: Any = None
        self._head.register_forward_pre_hook(torch.compiler.disable(self._lm_head_pre_hook))

    def compute_loss(self, model: Any, inputs: dict[str, Any], labels: Any, divisor: Any = None) -> Any:
        """The loss summed over the labels of a batch (B, T), divided by their number or by `divisor`.

        `model` is the model of the constructor, or wraps it.
        """
        import torch

        keep = labels[:, 1:] != IGNORE_INDEX  # the position before a label predicts it
        targets = labels[:, 1:][keep]
        divisor = divisor or targets.numel()
        if self._is_chunkable:
            is_first = not self._chunk_positions
            logits, loss = self._forward(model, inputs, (keep, targets, divisor))
            if is_first:
                self._is_chunkable = loss is not None and torch.allclose(logits.float(), self._probe_logits.float(), rtol=1e-2, atol=1e-5)
            if self._is_chunkable:
                return loss
        logits, targets = compute_labeled_logits(model, inputs, labels)
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / divisor

    def _forward(self, model: Any, inputs: dict[str, Any], loss_args: tuple[Any, Any, Any]) -> tuple[Any, Any]:
        """The model's own logits of the first labeled position, and the loss of all positions; None if the model never called its head."""
        self._pending_loss_args, self._loss = loss_args, None
        try:
            logits = model(**inputs, use_cache=False).logits
        finally:
            self._pending_loss_args = None
        loss, self._loss = self._loss, None
        return logits, loss

    def _lm_head_pre_hook(self, _: Any, states: tuple[Any, ...]) -> tuple[Any] | None:
        """Compute the loss of the head's input (B, T, H), and pass only its first labeled position on to the head."""
        import torch

        if self._pending_loss_args is None:
            return None
        (keep, targets, divisor), self._pending_loss_args = self._pending_loss_args, None  # first: this method calls the head too
        labeled = states[0][:, :-1][keep]
        probe = (labeled if len(labeled) else states[0][0])[:1]  # a batch without labels needs a probe too
        if not self._chunk_positions:
            self._probe_head(probe)
        weights = self._head_parameters if torch.is_grad_enabled() else []
        self._loss = _chunked_loss_class().apply(labeled, targets, self._compute_logits, self._chunk_positions, divisor, *weights)
        return (probe.detach(),)

    def _probe_head(self, states: Any) -> None:
        """Compute the logits of one position, find the trainable weights that they depend on, and choose the chunk size."""
        import torch

        trained = [weight for weight in self._model.parameters() if weight.requires_grad]
        with torch.enable_grad():
            logits = self._compute_logits(states.detach())
            gradients = torch.autograd.grad(logits.sum(), trained, allow_unused=True) if logits.requires_grad else [None] * len(trained)
        self._head_parameters = [weight for weight, gradient in zip(trained, gradients, strict=True) if gradient is not None]
        self._probe_logits = logits.detach()
        self._chunk_positions = max(1, LOGITS_CHUNK_BYTES[states.device.type] // (4 * logits.shape[-1]))

    def _compute_logits(self, states: Any) -> Any:
        import torch

        logits = self._head(states)
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap


@cache
def _chunked_loss_class() -> Any:
    """The autograd function of ChunkedLmHeadLoss. A function, because importing this module must not import torch."""
    import torch

    class ChunkedLoss(torch.autograd.Function):
        """The cross entropy summed over positions, divided by `divisor`. The forward pass computes the gradients too.

        Takes hidden states (N, H), target tokens (N), the function from hidden states to logits, the positions per chunk, the divisor,
        and the trainable weights that the logits depend on.
        """

        @staticmethod
        def forward(ctx: Any, states: Any, targets: Any, compute_logits: Any, chunk_positions: int, divisor: Any, *weights: Any) -> Any:
            needs_gradients = any(ctx.needs_input_grad)
            loss = torch.zeros((), device=states.device)
            states_grad, *weight_grads = [torch.zeros_like(tensor) for tensor in (states, *weights)] if needs_gradients else [None]
            for start in range(0, len(states), chunk_positions):
                chunk = slice(start, start + chunk_positions)
                with torch.set_grad_enabled(needs_gradients):
                    chunk_states = states[chunk].detach().requires_grad_(needs_gradients)
                    logits = compute_logits(chunk_states)
                chunk_targets = targets[chunk].unsqueeze(1)
                log_probs = torch.log_softmax(logits.detach(), -1, dtype=torch.float32)
                loss -= log_probs.gather(1, chunk_targets).sum()
                if states_grad is not None:
                    # The gradient of the cross entropy: softmax minus one-hot, in place of the log-probabilities.
                    ones = log_probs.new_full(chunk_targets.shape, -1)
                    logits_grad = log_probs.exp_().scatter_add_(1, chunk_targets, ones).div_(divisor)
                    states_grad[chunk], *chunk_grads = torch.autograd.grad(logits, (chunk_states, *weights), logits_grad.to(logits.dtype))
                    for total, gradient in zip(weight_grads, chunk_grads, strict=True):
                        total += gradient
                    del ones, logits_grad, chunk_grads
                del logits, log_probs  # or they would be there beside those of the next chunk
            if states_grad is not None:
                ctx.save_for_backward(states_grad, *weight_grads)
            return loss / divisor

        @staticmethod
        def backward(ctx: Any, scale: Any) -> Any:
            states_grad, *weight_grads = (gradient * scale for gradient in ctx.saved_tensors)
            return (states_grad, None, None, None, None, *weight_grads)

    return ChunkedLoss


def compute_labeled_logits(model: Any, inputs: dict[str, Any], labels: Any) -> tuple[Any, Any]:
    """Logits (N, vocabulary) in fp32 and target tokens (N) at the N labeled positions of a batch (B, T).

    The position before a label predicts it. The model computes logits at every position where any row of the batch has a label.
    """
    targets = labels[:, 1:]
    columns = (targets != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)
    logits = model(**inputs, logits_to_keep=columns, use_cache=False).logits
    targets = targets[:, columns]
    keep = targets != IGNORE_INDEX
    return logits[keep].float(), targets[keep]


def compute_log_probs(
    model: Any,
    input_ids: Any,
    attention_mask: Any,
    completion_length: int,
    batch_size: int | None = None,
    *,
    temperature: float,
    compute_entropy: bool = False,
    **_: Any,
) -> tuple[Any, Any, None]:
    """The log-probability and the entropy of each completion token, (B, completion_length) each, with the signature that TRL calls.

    The completions are the last tokens of `input_ids` (B, T). The model computes `batch_size` rows at a time.
    """
    import torch

    labels = input_ids.masked_fill(attention_mask == 0, IGNORE_INDEX)
    labels[:, :-completion_length] = IGNORE_INDEX
    chunks: list[Any] = []
    tensors = (input_ids, attention_mask, labels)
    for ids, mask, chunk_labels in zip(*(tensor.split(batch_size or len(labels)) for tensor in tensors), strict=True):
        logits, targets = compute_labeled_logits(model, {"input_ids": ids, "attention_mask": mask}, chunk_labels)
        log_probs = (logits / temperature).log_softmax(-1)
        with torch.no_grad():
            entropy = -(log_probs.exp() * log_probs).sum(-1)
        is_target = chunk_labels[:, -completion_length:] != IGNORE_INDEX
        target_log_probs = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        # A scatter keeps the model in the graph when no completion counts: its gradient is zero instead of missing.
        chunks.append([values.new_zeros(is_target.shape).masked_scatter(is_target, values) for values in (target_log_probs, entropy)])
    log_probs, entropy = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return log_probs, entropy if compute_entropy else None, None


def evaluate_likelihood(
    model: Any,
    rows: Sequence[TokenizedExample],
    pad_id: int,
    config: TrainingConfig,
    turn_ends: TurnEnds,
    check_stop: Callable[[], None] = lambda: None,
    collate_fn: Callable[[Sequence[Any]], dict[str, Any]] | None = None,
) -> EvalMetrics:
    """Loss, perplexity and accuracy of the model on held-out rows. Every labeled token counts the same.

    `content_perplexity` leaves out the labels that end a turn, which a base model cannot expect and any training teaches.

    `check_stop` is called before each batch, and may raise. `collate_fn` makes the batches of multimodal rows: what `collate` makes, plus
    the model's other inputs. When memory runs out, batches get smaller. Raises JobFailed when memory runs out with a single row.
    """
    started_at = time.monotonic()
    was_training = model.training
    model.eval()
    make_batch = collate_fn or (lambda batch_rows: collate([[row] for row in batch_rows], pad_id))
    batches: list[BatchEvaluation] = []
    by_length = sorted(rows, key=lambda row: len(row.input_ids))  # little padding; sums do not depend on the order
    try:
        run_in_batches(
            by_length,
            config.hyperparameters.batch_size,
            lambda batch_rows: batches.append(_evaluate_batch(model, make_batch(batch_rows), config, turn_ends)),
            check_stop,
        )
    finally:
        model.train(was_training)
    tokens = sum(batch.tokens for batch in batches)
    mean_loss = sum(batch.loss for batch in batches) / tokens
    correct = sum(batch.count_correct() for batch in batches)
    content_tokens = sum(batch.content_tokens for batch in batches)
    content_loss = sum(batch.content_loss for batch in batches) / content_tokens if content_tokens else None
    is_finite = math.isfinite(mean_loss)
    notes = {} if is_finite else {"eval_loss": "not a finite number", "perplexity": "the loss is not a finite number"}
    if content_loss is None:
        notes["content_perplexity"] = "every label ends a turn"
    elif not math.isfinite(content_loss):
        notes["content_perplexity"] = "the loss is not a finite number"
    return EvalMetrics(
        eval_loss=mean_loss if is_finite else None,
        perplexity=_perplexity(mean_loss),
        content_perplexity=None if content_loss is None else _perplexity(content_loss),
        accuracy=correct / tokens if config.eval_config.compute_eval_metrics else None,
        eval_runtime=time.monotonic() - started_at,
        eval_rows=len(rows),
        eval_tokens=tokens,
        notes=notes,
    )


def _perplexity(mean_loss: float) -> float | None:
    return math.exp(mean_loss) if math.isfinite(mean_loss) and mean_loss < 700 else None  # e^710 overflows a double


@dataclass(frozen=True)
class BatchEvaluation:
    """The evaluation of one batch of held-out rows."""

    loss: float  # summed over the labels
    tokens: int
    content_loss: float  # summed over the labels that do not end a turn
    content_tokens: int
    correct: int = 0
    predictions_and_labels: tuple[Any, Any] | None = None  # compared after the last batch, unless batch_eval_metrics is set

    def count_correct(self) -> int:
        """Labels that the model predicted."""
        if self.predictions_and_labels is None:
            return self.correct
        predictions, labels = self.predictions_and_labels
        return int((predictions == labels).sum())


def _evaluate_batch(model: Any, batch: dict[str, Any], config: TrainingConfig, turn_ends: TurnEnds) -> BatchEvaluation:
    import torch

    batch.pop("non_padding_tokens")
    with torch.no_grad():
        labels = batch.pop("labels").to(model.device)
        logits, targets = compute_labeled_logits(model, {name: tensor.to(model.device) for name, tensor in batch.items()}, labels)
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        is_content = ~turn_ends.find(labels)[:, 1:][labels[:, 1:] != IGNORE_INDEX]  # in the order of the losses
        sums = (losses.sum().item(), targets.numel(), losses[is_content].sum().item(), int(is_content.sum()))
        if config.eval_config.batch_eval_metrics:
            return BatchEvaluation(*sums, correct=int((logits.argmax(-1) == targets).sum()))
        if config.eval_config.compute_eval_metrics:
            return BatchEvaluation(*sums, predictions_and_labels=(logits.argmax(-1).cpu(), targets.cpu()))
        return BatchEvaluation(*sums)


def collate(blocks: list[list[TokenizedExample]], pad_id: int) -> dict[str, Any]:
    """Blocks of rows as tensors (B, T): input_ids, labels, and attention_mask or position_ids; and the number of non-padding tokens.

    If any block has several rows, the positions restart with each row and there is no attention mask: that is how attention knows where
    a row begins. The first token of a row is never a label, because no token of its row precedes it.
    """
    import torch

    longest = max(sum(len(row.input_ids) for row in block) for block in blocks)
    is_packed = any(len(block) > 1 for block in blocks)
    ids = torch.full((len(blocks), longest), pad_id)
    labels = torch.full_like(ids, IGNORE_INDEX)
    mask = torch.zeros_like(ids)
    positions = torch.zeros_like(ids)
    for n, block in enumerate(blocks):
        start = 0
        for row in block:
            end = start + len(row.input_ids)
            ids[n, start:end] = torch.tensor(row.input_ids)
            labels[n, start + 1 : end] = torch.tensor(row.labels[1:])
            positions[n, start:end] = torch.arange(len(row.input_ids))
            mask[n, start:end] = 1
            start = end
        positions[n, start:] = torch.arange(longest - start)  # padding is a row of its own, without labels
    attention = {"position_ids": positions} if is_packed else {"attention_mask": mask}
    return {"input_ids": ids, "labels": labels, "non_padding_tokens": int(mask.sum()), **attention}
