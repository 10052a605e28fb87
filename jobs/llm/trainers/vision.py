"""Supervised fine-tuning with images: learn to say what the rows say of what they show.

    1. rows to tokens and labels: what stands for an image is read, and never learned to be said
    2. rows of about the same length in each batch; their images decoded batch by batch, beside the training where there are workers
    3. the loss at labelled positions; the soft tokens of an image see each other in both directions
    4. held-out rows measured, and questions answered, with their images

The part of the model that looks at images stays as it is, unless train_vision_tower asks for it.
"""

import random
import re
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.data.images import (
    TokenizedImageExample,
    TokenizedImageSplit,
    VisionInputConfig,
    image_error_context,
    load_pixel_values,
    load_vision_input_config,
    tokenize_split_with_images,
)
from jobs.llm.data.tokenize import TokenizedExample, TokenizedSplit
from jobs.llm.distributed import LossReduction
from jobs.llm.evaluation.generation import Features
from jobs.llm.evaluation.prompts import EvalPrompt, make_eval_prompts
from jobs.llm.loss import collate, compute_labeled_logits, evaluate_likelihood
from jobs.llm.model import VISION_MODULES_PATTERN, add_adapter, load_base, lora_config
from jobs.llm.trained_model import TrainedModel
from jobs.llm.training_loop import (
    TrainingContext,
    prepare_training,
    require_examples,
    run_training,
    untrained_special_tokens,
    warn_truncation,
)
from jobs.runtime.training_control import TrainingControl
from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT
from schema.job import EvalMetrics
from schema.training import SftConfig

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext

# Rows are sorted by length among those of so many optimizer steps, and a quarter of all at most: other rows meet in every epoch.
SORT_WINDOW_STEPS = 50
MIN_SORT_WINDOWS = 4


def train(config: SftConfig, context: "JobContext") -> TrainedModel:
    """Train as the config says, or go on where an attempt before left off. Raises JobFailed and Stopped."""
    ground = prepare_training(config, context)
    sight = load_vision_input_config(ground.base_folder, config.base_model_id)
    if ground.uses_default_chat_template and sight.chat_template:  # the base keeps it beside its image processor
        ground.tokenizer.chat_template = sight.chat_template
        ground = replace(ground, uses_default_chat_template=False)
    return run_training(_build_task(ground, config, sight), ground)


@dataclass(frozen=True)
class Collator:
    """Makes batches of rows: tokens, labels, which tokens are of images, and the pixels of these in the order of the rows."""

    pad_id: int
    image_processor: VisionInputConfig

    def __call__(self, rows: Sequence[TokenizedImageExample]) -> dict[str, Any]:
        """Raises BrokenImage."""
        import torch

        batch = collate([[row] for row in rows], self.pad_id)
        batch["token_type_ids"] = (batch["input_ids"] == self.image_processor.soft_token_id).long()
        pixels = [found for row in rows if (found := load_pixel_values(row, self.image_processor)) is not None]
        return batch | {"pixel_values": torch.cat(pixels)} if pixels else batch


