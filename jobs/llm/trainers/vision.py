"""Supervised fine-tuning on rows with images.

    1. rows to tokens and labels; image tokens have no labels
    2. batches of rows of similar length; images are decoded batch by batch, in data loader workers if there are any
    3. cross entropy at labeled positions; the tokens of an image attend to each other in both directions
    4. the same loss on held-out rows, and generated answers, with images

The vision tower stays frozen unless train_vision_tower is set.
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
    VisionInputConfig,
    image_error_context,
    load_pixel_values,
    load_vision_input_config,
    tokenize_split_with_images,
)
from jobs.llm.data.mixing import MixedRows, load_mixed
from jobs.llm.data.sources import list_split_paths
from jobs.llm.data.splits import check_splits, untrained_special_tokens
from jobs.llm.data.tokenize import TokenizedExample
from jobs.llm.evaluation.generation import Features
from jobs.llm.evaluation.prompts import EvalPrompt, make_eval_prompts
from jobs.llm.loss import collate, compute_labeled_logits, evaluate_likelihood
from jobs.llm.model import VISION_MODULES_PATTERN, add_adapter, load_base, lora_config
from jobs.llm.trained_model import TrainedModel
from jobs.llm.training_context import LossReduction, TrainingContext, decide_chat_format, prepare_training
from jobs.llm.training_loop import run_training
from jobs.llm.turn_ends import get_turn_ends
from jobs.runtime.batch_config import BatchConfig
from jobs.runtime.training_control import TrainingControl
from schema.estimate.llm_memory import LongestRows, find_longest_rows
from schema.job import EvalMetrics
from schema.training import SftConfig

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext

# Rows are sorted by length within windows of this many optimizer steps, and of at most a quarter of all rows, so that different rows
# share a step in every epoch.
SORT_WINDOW_STEPS = 50
MIN_SORT_WINDOWS = 4

RowWithText = tuple[TokenizedImageExample, TokenizedExample]  # a row, and the same without its images


def train(config: SftConfig, context: "JobContext") -> TrainedModel:
    """Train as configured, or resume an earlier attempt. Raises JobFailed and Stopped."""
    training = prepare_training(config, context)
    vision_input = load_vision_input_config(training.base_folder, config.base_model_id)
    if training.chat_format.source == "neutral" and vision_input.chat_template:  # the base keeps it with its image processor
        training.tokenizer.chat_template = vision_input.chat_template
        training = replace(
            training, chat_format=decide_chat_format(training.tokenizer, config, context, list_split_paths(training.sources))
        )
    dataset_type, max_length = context.spec.dataset.dataset_type, config.hyperparameters.max_seq_length

    def load_rows(source: TrainingContext) -> dict[str, MixedRows[RowWithText]]:
        splits = {
            name: tokenize_split_with_images(path, dataset_type, training.row_tokenizer, vision_input, max_length)
            for name, path in source.splits.items()
        }
        return {
            name: MixedRows(list(zip(split.rows, split.text_only_rows, strict=True)), split.truncated, split.dropped)
            for name, split in splits.items()
        }

    train_rows, held_out = check_splits(training, load_mixed(training, load_rows))
    _log_decisions(training, config)
    task = VisionTask(
        training,
        config,
        Collator(training.pad_id, vision_input),
        [row for row, _ in train_rows],
        [text for _, text in train_rows],
        [row for row, _ in held_out],
        [text for _, text in held_out],
        untrained_special_tokens(training, [row for row, _ in train_rows]),
    )
    return run_training(task, training)


def _log_decisions(training: TrainingContext, config: SftConfig) -> None:
    trains_tower = config.hyperparameters.train_vision_tower
    reason = "train_vision_tower is set" if trains_tower else "train_vision_tower is not set: only the language model is trained"
    training.context.log_decision("vision_tower", "trained" if trains_tower else "frozen", reason)
    reason = "rows with images cannot be packed; batches of rows of similar length have little padding"
    training.context.log_decision("batch_sampling", "grouped_by_length", reason)
    reason = "exported files are compared on text, because a GGUF runtime without an image projector reads nothing else"
    training.context.log_decision("fidelity_rows", "without images", reason)


@dataclass(frozen=True)
class Collator:
    """Makes batches of rows: what `collate` makes, the mask of image tokens, and the pixels of the images in the order of the rows."""

    pad_id: int
    vision_input: VisionInputConfig

    def __call__(self, rows: Sequence[TokenizedImageExample]) -> dict[str, Any]:
        """Raises BrokenImage."""
        import torch

        batch = collate([[row] for row in rows], self.pad_id)
        batch["token_type_ids"] = (batch["input_ids"] == self.vision_input.soft_token_id).long()
        pixel_values = [pixels for row in rows if (pixels := load_pixel_values(row, self.vision_input)) is not None]
        return batch | {"pixel_values": torch.cat(pixel_values)} if pixel_values else batch


@dataclass(frozen=True)
class VisionTask:
    """Rows with images to learn, and the likelihood of held-out rows."""

    training: TrainingContext
    config: SftConfig
    collator: Collator
    rows: Sequence[TokenizedImageExample]
    train_examples: list[TokenizedExample]  # the same rows without their images
    held_out: Sequence[TokenizedImageExample]
    held_out_examples: list[TokenizedExample]
    trainable_token_ids: list[int]

    @property
    def examples_per_epoch(self) -> int:
        return len(self.rows)

    def find_longest_rows(self, count: int) -> LongestRows:
        rows = find_longest_rows(((len(row.input_ids), row.label_count) for row in self.rows), count)
        return replace(rows, keeps_logits=True)

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
        if not self.training.trains_adapter:
            return model
        return add_adapter(model, self.config, lora_config(self.config, model, trainable_token_ids=self.trainable_token_ids))

    def build_trainer(self, model: Any, arguments: dict[str, Any], instrument: Callable[[type], type], control: TrainingControl) -> Any:
        import torch
        from transformers import Trainer, TrainingArguments

        lengths = [len(row.input_ids) for row in self.rows]
        if "ddp_find_unused_parameters" in arguments and self.config.hyperparameters.train_vision_tower:
            arguments = arguments | {"ddp_find_unused_parameters": True}  # a batch without images does not use the vision tower
        sampler = LengthSortedSampler(
            lengths, BatchConfig.from_details(control.details).effective_batch_size, self.config.hyperparameters.seed
        )

        class VisionTrainer(Trainer):
            """Transformers' trainer with the loss at labeled positions and batches of similar length."""

            def train(self, *args: Any, **kwargs: Any) -> Any:
                with image_error_context():
                    return super().train(*args, **kwargs)

            def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
                inputs.pop("non_padding_tokens")
                logits, targets = compute_labeled_logits(model, inputs, inputs.pop("labels"))
                loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / (num_items_in_batch or targets.numel())
                if num_items_in_batch is not None:  # it counts the labels of all processes, whose gradients are averaged
                    loss = loss * self.accelerator.num_processes
                return (loss, None) if return_outputs else loss

            def _get_train_sampler(self, train_dataset: Any = None) -> Any:
                return sampler

        trainer = instrument(VisionTrainer)(
            model=model,
            args=TrainingArguments(**arguments),
            train_dataset=self.rows,
            eval_dataset=self.held_out or None,
            data_collator=self.collator,
            processing_class=self.training.tokenizer,
        )
        trainer.model_accepts_loss_kwargs = True  # normalize the loss by the labels of the optimizer step, not of the batch
        return trainer

    def logged_metrics_buffer(self, trainer: Any) -> MutableMapping[str, list[float]]:
        return {}  # transformers' trainer collects no metrics beside the loss

    def count_tokens(self, inputs: Any) -> int:
        return int(inputs["non_padding_tokens"])

    def evaluate(self, trainer: Any, check_stop: Callable[[], None]) -> EvalMetrics:
        with image_error_context():
            return evaluate_likelihood(
                trainer.model,
                self.held_out,
                self.training.pad_id,
                self.config,
                get_turn_ends(self.training),
                check_stop,
                collate_fn=self.collator,
            )

    def eval_prompts(self, count: int) -> list[EvalPrompt]:
        """Prompts of the held-out rows, with images. In their texts an image is what the chat template writes for it."""
        vision_input = self.collator.vision_input
        prompts = make_eval_prompts(self.held_out, self.training.tokenizer, count)
        return [
            replace(prompt, prompt_text=prompt.prompt_text.replace(vision_input.full_image_sequence, vision_input.boi_token))
            for prompt in prompts
        ]

    def prompt_features(self, eval_prompts: Sequence[EvalPrompt]) -> Sequence[Features]:
        """The image inputs of each prompt, decoded on access."""
        return ImageFeatures(eval_prompts, self.held_out, self.collator.vision_input)


