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

from jobs.data.images import ImageRow, RowsWithImages, Sight, pixels_of, render_with_images, sight_of, telling_of_broken_images
from jobs.data.render import Rendered, TokenRow
from jobs.evaluation.answers import Features
from jobs.evaluation.questions import Question, questions_of
from jobs.trained import TrainedModel
from jobs.trainers.course import Course
from jobs.trainers.likelihood import collate, labelled_logits, measure
from jobs.trainers.loop import Ground, lay_ground, new_tokens, refuse_nothing_to_learn, teach, tell_losses
from jobs.trainers.model import VISION_PARTS, adapt, adapter_config, load_base
from jobs.trainers.several import Evenly
from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT
from schema.job import EvalMetrics
from schema.training import SftConfig

if TYPE_CHECKING:
    from jobs.context import JobContext

# Rows are sorted by length among those of so many optimizer steps, and a quarter of all at most: other rows meet in every epoch.
STEPS_SORTED = 50
SHARE_SORTED = 4


def train(config: SftConfig, context: "JobContext") -> TrainedModel:
    """Train as the config says, or go on where an attempt before left off. Raises JobFailed and Stopped."""
    ground = lay_ground(config, context)
    sight = sight_of(ground.base_folder, config.base_model_id)
    if ground.template_is_ours and sight.chat_template:  # the base keeps it beside its image processor
        ground.tokenizer.chat_template = sight.chat_template
        ground = replace(ground, template_is_ours=False)
    return teach(_prepare(ground, config, sight), ground)


@dataclass(frozen=True)
class Collator:
    """Makes batches of rows: tokens, labels, which tokens are of images, and the pixels of these in the order of the rows."""

    pad_id: int
    sight: Sight

    def __call__(self, rows: Sequence[ImageRow]) -> dict[str, Any]:
        """Raises BrokenImage."""
        import torch

        batch = collate([[row] for row in rows], self.pad_id)
        batch["token_type_ids"] = (batch["input_ids"] == self.sight.token).long()
        pixels = [found for row in rows if (found := pixels_of(row, self.sight)) is not None]
        return batch | {"pixel_values": torch.cat(pixels)} if pixels else batch


@dataclass(frozen=True)
class VisionLesson:
    """Rows with images to be talked about, and the likelihood of what is said."""

    ground: Ground
    config: SftConfig
    collator: Collator
    rows: list[ImageRow]
    train_rows: list[TokenRow]  # the same without their images
    held_out: list[ImageRow]
    shown: list[TokenRow]
    new_tokens: list[int]

    @property
    def items(self) -> int:
        return len(self.rows)

    @property
    def is_measured(self) -> bool:
        return bool(self.held_out)

    @property
    def recipe(self) -> "Callable[[Ground], VisionLesson]":
        return partial(
            VisionLesson,
            config=self.config,
            collator=self.collator,
            rows=self.rows,
            train_rows=[],
            held_out=[],
            shown=[],
            new_tokens=self.new_tokens,
        )

    @property
    def shares(self) -> Evenly:
        return "labels"

    def model(self, weights: Path) -> Any:
        model = load_base(self.config, self.ground.machine, weights, "image_text")
        if not self.config.hyperparameters.train_vision_tower:
            look_only(model)
        if self.config.method == "Full":
            return model
        return adapt(model, self.config, adapter_config(self.config, model, new_tokens=self.new_tokens))

    def trainer(self, model: Any, arguments: dict[str, Any], obedient: Callable[[type], type], course: Course) -> Any:
        import torch
        from transformers import Trainer, TrainingArguments

        lengths = [len(row.input_ids) for row in self.rows]
        # A batch without images, in one process of several, leaves a trained vision tower aside.
        may_not_look = "ddp_find_unused_parameters" in arguments and bool(self.config.hyperparameters.train_vision_tower)
        by_length = ByLength(lengths, course.plan.effective, self.config.hyperparameters.seed)

        class VisionTrainer(Trainer):
            """Transformers' trainer with the loss at labelled positions, and rows of a length side by side."""

            def train(self, *args: Any, **how: Any) -> Any:
                with telling_of_broken_images():
                    return super().train(*args, **how)

            def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
                inputs.pop("real_tokens")
                logits, wanted = labelled_logits(model, inputs, inputs.pop("labels"))
                loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum") / (num_items_in_batch or wanted.numel())
                if num_items_in_batch is not None:  # counted over all processes, whose gradients are averaged
                    loss = loss * self.accelerator.num_processes
                return (loss, None) if return_outputs else loss

            def _get_train_sampler(self, train_dataset: Any = None) -> Any:
                return by_length

        trainer = obedient(VisionTrainer)(
            model=model,
            args=TrainingArguments(**arguments | ({"ddp_find_unused_parameters": True} if may_not_look else {})),
            train_dataset=self.rows,
            eval_dataset=self.held_out or None,
            data_collator=self.collator,
            processing_class=self.ground.tokenizer,
        )
        trainer.model_accepts_loss_kwargs = True  # the loss is divided by all labels of an optimizer step, not by micro-batch
        return trainer

    def window(self, trainer: Any) -> MutableMapping[str, list[float]]:
        return {}  # the library gathers nothing beside the loss

    def tokens_in(self, inputs: Any) -> int:
        return int(inputs["real_tokens"])

    def measure(self, trainer: Any, pulse: Callable[[], None]) -> EvalMetrics:
        with telling_of_broken_images():
            return measure(trainer.model, self.held_out, self.ground.pad_id, self.config, pulse, collator=self.collator)

    def questions(self, count: int) -> list[Question]:
        """Held-out rows as questions, images included; in their texts an image is what the chat template writes."""
        sight = self.collator.sight
        found = questions_of(self.held_out, self.ground.tokenizer, count)
        return [replace(question, prompt_text=question.prompt_text.replace(sight.sequence, sight.marker)) for question in found]

    def features_of(self, questions: Sequence[Question]) -> Sequence[Features]:
        """What the model looks at beside each question's tokens, made when it is asked for."""
        return Looks(questions, self.held_out, self.collator.sight)


