"""Group relative policy optimization: learn from what graders say of the model's own answers.

    1. rows to prompts, and the columns that graders read; every grader is asked whether it can judge them
    2. the model answers a prompt several times, and the graders say what each answer is worth; answers that are worth more than the
       others of their prompt become likelier
    3. held-out prompts are answered with the likeliest tokens, and graded: the reward that a user would see

An answer that a grader failed on, but not on all of its group, is not compared with the others: see `incomparable_left_out`.
All answers of an optimizer step are made at its beginning, as many at once as go through the model at once, so that nothing that was
generated is ever left over in a checkpoint. Where several processes train, each answers its share, and rank 0 grades all answers.
"""

import random
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.data.render import NO_LABEL, Rendered, TokenRow, read_rows, tokens_of
from jobs.errors import JobFailed
from jobs.evaluation.answers import answers, at_once, samples_of
from jobs.evaluation.undisturbed import same_randomness
from jobs.graders import build_graders, check_graders, close_graders
from jobs.graders.grading import Case, Failed, Grade
from jobs.graders.reward import RewardFunction, incomparable_left_out, summary, text_of
from jobs.trained import TrainedModel
from jobs.trainers.course import Course
from jobs.trainers.likelihood import labelled_logits
from jobs.trainers.loop import Ground, lay_ground, new_tokens, refuse_nothing_to_learn, teach, tell_losses
from jobs.trainers.model import adapter_config, load_base
from jobs.trainers.preferences import places, ready_adapter, refuse_what_cannot_be
from jobs.trainers.several import Evenly, figures_of_a_batch
from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT
from schema.events import Sampled
from schema.job import EvalMetrics
from schema.training import GrpoConfig

if TYPE_CHECKING:
    from jobs.context import JobContext

NAN = float("nan")


def train(config: GrpoConfig, context: "JobContext") -> TrainedModel:
    """Train as the config says, or go on where an attempt before left off. Raises JobFailed and Stopped."""
    refuse_what_cannot_be(config, context)
    ground = lay_ground(config, context)
    graders = build_graders(config, context)
    try:
        return teach(_prepare(ground, config, graders), ground)
    finally:
        close_graders(graders)