@dataclass(frozen=True)
class ImageFeatures(Sequence[Features]):
    """The image inputs of prompts about `rows`. Decoded at every access: all of them together would fill the memory."""

    eval_prompts: Sequence[EvalPrompt]
    rows: Sequence[TokenizedImageExample]
    vision_input: VisionInputConfig

    def __len__(self) -> int:
        return len(self.eval_prompts)

    def __getitem__(self, index: Any) -> Any:  # Sequence declares slices too; nothing slices it
        import torch

        prompt = self.eval_prompts[index]
        is_image_token = torch.tensor(prompt.prompt_ids) == self.vision_input.soft_token_id
        image_count = int(is_image_token.sum()) // self.vision_input.tokens_per_image
        with image_error_context():
            pixels = load_pixel_values(self.rows[prompt.row_index], self.vision_input, image_count)
        features = {"token_type_ids": is_image_token.long()}
        return features if pixels is None else features | {"pixel_values": pixels}


class LengthSortedSampler:
    """Yields row indices so that batches have rows of similar length. The order depends only on seed and epoch."""

    def __init__(self, lengths: Sequence[int], rows_per_step: int, seed: int) -> None:
        self._lengths, self._rows_per_step, self._seed = lengths, rows_per_step, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the library when an epoch begins, also when it resumes within one."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self._seed} {self._epoch}")  # noqa: S311  # not for security
        return iter(group_by_length(self._lengths, self._rows_per_step, rng))