@dataclass(frozen=True)
class Looks(Sequence[Features]):
    """The images of questions about `rows`, decoded whenever they are looked at: all of them would fill the memory."""

    questions: Sequence[Question]
    rows: Sequence[ImageRow]
    sight: Sight

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, n: Any) -> Any:  # an index; a slice is none of answers' business
        import torch

        question = self.questions[n]
        of_images = torch.tensor(question.prompt_ids) == self.sight.token
        with telling_of_broken_images():
            pixels = pixels_of(self.rows[question.row], self.sight, int(of_images.sum()) // self.sight.tokens_per_image)
        found = {"token_type_ids": of_images.long()}
        return found if pixels is None else found | {"pixel_values": pixels}


class ByLength:
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
        return iter(order_by_length(self._lengths, self._rows_per_step, chance))


def order_by_length(lengths: Sequence[int], rows_per_step: int, chance: random.Random) -> list[int]:
    """All rows, those of one optimizer step about as long as each other, the steps in any order.

    Which rows make a step depends on how many it has, not on how many go through the model at once: when memory ran out and the batch
    got smaller, the same steps are made. The step with the longest row comes first: if memory does not suffice, that is known at once.
    """
    rows = list(range(len(lengths)))
    chance.shuffle(rows)
    together = rows_per_step * max(1, min(STEPS_SORTED, len(rows) // (rows_per_step * SHARE_SORTED)))
    steps: list[list[int]] = []
    for start in range(0, len(rows), together):
        sorted_rows = sorted(rows[start : start + together], key=lambda row: -lengths[row])
        steps += [sorted_rows[n : n + rows_per_step] for n in range(0, len(sorted_rows), rows_per_step)]
    whole = [step for step in steps if len(step) == rows_per_step]
    chance.shuffle(whole)
    if whole:
        longest = max(range(len(whole)), key=lambda n: max(lengths[row] for row in whole[n]))
        whole.insert(0, whole.pop(longest))
    return list(chain(*whole, *(step for step in steps if len(step) < rows_per_step)))


def look_only(model: Any) -> None:
    """Keep what looks at images as it is, and no gradient from going through it, not even when activations are computed twice."""
    import torch

    for name, part in model.named_parameters():
        if re.fullmatch(VISION_PARTS, name):
            part.requires_grad_(False)
    for name, part in model.named_modules():
        if name.rpartition(".")[2] == "vision_tower":
            part.forward = torch.no_grad()(part.forward)


def _prepare(ground: Ground, config: SftConfig, sight: Sight) -> VisionLesson:
    """Rows to tokens and labels. Raises JobFailed when there is nothing to learn in them, or something cannot be shown."""
    dataset_type = ground.context.spec.dataset.dataset_type
    longest = config.hyperparameters.max_seq_length
    found = {name: render_with_images(path, dataset_type, ground.tokenizer, sight, longest) for name, path in ground.splits.items()}
    for name, of_split in found.items():
        tell_losses(ground, name, Rendered([*of_split.rows], of_split.cut, of_split.dropped))
    train, held_out = found[TRAIN_SPLIT], found.get(EVAL_SPLIT, RowsWithImages())
    refuse_nothing_to_learn(ground, len(train.rows), len(held_out.rows))
    _tell(ground, config)
    trained_anew = new_tokens(ground, train.rows)
    collator = Collator(ground.pad_id, sight)
    return VisionLesson(ground, config, collator, train.rows, train.words, held_out.rows, held_out.words, trained_anew)


def _tell(ground: Ground, config: SftConfig) -> None:
    sees = config.hyperparameters.train_vision_tower
    why = "train_vision_tower asks for it" if sees else "train_vision_tower does not ask for more: the words about images are learned"
    ground.context.decided("vision_tower", "trained" if sees else "kept", why)
    ground.context.decided("batches", "by length", "rows with images cannot be packed: rows of a length side by side have little padding")
    why = "exported files are compared by their words: what runs GGUF files without an image projector reads nothing else"
    ground.context.decided("compared_rows", "without their images", why)