@dataclass(frozen=True)
class PromptRow:
    """A row: what the model is asked, and what graders may read beside it."""

    prompt: str | list[dict[str, Any]]
    tokens: TokenRow  # the prompt; with the row's own completion if it has one
    columns: dict[str, Any]

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt as the model reads it."""
        return self.tokens.input_ids[: self.tokens.prompt_tokens]

    def case(self, completion: str) -> Case:
        """That completion, to be graded."""
        return Case(text_of(self.prompt), completion, self.columns)


@dataclass(frozen=True)
class Named:
    """A grader as TRL knows it, in every process: the lesson asks it itself, in rank 0."""

    name: str
    weight: float

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, *_: object, **__: object) -> list[float | None]:
        raise NotImplementedError(f"grader {self.name!r} is asked by the lesson")


@dataclass
class GrpoLesson:
    """Prompts, and graders of what the model answers."""

    ground: Ground
    config: GrpoConfig
    train: list[PromptRow]
    held_out: list[PromptRow]
    graders: list[RewardFunction]  # none in another process than rank 0: they may know secrets, and count their failures
    named: list[Named]  # the same
    new_tokens: list[int]
    said: list[str] = field(default_factory=list)  # what the model answered to the held-out prompts when it was last measured

    @property
    def items(self) -> int:
        """Answers in an epoch. Prompts that do not fill a step are left for another epoch, which has another order."""
        return len(self.train) // self._prompts_per_step * self._answers_per_step

    @property
    def shown(self) -> Sequence[TokenRow]:
        """Held-out rows; those without a completion of their own with the model's, on which exported files can be compared."""
        said = self.said or [""] * len(self.held_out)
        return [self._with_answer(row.tokens, text) for row, text in zip(self.held_out, said, strict=True)]

    @property
    def is_measured(self) -> bool:
        return bool(self.held_out)

    @property
    def train_rows(self) -> Sequence[TokenRow]:
        return [row.tokens for row in self.train]

    @property
    def recipe(self) -> "Callable[[Ground], GrpoLesson]":
        return partial(
            GrpoLesson, config=self.config, train=self.train, held_out=[], graders=[], named=self.named, new_tokens=self.new_tokens
        )

    @property
    def shares(self) -> Evenly:
        return "as the library does"

    def model(self, weights: Path) -> Any:
        """Without an adapter: the library puts it on, and knows then that the model without it is what to compare with."""
        return load_base(self.config, self.ground.machine, weights)

    def trainer(self, model: Any, arguments: dict[str, Any], obedient: Callable[[type], type], course: Course) -> Any:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        lesson, ground = self, self.ground
        # TRL's head scores every position where there is no Triton, and knows nothing of a head of which a few rows are trained.
        scores_itself = bool(self.new_tokens) or not ground.machine.on_gpu

        class Trainer(GRPOTrainer):
            """TRL's trainer with our prompts' tokens, our rewards, and answers made a few at once."""

            the_course = course

            def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
                inputs = super()._prepare_inputs(generation_batch)
                tokens = inputs["prompt_mask"].sum() + inputs["completion_mask"].sum()
                course.tokens_seen += int(self.accelerator.gather(tokens).sum())
                return inputs

            def compute_loss(self, *inputs: Any, **how: Any) -> Any:
                with figures_of_a_batch(self.accelerator):
                    return super().compute_loss(*inputs, **how)

            def _generate_and_score_completions(self, inputs: Any) -> Any:
                before = {name: list(values) for name, values in self._metrics["train"].items()}
                answered = super()._generate_and_score_completions(inputs)
                if not self.accelerator.is_main_process:  # these figures are of all answers already, and rank 0 has them
                    self._metrics["train"].clear()
                    self._metrics["train"].update(before)
                return answered

            def _get_train_sampler(self, dataset: Any = None) -> Any:
                return shuffled_by_epoch(super()._get_train_sampler(dataset), lambda: int(self.state.epoch or 0))

            def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
                return [prompt_tokens(prompt, self.processing_class).input_ids for prompt in prompts], None, {}

            def _generate_single_turn(self, prompt_ids: list[list[int]], *rest: Any, **named: Any) -> tuple[list[list[int]], None]:
                size = self.args.per_device_train_batch_size
                first = self.accelerator.process_index * len(prompt_ids)
                said: list[list[int]] = []
                for n in range(0, len(prompt_ids), size):
                    with drawn_anew(f"{self.args.seed} {self.state.global_step} {first + n}"):
                        said += super()._generate_single_turn(prompt_ids[n : n + size], *rest, **named)[0]
                return said, None

            def _get_per_token_logps_and_entropies(self, model: Any, *inputs: Any, **named: Any) -> Any:
                if scores_itself:
                    return log_probabilities(model, *inputs, temperature=self.temperature, **named)
                return super()._get_per_token_logps_and_entropies(model, *inputs, **named)

            def _calculate_rewards(self, inputs: list[Any], prompts: list[Any], completions: list[Any], completion_ids_list: Any) -> Any:
                return lesson.rewards(self, [row["place"] for row in inputs], completions)

        prompts = [{"prompt": row.prompt, "place": place} for place, row in enumerate(self.train)]
        with said_to_be_from(ground.base_folder, model):
            trainer = obedient(Trainer)(
                model=model,
                reward_funcs=list(self.named),
                args=GRPOConfig(**arguments | self._own_arguments(arguments)),
                train_dataset=Dataset.from_list(prompts),
                eval_dataset=places(self.held_out) if self.held_out else None,  # never read: `measure` has its own
                processing_class=ground.tokenizer,
                peft_config=adapter_config(self.config, model, new_tokens=self.new_tokens) if ground.adapts else None,
            )
        ready_adapter(trainer.model)
        return trainer

    def _own_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        knobs = self.config.hyperparameters
        return {
            "gradient_checkpointing": None,  # TRL's default would come on top of what is decided under the newer name
            "num_generations": knobs.num_generations,
            "num_generations_eval": 1,
            "steps_per_generation": arguments["gradient_accumulation_steps"],  # nothing that was generated outlives its optimizer step
            "max_completion_length": knobs.max_completion_length,
            "temperature": knobs.temperature,
            "top_p": knobs.top_p,
            "top_k": knobs.top_k,
            "beta": knobs.beta,
            "loss_type": knobs.loss_type,
            "scale_rewards": knobs.scale_rewards,
            "mask_truncated_completions": knobs.mask_truncated_completions,
            "disable_dropout": not knobs.lora_dropout,
            "reward_weights": [grader.weight for grader in self.named],
        }

    def rewards(self, trainer: Any, places: list[int], completions: list[Any]) -> Any:
        """Rewards (answers, graders) of all processes; NaN where an answer cannot be compared with its group. Rank 0 grades them all."""
        import torch
        from accelerate.utils import broadcast_object_list, gather_object

        answered = gather_object(list(zip(places, completions, strict=True)))
        known = [self._graded(trainer, answered) if trainer.accelerator.is_main_process else []]
        broadcast_object_list(known)
        rewards = torch.tensor(known[0], dtype=torch.float32, device=trainer.accelerator.device).T
        return incomparable_left_out(rewards, trainer.num_generations)

    def _graded(self, trainer: Any, answered: list[tuple[int, Any]]) -> list[list[float]]:
        """What each grader gives to each answer."""
        rows, completions = [self.train[place] for place, _ in answered], [completion for _, completion in answered]
        prompts, columns = [row.prompt for row in rows], [row.columns for row in rows]
        given = [grader(prompts, completions, row=columns, log_metric=trainer._log_metric) for grader in self.graders]
        return [[NAN if reward is None else reward for reward in rewards] for rewards in given]

    def window(self, trainer: Any) -> MutableMapping[str, list[float]]:
        return trainer._metrics["train"]

    def tokens_in(self, inputs: Any) -> int:
        return 0  # they are not generated yet; the trainer counts them when they are

    def measure(self, trainer: Any, pulse: Callable[[], None]) -> EvalMetrics:
        """What the graders give, in the mean, to the model's likeliest answers to the held-out prompts."""
        began = time.monotonic()
        knobs = self.config.hyperparameters
        prompts = [row.prompt_ids for row in self.held_out]
        self.said = answers(
            trainer.model,
            self.ground.tokenizer,
            prompts,
            max_new_tokens=knobs.max_completion_length,
            batch_size=at_once(knobs.batch_size, prompts, knobs.max_completion_length),
            pulse=pulse,
        )
        self._show(trainer.the_course)
        cases = [row.case(text) for row, text in zip(self.held_out, self.said, strict=True)]
        grades = {grader.__name__: grader.grade(cases) for grader in self.graders}
        values = {name: value for name, given in grades.items() for name, value in summary(name, given).items()}
        reward = mean_reward({grader.__name__: grader.weight for grader in self.graders}, grades)
        notes = {name: "the grader could not judge a single answer" for name, value in values.items() if value is None}
        if reward is None:
            notes["reward"] = "there is no answer that every grader could judge"
        return EvalMetrics(
            eval_loss=None if reward is None else -reward,  # what is made smaller: the best checkpoint, and the end of hope, go by it
            eval_runtime=time.monotonic() - began,
            eval_rows=len(self.held_out),
            values={"reward": reward} | values,
            notes=notes,
        )

    @property
    def _answers_per_step(self) -> int:
        knobs = self.config.hyperparameters
        return knobs.batch_size * knobs.gradient_accumulation_steps

    @property
    def _prompts_per_step(self) -> int:
        return self._answers_per_step // self.config.hyperparameters.num_generations

    def _show(self, course: Course) -> None:
        """A few of the answers. Rows with a completion of their own are shown by the loop, beside that."""
        count = self.config.eval_config.sample_prompts
        rows = [row for row in self.held_out if not row.tokens.teaches]
        if not count or not rows:
            return
        when = "before" if course.step == 0 else "after" if course.is_done else "during"
        samples = samples_of([row.tokens.prompt_text for row in rows], [None] * len(rows), self.said, count)
        self.ground.context.sampled(Sampled(when=when, step=course.step, samples=samples))

    def _with_answer(self, tokens: TokenRow, said: str) -> TokenRow:
        if tokens.teaches:
            return tokens
        ids = self.ground.tokenizer(said, add_special_tokens=False)["input_ids"]
        return TokenRow(tokens.input_ids + ids, [NO_LABEL] * (len(tokens.input_ids) + len(ids)), tokens.prompt_text, tokens.prompt_tokens)