@dataclass(frozen=True)
class VisionTask:
    """Rows with images to be talked about, and the likelihood of what is said."""

    training: TrainingContext
    config: SftConfig
    collator: Collator
    rows: list[TokenizedImageExample]
    train_examples: list[TokenizedExample]  # the same without their images
    held_out: list[TokenizedImageExample]
    held_out_examples: list[TokenizedExample]
    trainable_token_ids: list[int]

    @property
    def examples_per_epoch(self) -> int:
        return len(self.rows)

    @property
    def has_held_out_rows(self) -> bool:
        return bool(self.held_out)

    @property
    def worker_task_factory(self) -> "Callable[[TrainingContext], VisionTask]":
        return partial(
            VisionTask,
            config=self.config,
            collator=self.collator,
            rows=self.rows,
            train_examples=[],
            held_out=[],
            held_out_examples=[],
            trainable_token_ids=self.trainable_token_ids,
        )

    @property
    def loss_reduction(self) -> LossReduction:
        return "labels"

    def build_model(self, weights: Path) -> Any:
        model = load_base(self.config, self.training.device_config, weights, "image_text")
        if not self.config.hyperparameters.train_vision_tower:
            freeze_vision_tower(model)
        if self.config.method == "Full":
            return model
        return add_adapter(model, self.config, lora_config(self.config, model, trainable_token_ids=self.trainable_token_ids))

    def build_trainer(self, model: Any, arguments: dict[str, Any], instrument: Callable[[type], type], control: TrainingControl) -> Any:
        import torch
        from transformers import Trainer, TrainingArguments

        lengths = [len(row.input_ids) for row in self.rows]
        # A batch without images, in one process of several, leaves a trained vision tower aside.
        may_not_look = "ddp_find_unused_parameters" in arguments and bool(self.config.hyperparameters.train_vision_tower)
        by_length = LengthSortedSampler(lengths, control.batch_config.effective_batch_size, self.config.hyperparameters.seed)

        class VisionTrainer(Trainer):
            """Transformers' trainer with the loss at labelled positions, and rows of a length side by side."""

            def train(self, *args: Any, **how: Any) -> Any:
                with image_error_context():
                    return super().train(*args, **how)

            def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
                inputs.pop("non_padding_tokens")
                logits, wanted = compute_labeled_logits(model, inputs, inputs.pop("labels"))
                loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum") / (num_items_in_batch or wanted.numel())
                if num_items_in_batch is not None:  # counted over all processes, whose gradients are averaged
                    loss = loss * self.accelerator.num_processes
                return (loss, None) if return_outputs else loss

            def _get_train_sampler(self, train_dataset: Any = None) -> Any:
                return by_length

        trainer = instrument(VisionTrainer)(
            model=model,
            args=TrainingArguments(**arguments | ({"ddp_find_unused_parameters": True} if may_not_look else {})),
            train_dataset=self.rows,
            eval_dataset=self.held_out or None,
            data_collator=self.collator,
            processing_class=self.training.tokenizer,
        )
        trainer.model_accepts_loss_kwargs = True  # the loss is divided by all labels of an optimizer step, not by micro-batch
        return trainer

    def logged_metrics_buffer(self, trainer: Any) -> MutableMapping[str, list[float]]:
        return {}  # the library gathers nothing beside the loss

    def count_tokens(self, inputs: Any) -> int:
        return int(inputs["non_padding_tokens"])

    def evaluate(self, trainer: Any, check_stop: Callable[[], None]) -> EvalMetrics:
        with image_error_context():
            return evaluate_likelihood(
                trainer.model, self.held_out, self.training.pad_id, self.config, check_stop, collate_fn=self.collator
            )

    def eval_prompts(self, count: int) -> list[EvalPrompt]:
        """Held-out rows as questions, images included; in their texts an image is what the chat template writes."""
        sight = self.collator.image_processor
        found = make_eval_prompts(self.held_out, self.training.tokenizer, count)
        return [
            replace(question, prompt_text=question.prompt_text.replace(sight.full_image_sequence, sight.boi_token)) for question in found
        ]

    def prompt_features(self, eval_prompts: Sequence[EvalPrompt]) -> Sequence[Features]:
        """What the model looks at beside each question's tokens, made when it is asked for."""
        return ImageFeatures(eval_prompts, self.held_out, self.collator.image_processor)


@dataclass(frozen=True)
class ImageFeatures(Sequence[Features]):
    """The images of questions about `rows`, decoded whenever they are looked at: all of them would fill the memory."""

    eval_prompts: Sequence[EvalPrompt]
    rows: Sequence[TokenizedImageExample]
    image_processor: VisionInputConfig

    def __len__(self) -> int:
        return len(self.eval_prompts)

    def __getitem__(self, n: Any) -> Any:  # an index; a slice is none of answers' business
        import torch

        question = self.eval_prompts[n]
        of_images = torch.tensor(question.prompt_ids) == self.image_processor.soft_token_id
        with image_error_context():
            pixels = load_pixel_values(
                self.rows[question.row], self.image_processor, int(of_images.sum()) // self.image_processor.tokens_per_image
            )
        found = {"token_type_ids": of_images.long()}
        return found if pixels is None else found | {"pixel_values": pixels}


