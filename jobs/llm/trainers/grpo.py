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

from jobs.llm.data.tokenize import IGNORE_INDEX, TokenizedExample, TokenizedSplit, read_rows, tokenize_row
from jobs.llm.distributed import LossReduction, disable_metric_gathering
from jobs.llm.evaluation.generation import generate_batch, make_samples, max_generation_batch
from jobs.llm.evaluation.state import preserve_rng_state
from jobs.llm.graders import build_graders, check_graders, close_graders
from jobs.llm.graders.base import FailedGrade, Grade, GradingInput
from jobs.llm.graders.reward import RewardFunction, mask_incomparable, summarize_grades, to_text
from jobs.llm.loss import compute_labeled_logits
from jobs.llm.model import load_base, lora_config
from jobs.llm.preference import cast_adapter_to_fp32, index_dataset, validate_dataset_type
from jobs.llm.trained_model import TrainedModel
from jobs.llm.training_loop import (
    TrainingContext,
    prepare_training,
    require_examples,
    run_training,
    untrained_special_tokens,
    warn_truncation,
)
from jobs.runtime.errors import JobFailed
from jobs.runtime.training_control import TrainingControl
from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT
from schema.events import SamplesGenerated
from schema.job import EvalMetrics
from schema.training import GrpoConfig

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext

NAN = float("nan")


def train(config: GrpoConfig, context: "JobContext") -> TrainedModel:
    """Train as the config says, or go on where an attempt before left off. Raises JobFailed and Stopped."""
    validate_dataset_type(config, context)
    ground = prepare_training(config, context)
    graders = build_graders(config, context)
    try:
        return run_training(_build_task(ground, config, graders), ground)
    finally:
        close_graders(graders)