def mean_reward(weights: dict[str, float], grades: dict[str, list[Grade]]) -> float | None:
    """The mean of the weighted sums, over the answers that no grader failed on; None without any."""
    sums = [
        sum(weights[name] * grade for name, grade in zip(grades, given, strict=True) if not isinstance(grade, Failed))
        for given in zip(*grades.values(), strict=True)
        if not any(isinstance(grade, Failed) for grade in given)
    ]
    return sum(sums) / len(sums) if sums else None


def prompt_tokens(prompt: str | list[dict[str, Any]], tokenizer: Any) -> TokenRow:
    """A prompt as the model reads it: messages by the chat template, up to where the assistant speaks. Raises JobFailed."""
    if isinstance(prompt, str):
        row = tokens_of({"text": prompt}, "text", tokenizer)
        ids = row.input_ids[:-1]  # without the end
        return TokenRow(ids, [NO_LABEL] * len(ids), prompt, len(ids))
    answered = {"prompt": prompt, "completion": [{"role": "assistant", "content": ""}]}
    row = tokens_of(answered, "prompt_completion", tokenizer)
    ids = row.input_ids[: row.prompt_tokens]
    return TokenRow(ids, [NO_LABEL] * len(ids), row.prompt_text, len(ids))


def log_probabilities(
    model: Any,
    input_ids: Any,
    attention_mask: Any,
    answer_length: int,
    batch_size: int | None = None,
    *,
    temperature: float,
    compute_entropy: bool = False,
    **_: Any,
) -> tuple[Any, Any, None]:
    """The log-probability of each token of the answers, which are the last ones of `input_ids` (B, T), and the entropy there, as TRL
    wants them: (B, answer_length) each. `batch_size` answers go through the model at once."""
    import torch

    labels = input_ids.masked_fill(attention_mask == 0, NO_LABEL)
    labels[:, :-answer_length] = NO_LABEL
    parts: list[Any] = []
    for ids, mask, wanted in zip(*(part.split(batch_size or len(labels)) for part in (input_ids, attention_mask, labels)), strict=True):
        logits, said = labelled_logits(model, {"input_ids": ids, "attention_mask": mask}, wanted)
        logps = (logits / temperature).log_softmax(-1)
        with torch.no_grad():
            entropy = -(logps.exp() * logps).sum(-1)
        there = wanted[:, -answer_length:] != NO_LABEL
        figures = (logps.gather(-1, said.unsqueeze(-1)).squeeze(-1), entropy)
        # A scatter keeps the model connected when no answer counts: its gradient is zero, and not missing.
        parts.append([figure.new_zeros(there.shape).masked_scatter(there, figure) for figure in figures])
    logps, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
    return logps, entropy if compute_entropy else None, None