def group_by_length(lengths: Sequence[int], rows_per_step: int, rng: random.Random) -> list[int]:
    """All row indices: rows of similar length share an optimizer step, and the steps are in random order.

    Which rows share a step depends on the rows per step, not on the batch size, so a batch size that was reduced after memory ran out
    leaves the steps unchanged. The step with the longest row comes first, so that a lack of memory shows at once.
    """
    rows = list(range(len(lengths)))
    rng.shuffle(rows)
    window_size = rows_per_step * max(1, min(SORT_WINDOW_STEPS, len(rows) // (rows_per_step * MIN_SORT_WINDOWS)))
    steps: list[list[int]] = []
    for start in range(0, len(rows), window_size):
        sorted_rows = sorted(rows[start : start + window_size], key=lambda row: -lengths[row])
        steps += [sorted_rows[n : n + rows_per_step] for n in range(0, len(sorted_rows), rows_per_step)]
    full_steps = [step for step in steps if len(step) == rows_per_step]
    rng.shuffle(full_steps)
    if full_steps:
        longest = max(range(len(full_steps)), key=lambda n: max(lengths[row] for row in full_steps[n]))
        full_steps.insert(0, full_steps.pop(longest))
    return list(chain(*full_steps, *(step for step in steps if len(step) < rows_per_step)))


def freeze_vision_tower(model: Any) -> None:
    """Freeze the vision tower and its projector, and compute the tower without gradients, also under gradient checkpointing."""
    import torch

    for name, weight in model.named_parameters():
        if re.fullmatch(VISION_MODULES_PATTERN, name):
            weight.requires_grad_(False)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "vision_tower":
            module.forward = torch.no_grad()(module.forward)