@dataclass(frozen=True)
class PromptRow:
    """A row: what the model is asked, and what graders may read beside it."""

    prompt: str | list[dict[str, Any]]
    tokens: TokenizedExample  # the prompt; with the row's own completion if it has one
    columns: dict[str, Any]

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt as the model reads it."""
        return self.tokens.input_ids[: self.tokens.prompt_tokens]

    def make_grading_input(self, completion: str) -> GradingInput:
        """That completion, to be graded."""
        return GradingInput(to_text(self.prompt), completion, self.columns)


@dataclass(frozen=True)
class RewardPlaceholder:
    """A grader as TRL knows it, in every process: the lesson asks it itself, in rank 0."""

    name: str
    weight: float

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, *_: object, **__: object) -> list[float | None]:
        raise NotImplementedError(f"grader {self.name!r} is asked by the lesson")


@dataclass
class GrpoTask:
    """Prompts, and graders of what the model answers."""

    training: TrainingContext
    config: GrpoConfig
    train_prompts: list[PromptRow]
    held_out: list[PromptRow]
    graders: list[RewardFunction]  # none in another process than rank 0: they may know secrets, and count their failures
    reward_placeholders: list[RewardPlaceholder]  # the same
    trainable_token_ids: list[int]
    held_out_completions: list[str] = field(
        default_factory=list
    )  # what the model answered to the held-out prompts when it was last measured

    @property
    def examples_per_epoch(self) -> int:
        """Answers in an epoch. Prompts that do not fill a step are left for another epoch, which has another order."""
        return len(self.train_prompts) // self._prompts_per_step * self._completions_per_step

    @property
    def held_out_examples(self) -> Sequence[TokenizedExample]:
        """Held-out rows; those without a completion of their own with the model's, on which exported files can be compared."""
        said = self.held_out_completions or [""] * len(self.held_out)
        return [self._with_completion(row.tokens, text) for row, text in zip(self.held_out, said, strict=True)]

    @property
    def has_held_out_rows(self) -> bool:
        return bool(self.held_out)

    @property
    def train_examples(self) -> Sequence[TokenizedExample]:
        return [row.tokens for row in self.train_prompts]

    @property
    def worker_task_factory(self) -> "Callable[[TrainingContext], GrpoTask]":
        return partial(
            GrpoTask,
            config=self.config,
            train_prompts=self.train_prompts,
            held_out=[],
            graders=[],
            reward_placeholders=self.reward_placeholders,
            trainable_token_ids=self.trainable_token_ids,
        )

    @property
    def loss_reduction(self) -> LossReduction:
        return "trainer"

    def build_model(self, weights: Path) -> Any:
        """Without an adapter: the library puts it on, and knows then that the model without it is what to compare with."""
        return load_base(self.config, self.training.device_config, weights)

    def build_trainer(self, model: Any, arguments: dict[str, Any], instrument: Callable[[type], type], control: TrainingControl) -> Any:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        lesson, ground = self, self.training
        # TRL's head scores every position where there is no Triton, and knows nothing of a head of which a few rows are trained.
        scores_itself = bool(self.trainable_token_ids) or not ground.device_config.on_gpu

        class PretokenizedGrpoTrainer(GRPOTrainer):
            """TRL's trainer with our prompts' tokens, our rewards, and answers made a few at once."""

            training_control = control

            def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
                inputs = super()._prepare_inputs(generation_batch)
                tokens = inputs["prompt_mask"].sum() + inputs["completion_mask"].sum()
                control.tokens_seen += int(self.accelerator.gather(tokens).sum())
                return inputs

            def compute_loss(self, *inputs: Any, **how: Any) -> Any:
                with disable_metric_gathering(self.accelerator):
                    return super().compute_loss(*inputs, **how)

            def _generate_and_score_completions(self, inputs: Any) -> Any:
                before = {name: list(values) for name, values in self._metrics["train"].items()}
                answered = super()._generate_and_score_completions(inputs)
                if not self.accelerator.is_main_process:  # these figures are of all answers already, and rank 0 has them
                    self._metrics["train"].clear()
                    self._metrics["train"].update(before)
                return answered

            def _get_train_sampler(self, dataset: Any = None) -> Any:
                return epoch_seeded_sampler(super()._get_train_sampler(dataset), lambda: int(self.state.epoch or 0))

            def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
                return [tokenize_prompt(prompt, self.processing_class).input_ids for prompt in prompts], None, {}

            def _generate_single_turn(self, prompt_ids: list[list[int]], *rest: Any, **named: Any) -> tuple[list[list[int]], None]:
                size = self.args.per_device_train_batch_size
                first = self.accelerator.process_index * len(prompt_ids)
                said: list[list[int]] = []
                for n in range(0, len(prompt_ids), size):
                    with deterministic_sampling(f"{self.args.seed} {self.state.global_step} {first + n}"):
                        said += super()._generate_single_turn(prompt_ids[n : n + size], *rest, **named)[0]
                return said, None

            def _get_per_token_logps_and_entropies(self, model: Any, *inputs: Any, **named: Any) -> Any:
                if scores_itself:
                    return compute_log_probs(model, *inputs, temperature=self.temperature, **named)
                return super()._get_per_token_logps_and_entropies(model, *inputs, **named)

            def _calculate_rewards(self, inputs: list[Any], prompts: list[Any], completions: list[Any], completion_ids_list: Any) -> Any:
                return lesson.compute_rewards(self, [row["row_index"] for row in inputs], completions)

        prompts = [{"prompt": row.prompt, "row_index": place} for place, row in enumerate(self.train_prompts)]
        with override_name_or_path(ground.base_folder, model):
            trainer = instrument(PretokenizedGrpoTrainer)(
                model=model,
                reward_funcs=list(self.reward_placeholders),
                args=GRPOConfig(**arguments | self._grpo_arguments(arguments)),
                train_dataset=Dataset.from_list(prompts),
                eval_dataset=index_dataset(self.held_out) if self.held_out else None,  # never read: `measure` has its own
                processing_class=ground.tokenizer,
                peft_config=lora_config(self.config, model, trainable_token_ids=self.trainable_token_ids)
                if ground.trains_adapter
                else None,
            )
        cast_adapter_to_fp32(trainer.model)
        return trainer

    def _grpo_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
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
            "reward_weights": [grader.weight for grader in self.reward_placeholders],
        }

    def compute_rewards(self, trainer: Any, row_indices: list[int], completions: list[Any]) -> Any:
        """Rewards (answers, graders) of all processes; NaN where an answer cannot be compared with its group. Rank 0 grades them all."""
        import torch
        from accelerate.utils import broadcast_object_list, gather_object

        answered = gather_object(list(zip(row_indices, completions, strict=True)))
        known = [self._grade(trainer, answered) if trainer.accelerator.is_main_process else []]
        broadcast_object_list(known)
        rewards = torch.tensor(known[0], dtype=torch.float32, device=trainer.accelerator.device).T
        return mask_incomparable(rewards, trainer.num_generations)

    def _grade(self, trainer: Any, answered: list[tuple[int, Any]]) -> list[list[float]]:
        """What each grader gives to each answer."""
        rows, completions = [self.train_prompts[place] for place, _ in answered], [completion for _, completion in answered]
        prompts, columns = [row.prompt for row in rows], [row.columns for row in rows]
        given = [grader(prompts, completions, row=columns, log_metric=trainer._log_metric) for grader in self.graders]
        return [[NAN if reward is None else reward for reward in rewards] for rewards in given]

    def logged_metrics_buffer(self, trainer: Any) -> MutableMapping[str, list[float]]:
        return trainer._metrics["train"]

    def count_tokens(self, inputs: Any) -> int:
        return 0  # they are not generated yet; the trainer counts them when they are

    def evaluate(self, trainer: Any, check_stop: Callable[[], None]) -> EvalMetrics:
        """What the graders give, in the mean, to the model's likeliest answers to the held-out prompts."""
        began = time.monotonic()
        knobs = self.config.hyperparameters
        prompts = [row.prompt_ids for row in self.held_out]
        self.held_out_completions = generate_batch(
            trainer.model,
            self.training.tokenizer,
            prompts,
            max_new_tokens=knobs.max_completion_length,
            batch_size=max_generation_batch(knobs.batch_size, prompts, knobs.max_completion_length),
            check_stop=check_stop,
        )
        self._emit_samples(trainer.training_control)
        cases = [row.make_grading_input(text) for row, text in zip(self.held_out, self.held_out_completions, strict=True)]
        grades = {grader.__name__: grader.grade(cases) for grader in self.graders}
        values = {name: value for name, given in grades.items() for name, value in summarize_grades(name, given).items()}
        reward = compute_mean_reward({grader.__name__: grader.weight for grader in self.graders}, grades)
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
    def _completions_per_step(self) -> int:
        knobs = self.config.hyperparameters
        return knobs.batch_size * knobs.gradient_accumulation_steps

    @property
    def _prompts_per_step(self) -> int:
        return self._completions_per_step // self.config.hyperparameters.num_generations

    def _emit_samples(self, control: TrainingControl) -> None:
        """A few of the answers. Rows with a completion of their own are shown by the loop, beside that."""
        count = self.config.eval_config.sample_prompts
        rows = [row for row in self.held_out if not row.tokens.has_labels]
        if not count or not rows:
            return
        when = "before" if control.step == 0 else "after" if control.is_done else "during"
        samples = make_samples([row.tokens.prompt_text for row in rows], [None] * len(rows), self.held_out_completions, count)
        self.training.context.log_samples(SamplesGenerated(when=when, step=control.step, samples=samples))

    def _with_completion(self, tokens: TokenizedExample, completion: str) -> TokenizedExample:
        if tokens.has_labels:
            return tokens
        ids = self.training.tokenizer(completion, add_special_tokens=False)["input_ids"]
        return TokenizedExample(
            tokens.input_ids + ids, [IGNORE_INDEX] * (len(tokens.input_ids) + len(ids)), tokens.prompt_text, tokens.prompt_tokens
        )