class LengthSortedSampler:
    """The order in which rows are learned: a new one in every epoch, the same whenever it is asked for."""

    def __init__(self, lengths: Sequence[int], rows_per_step: int, seed: int) -> None:
        self._lengths, self._rows_per_step, self._seed = lengths, rows_per_step, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the library when an epoch begins, also one that is gone on with."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        chance = random.Random(f"{self._seed} {self._epoch}")  # noqa: S311  # no secret
        return iter(group_by_length(self._lengths, self._rows_per_step, chance))


def group_by_length(lengths: Sequence[int], rows_per_step: int, rng: random.Random) -> list[int]:
    """All rows, those of one optimizer step about as long as each other, the steps in any order.

    Which rows make a step depends on how many it has, not on how many go through the model at once: when memory ran out and the batch
    got smaller, the same steps are made. The step with the longest row comes first: if memory does not suffice, that is known at once.
    """
    rows = list(range(len(lengths)))
    rng.shuffle(rows)
    together = rows_per_step * max(1, min(SORT_WINDOW_STEPS, len(rows) // (rows_per_step * MIN_SORT_WINDOWS)))
    steps: list[list[int]] = []
    for start in range(0, len(rows), together):
        sorted_rows = sorted(rows[start : start + together], key=lambda row: -lengths[row])
        steps += [sorted_rows[n : n + rows_per_step] for n in range(0, len(sorted_rows), rows_per_step)]
    whole = [step for step in steps if len(step) == rows_per_step]
    rng.shuffle(whole)
    if whole:
        longest = max(range(len(whole)), key=lambda n: max(lengths[row] for row in whole[n]))
        whole.insert(0, whole.pop(longest))
    return list(chain(*whole, *(step for step in steps if len(step) < rows_per_step)))


def freeze_vision_tower(model: Any) -> None:
    """Keep what looks at images as it is, and no gradient from going through it, not even when activations are computed twice."""
    import torch

    for name, part in model.named_parameters():
        if re.fullmatch(VISION_MODULES_PATTERN, name):
            part.requires_grad_(False)
    for name, part in model.named_modules():
        if name.rpartition(".")[2] == "vision_tower":
            part.forward = torch.no_grad()(part.forward)


def _build_task(training: TrainingContext, config: SftConfig, image_processor: VisionInputConfig) -> VisionTask:
    """Rows to tokens and labels. Raises JobFailed when there is nothing to learn in them, or something cannot be shown."""
    dataset_type = training.context.spec.dataset.dataset_type
    longest = config.hyperparameters.max_seq_length
    found = {
        name: tokenize_split_with_images(path, dataset_type, training.tokenizer, image_processor, longest)
        for name, path in training.splits.items()
    }
    for name, of_split in found.items():
        warn_truncation(training, name, TokenizedSplit([*of_split.rows], of_split.truncated, of_split.dropped))
    train, held_out = found[TRAIN_SPLIT], found.get(EVAL_SPLIT, TokenizedImageSplit())
    require_examples(training, len(train.rows), len(held_out.rows))
    _log_decisions(training, config)
    trained_anew = untrained_special_tokens(training, train.rows)
    collator = Collator(training.pad_id, image_processor)
    return VisionTask(training, config, collator, train.rows, train.text_only_rows, held_out.rows, held_out.text_only_rows, trained_anew)


def _log_decisions(training: TrainingContext, config: SftConfig) -> None:
    sees = config.hyperparameters.train_vision_tower
    why = "train_vision_tower asks for it" if sees else "train_vision_tower does not ask for more: the words about images are learned"
    training.context.log_decision("vision_tower", "trained" if sees else "frozen", why)
    training.context.log_decision(
        "batch_sampling", "grouped_by_length", "rows with images cannot be packed: rows of a length side by side have little padding"
    )
    why = "exported files are compared by their words: what runs GGUF files without an image projector reads nothing else"
    training.context.log_decision("fidelity_rows", "without their images", why)