@contextmanager
def drawn_anew(what: str) -> Iterator[None]:
    """Inside, random numbers depend on `what` alone, and go on afterwards as if none had been drawn: however many processes answer,
    and wherever a training was resumed, the answers are the same."""
    import torch

    with same_randomness():
        torch.manual_seed(random.Random(what).getrandbits(63))  # noqa: S311  # no secret
        yield


def shuffled_by_epoch(sampler: Any, epoch: Callable[[], int]) -> Any:
    """The sampler with an order that depends on seed and epoch alone. TRL's own goes on from the epoch before, which a training that
    was resumed has not seen."""

    class ShuffledByEpoch(type(sampler)):
        def __iter__(self) -> Iterator[int]:
            self.generator.manual_seed(self.seed + epoch())
            return super().__iter__()

    sampler.__class__ = ShuffledByEpoch
    return sampler


@contextmanager
def said_to_be_from(folder: Path, model: Any) -> Iterator[None]:
    """Inside, the model says that it was loaded from there. With `beta`, TRL loads the reference from where the model came from,
    which for a training that goes on would be a checkpoint."""
    config, name = model.config, model.config._name_or_path
    config._name_or_path = str(folder)
    try:
        yield
    finally:
        config._name_or_path = name


def _prepare(ground: Ground, config: GrpoConfig, graders: list[RewardFunction]) -> GrpoLesson:
    """Rows to prompts, and the graders asked. Raises JobFailed when nothing can come of them."""
    train_rows = _read(ground, config, TRAIN_SPLIT)
    held_out = _read(ground, config, EVAL_SPLIT) if EVAL_SPLIT in ground.splits else []
    refuse_nothing_to_learn(ground, len(train_rows), len(held_out))
    named = [Named(grader.__name__, grader.weight) for grader in graders]
    lesson = GrpoLesson(ground, config, train_rows, held_out, graders, named, new_tokens(ground, [row.tokens for row in train_rows]))
    if not lesson.items:
        message = f"there are {len(train_rows)} prompts, and an optimizer step takes {lesson._prompts_per_step}"
        raise JobFailed("invalid_data", message, "send more prompts, or lower batch_size or gradient_accumulation_steps")
    if not ground.context.spec.export_of:
        check_graders(graders, [row.case("") for row in train_rows + held_out])
    return lesson


def _read(ground: Ground, config: GrpoConfig, split: str) -> list[PromptRow]:
    """The rows of a split whose prompts leave room for a completion; every column is in every row."""
    room = config.hyperparameters.max_seq_length - config.hyperparameters.max_completion_length
    dataset_type = ground.context.spec.dataset.dataset_type
    stored = list(read_rows(ground.splits[split]))
    names = sorted({name for row in stored for name in row} - {"prompt"})
    rows: list[PromptRow] = []
    for row in stored:
        columns = {name: row.get(name) for name in names}
        tokens = prompt_tokens(row["prompt"], ground.tokenizer)
        if dataset_type == "prompt_completion":
            columns["completion"] = text_of(row["completion"])
            tokens = tokens_of(row, dataset_type, ground.tokenizer)
        if tokens.prompt_tokens <= room:
            rows.append(PromptRow(row["prompt"], tokens, columns))
    tell_losses(ground, split, Rendered(dropped=len(stored) - len(rows)))
    return rows