def compute_mean_reward(weights: dict[str, float], grades: dict[str, list[Grade]]) -> float | None:
    """The mean of the weighted sums, over the answers that no grader failed on; None without any."""
    sums = [
        sum(weights[name] * grade for name, grade in zip(grades, given, strict=True) if not isinstance(grade, FailedGrade))
        for given in zip(*grades.values(), strict=True)
        if not any(isinstance(grade, FailedGrade) for grade in given)
    ]
    return sum(sums) / len(sums) if sums else None


def tokenize_prompt(prompt: str | list[dict[str, Any]], tokenizer: Any) -> TokenizedExample:
    """A prompt as the model reads it: messages by the chat template, up to where the assistant speaks. Raises JobFailed."""
    if isinstance(prompt, str):
        row = tokenize_row({"text": prompt}, "text", tokenizer)
        ids = row.input_ids[:-1]  # without the end
        return TokenizedExample(ids, [IGNORE_INDEX] * len(ids), prompt, len(ids))
    answered = {"prompt": prompt, "completion": [{"role": "assistant", "content": ""}]}
    row = tokenize_row(answered, "prompt_completion", tokenizer)
    ids = row.input_ids[: row.prompt_tokens]
    return TokenizedExample(ids, [IGNORE_INDEX] * len(ids), row.prompt_text, len(ids))


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
    """The log-probability of each token of the answers, which are the last ones of `input_ids` (B, T), and the entropy there, as TRL
    wants them: (B, answer_length) each. `batch_size` answers go through the model at once."""
    import torch

    labels = input_ids.masked_fill(attention_mask == 0, IGNORE_INDEX)
    labels[:, :-completion_length] = IGNORE_INDEX
    parts: list[Any] = []
    for ids, mask, wanted in zip(*(part.split(batch_size or len(labels)) for part in (input_ids, attention_mask, labels)), strict=True):
        logits, said = compute_labeled_logits(model, {"input_ids": ids, "attention_mask": mask}, wanted)
        logps = (logits / temperature).log_softmax(-1)
        with torch.no_grad():
            entropy = -(logps.exp() * logps).sum(-1)
        there = wanted[:, -completion_length:] != IGNORE_INDEX
        figures = (logps.gather(-1, said.unsqueeze(-1)).squeeze(-1), entropy)
        # A scatter keeps the model connected when no answer counts: its gradient is zero, and not missing.
        parts.append([figure.new_zeros(there.shape).masked_scatter(there, figure) for figure in figures])
    logps, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
    return logps, entropy if compute_entropy else None, None


@contextmanager
def deterministic_sampling(seed: str) -> Iterator[None]:
    """Inside, random numbers depend on `what` alone, and go on afterwards as if none had been drawn: however many processes answer,
    and wherever a training was resumed, the answers are the same."""
    import torch

    with preserve_rng_state():
        torch.manual_seed(random.Random(seed).getrandbits(63))  # noqa: S311  # no secret
        yield


def epoch_seeded_sampler(sampler: Any, epoch: Callable[[], int]) -> Any:
    """The sampler with an order that depends on seed and epoch alone. TRL's own goes on from the epoch before, which a training that
    was resumed has not seen."""

    class ShuffledByEpoch(type(sampler)):
        def __iter__(self) -> Iterator[int]:
            self.generator.manual_seed(self.seed + epoch())
            return super().__iter__()

    sampler.__class__ = ShuffledByEpoch
    return sampler


@contextmanager
def override_name_or_path(folder: Path, model: Any) -> Iterator[None]:
    """Inside, the model says that it was loaded from there. With `beta`, TRL loads the reference from where the model came from,
    which for a training that goes on would be a checkpoint."""
    config, name = model.config, model.config._name_or_path
    config._name_or_path = str(folder)
    try:
        yield
    finally:
        config._name_or_path = name


def _build_task(training: TrainingContext, config: GrpoConfig, graders: list[RewardFunction]) -> GrpoTask:
    """Rows to prompts, and the graders asked. Raises JobFailed when nothing can come of them."""
    train_rows = _load_prompts(training, config, TRAIN_SPLIT)
    held_out = _load_prompts(training, config, EVAL_SPLIT) if EVAL_SPLIT in training.splits else []
    require_examples(training, len(train_rows), len(held_out))
    named = [RewardPlaceholder(grader.__name__, grader.weight) for grader in graders]
    lesson = GrpoTask(
        training, config, train_rows, held_out, graders, named, untrained_special_tokens(training, [row.tokens for row in train_rows])
    )
    if not lesson.examples_per_epoch:
        message = f"there are {len(train_rows)} prompts, and an optimizer step takes {lesson._prompts_per_step}"
        raise JobFailed("invalid_data", message, "send more prompts, or lower batch_size or gradient_accumulation_steps")
    if not training.context.spec.export_of:
        check_graders(graders, [row.make_grading_input("") for row in train_rows + held_out])
    return lesson


def _load_prompts(training: TrainingContext, config: GrpoConfig, split: str) -> list[PromptRow]:
    """The rows of a split whose prompts leave room for a completion; every column is in every row."""
    room = config.hyperparameters.max_seq_length - config.hyperparameters.max_completion_length
    dataset_type = training.context.spec.dataset.dataset_type
    stored = list(read_rows(training.splits[split]))
    names = sorted({name for row in stored for name in row} - {"prompt"})
    rows: list[PromptRow] = []
    for row in stored:
        columns = {name: row.get(name) for name in names}
        tokens = tokenize_prompt(row["prompt"], training.tokenizer)
        if dataset_type == "prompt_completion":
            columns["completion"] = to_text(row["completion"])
            tokens = tokenize_row(row, dataset_type, training.tokenizer)
        if tokens.prompt_tokens <= room:
            rows.append(PromptRow(row["prompt"], tokens, columns))
    warn_truncation(training, split, TokenizedSplit(dropped=len(stored) - len(rows)))
    return rows
