"""Group relative policy optimization: learn from the rewards that graders give to the model's own completions.

    1. rows to prompts, and the columns that graders read; every grader checks that it can grade them
    2. the model completes a prompt several times and the graders reward each completion; completions with a higher reward than the
       others of their prompt become more likely
    3. held-out prompts are completed greedily and graded, which gives the reward that a user would see

If a grader fails on some completions of a group, these are not compared with the others: see `mask_incomparable`. All completions of an
optimizer step, or of `num_iterations` of them, are generated at its beginning, one batch at a time. A training is saved, evaluated and
stopped only before the next ones are generated, so that no completion has to be in a checkpoint. With several processes each generates
its share, and rank 0 grades all completions.
"""

import math
import time
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.data.mixing import MixedRows, load_mixed
from jobs.llm.data.prompts import PromptRow
from jobs.llm.data.splits import require_examples, untrained_special_tokens, warn_truncation
from jobs.llm.data.tokenize import TokenizedExample, read_rows
from jobs.llm.evaluation.generation import generate_batch, make_samples, max_generation_batch
from jobs.llm.graders import build_graders, check_graders, close_graders
from jobs.llm.graders.base import FailedGrade, Grade
from jobs.llm.graders.reward import RewardFunction, summarize_grades, to_text
from jobs.llm.grpo_trainer import GrpoTrainerMixin, RewardPlaceholder, override_name_or_path
from jobs.llm.model import load_base, lora_config
from jobs.llm.preference import cast_adapter_to_fp32, index_dataset, validate_dataset_type
from jobs.llm.trained_model import TrainedModel
from jobs.llm.training_context import LossReduction, TrainingContext, prepare_training
from jobs.llm.training_loop import run_training
from jobs.runtime.batch_config import BatchConfig
from jobs.runtime.errors import JobFailed
from jobs.runtime.save_policy import TrainingControlState
from jobs.runtime.training_control import TrainingControl
from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT
from schema.estimate.llm_memory import LongestRows, find_longest_rows
from schema.events import SamplesGenerated
from schema.job import EvalMetrics
from schema.training import GrpoConfig

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext

PROMPTS_PER_STEP_ON_GPU = 8  # 64 completions with the default num_generations


def train(config: GrpoConfig, context: "JobContext") -> TrainedModel:
    """Train as configured, or resume an earlier attempt. Raises JobFailed and Stopped."""
    validate_dataset_type(config, context)
    training = prepare_training(config, context)
    graders = build_graders(config, context)
    try:
        prompts = load_mixed(
            training, lambda source: {name: MixedRows(_load_prompts(source, config, name), 0, 0) for name in source.splits}
        )
        train_prompts = list(prompts[TRAIN_SPLIT].rows)
        held_out = list(prompts[EVAL_SPLIT].rows) if EVAL_SPLIT in prompts else []
        require_examples(training, len(train_prompts), len(held_out))
        config = choose_gradient_accumulation(config, training, len(train_prompts))
        training = replace(training, config=config)
        task = GrpoTask(
            training,
            config,
            train_prompts,
            held_out,
            graders,
            [RewardPlaceholder(grader.__name__, grader.weight) for grader in graders],
            untrained_special_tokens(training, [row.tokens for row in train_prompts]),
        )
        task.require_full_step()
        if not context.spec.export_of:
            check_graders(graders, [row.make_grading_input("") for row in train_prompts + held_out])
        return run_training(task, training)
    finally:
        close_graders(graders)


def choose_gradient_accumulation(config: GrpoConfig, training: TrainingContext, num_prompts: int) -> GrpoConfig:
    """The config with `gradient_accumulation_steps`: the requested ones, those of the checkpoint, or what suits the device.

    Advantages of few prompts are noise: on a GPU a step has 8 prompts if the dataset has as many. Logs the decision.
    """
    hyperparameters, context = config.hyperparameters, training.context
    if hyperparameters.gradient_accumulation_steps is not None:
        return config
    fewest = hyperparameters.num_generations // math.gcd(hyperparameters.batch_size, hyperparameters.num_generations)
    prompts = fewest * hyperparameters.batch_size // hyperparameters.num_generations  # that fill the fewest forward passes
    steps, reason = fewest, "on a CPU a step has as few prompts as possible"
    if training.resume_checkpoint is not None:
        saved = BatchConfig.from_details(TrainingControlState.read(training.resume_checkpoint.folder).details)
        steps, reason = saved.effective_batch_size // hyperparameters.batch_size, "the checkpoint was trained with as many rows a step"
    elif training.device_config.on_gpu:
        steps = fewest * max(1, min(math.ceil(PROMPTS_PER_STEP_ON_GPU / prompts), num_prompts // prompts))
        count = steps * hyperparameters.batch_size // hyperparameters.num_generations
        reason = f"a step has {count} prompts, each with num_generations completions"
    context.log_decision("gradient_accumulation_steps", str(steps), reason)
    chosen = hyperparameters.model_copy(update={"gradient_accumulation_steps": steps})
    return config.model_copy(update={"hyperparameters": chosen})


def _load_prompts(training: TrainingContext, config: GrpoConfig, split: str) -> list[PromptRow]:
    """The rows of a split whose prompts leave room for a completion. Every row has every column of the split."""
    max_prompt_tokens = config.hyperparameters.max_seq_length - config.hyperparameters.max_completion_length
    dataset_type = training.dataset.dataset_type
    stored = list(read_rows(training.splits[split]))
    column_names = sorted({name for row in stored for name in row} - {"prompt"})
    rows: list[PromptRow] = []
    for row in stored:
        if row.get("tools"):
            raise JobFailed("invalid_data", "grpo does not offer tools to the model, and a row has tools", "remove tools from the rows")
        columns = {name: row.get(name) for name in column_names}
        tokens = training.row_tokenizer.tokenize_prompt(row["prompt"])
        if dataset_type == "prompt_completion":
            columns["completion"] = to_text(row["completion"])
            tokens = training.row_tokenizer.tokenize(row, dataset_type)
        if tokens.prompt_tokens <= max_prompt_tokens:
            rows.append(PromptRow(row["prompt"], tokens, columns))
    warn_truncation(training, split, truncated=0, dropped=len(stored) - len(rows))
    return rows


@dataclass
class GrpoTask:
    """Prompts, and the graders of the model's completions."""

    training: TrainingContext
    config: GrpoConfig
    train_prompts: list[PromptRow]
    held_out: list[PromptRow]
    graders: list[RewardFunction]  # only in rank 0: they may hold secrets, and they count their failures
    reward_placeholders: list[RewardPlaceholder]  # one for each grader, in every process
    trainable_token_ids: list[int]
    held_out_completions: list[str] = field(default_factory=list)  # of the last evaluation

    @property
    def examples_per_epoch(self) -> int:
        """Completions per epoch, each as often as it is trained on. Prompts that do not fill a step are left for another epoch, which
        has another order."""
        steps = len(self.train_prompts) // self._prompts_per_step * self.config.hyperparameters.num_iterations
        return steps * self._completions_per_step

    def require_full_step(self) -> None:
        """Raises JobFailed if there are fewer prompts than an optimizer step takes."""
        if not self.examples_per_epoch:
            message = f"there are {len(self.train_prompts)} prompts, and an optimizer step takes {self._prompts_per_step}"
            raise JobFailed("invalid_data", message, "send more prompts, or lower batch_size or gradient_accumulation_steps")

    @property
    def _completions_per_step(self) -> int:
        hyperparameters = self.config.hyperparameters
        return hyperparameters.batch_size * hyperparameters.accumulation_steps

    @property
    def _prompts_per_step(self) -> int:
        return self._completions_per_step // self.config.hyperparameters.num_generations

    @property
    def held_out_examples(self) -> Sequence[TokenizedExample]:
        """Held-out rows. A row without a completion of its own gets the model's, so that exported files can be compared on it."""
        completions = self.held_out_completions or [""] * len(self.held_out)
        tokenizer = self.training.tokenizer
        return [row.tokens_with_completion(completion, tokenizer) for row, completion in zip(self.held_out, completions, strict=True)]

    def find_longest_rows(self, count: int) -> LongestRows:
        completion = self.config.hyperparameters.max_completion_length
        return find_longest_rows(((len(row.prompt_ids) + completion, completion) for row in self.train_prompts), count)

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
        """Without an adapter: TRL adds it, and then uses the model without it as the reference."""
        return load_base(self.config, self.training.device_config, weights)

    def build_trainer(self, model: Any, arguments: dict[str, Any], instrument: Callable[[type], type], control: TrainingControl) -> Any:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        control.steps_between_saves = self.config.hyperparameters.num_iterations
        task, training = self, self.training

        class PretokenizedGrpoTrainer(GrpoTrainerMixin, GRPOTrainer):
            """The mixin with the values of this training."""

            training_control = control
            train_prompts = task.train_prompts
            graders = task.graders
            # Without Triton, TRL's LM head computes every position; and it does not support trainable tokens in the head.
            uses_own_log_probs = bool(task.trainable_token_ids) or not training.device_config.on_gpu
            row_tokenizer = training.row_tokenizer

        prompts = [{"prompt": row.prompt, "row_index": index} for index, row in enumerate(self.train_prompts)]
        peft_config = lora_config(self.config, model, trainable_token_ids=self.trainable_token_ids) if training.trains_adapter else None
        with override_name_or_path(training.base_folder, model):
            trainer = instrument(PretokenizedGrpoTrainer)(
                model=model,
                reward_funcs=list(self.reward_placeholders),
                args=GRPOConfig(**arguments | self._grpo_arguments(arguments)),
                train_dataset=Dataset.from_list(prompts),
                eval_dataset=index_dataset(self.held_out) if self.held_out else None,  # never read: `evaluate` has its own
                processing_class=training.tokenizer,
                peft_config=peft_config,
            )
        cast_adapter_to_fp32(trainer.model)
        return trainer

    def _grpo_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        hyperparameters = self.config.hyperparameters
        return {
            "gradient_checkpointing": None,  # TRL's default would be added to activation_checkpointing, which decides it
            "num_generations": hyperparameters.num_generations,
            "num_generations_eval": 1,
            "steps_per_generation": arguments["gradient_accumulation_steps"],
            "num_iterations": hyperparameters.num_iterations,
            "epsilon": hyperparameters.epsilon,
            "epsilon_high": hyperparameters.epsilon_high,  # None: epsilon
            "max_completion_length": hyperparameters.max_completion_length,
            "temperature": hyperparameters.temperature,
            "top_p": hyperparameters.top_p,
            "top_k": hyperparameters.top_k,
            "beta": hyperparameters.beta,
            "loss_type": hyperparameters.loss_type,
            "scale_rewards": hyperparameters.scale_rewards,
            "mask_truncated_completions": hyperparameters.mask_truncated_completions,
            "disable_dropout": not hyperparameters.lora_dropout,
            "reward_weights": [grader.weight for grader in self.reward_placeholders],
        }

    def logged_metrics_buffer(self, trainer: Any) -> MutableMapping[str, list[float]]:
        return trainer._metrics["train"]

    def count_tokens(self, inputs: Any) -> int:
        return 0  # nothing is generated yet; GrpoTrainerMixin counts the tokens

    def evaluate(self, trainer: Any, check_stop: Callable[[], None]) -> EvalMetrics:
        """The mean rewards of greedy completions of the held-out prompts."""
        started_at = time.monotonic()
        hyperparameters = self.config.hyperparameters
        prompts = [row.prompt_ids for row in self.held_out]
        self.held_out_completions = generate_batch(
            trainer.model,
            self.training.tokenizer,
            prompts,
            max_new_tokens=hyperparameters.max_completion_length,
            batch_size=max_generation_batch(hyperparameters.batch_size, prompts, hyperparameters.max_completion_length),
            check_stop=check_stop,
        )
        self._emit_samples(trainer.training_control)
        inputs = [row.make_grading_input(completion) for row, completion in zip(self.held_out, self.held_out_completions, strict=True)]
        grades = {grader.__name__: grader.grade(inputs) for grader in self.graders}
        values = {
            name: value for grader, grader_grades in grades.items() for name, value in summarize_grades(grader, grader_grades).items()
        }
        reward = compute_mean_reward({grader.__name__: grader.weight for grader in self.graders}, grades)
        infinite = find_infinite({"reward": reward, **values})
        values = {name: None if name in infinite else value for name, value in values.items()}
        reward = None if "reward" in infinite else reward
        notes = {name: "the grader failed on every completion" for name, value in values.items() if value is None}
        if reward is None:
            notes["reward"] = "there is no completion on which every grader succeeded"
        notes |= dict.fromkeys(infinite, "the sum of the grades is not a finite number")
        return EvalMetrics(
            eval_loss=None if reward is None else -reward,  # lower is better for the best checkpoint and early stopping
            eval_runtime=time.monotonic() - started_at,
            eval_rows=len(self.held_out),
            values={"reward": reward} | values,
            notes=notes,
        )

    def _emit_samples(self, control: TrainingControl) -> None:
        """Log some completions as samples. evaluate.py logs those of rows with a completion of their own."""
        count = self.config.eval_config.sample_prompts
        rows = [row for row in self.held_out if not row.tokens.has_labels]
        if not count or not rows:
            return
        when = "before" if control.step == 0 else "after" if control.is_done else "during"
        samples = make_samples(
            self.training.chat_format,
            self.training.tokenizer,
            [row.tokens.prompt_text for row in rows],
            [None] * len(rows),
            self.held_out_completions,
            count,
        )
        self.training.context.log_samples(SamplesGenerated(when=when, step=control.step, samples=samples))


def find_infinite(values: dict[str, float | None]) -> set[str]:
    """The names of values that are no finite number: the sum of finite grades and weights can be too large for one."""
    return {name for name, value in values.items() if value is not None and not math.isfinite(value)}


def compute_mean_reward(weights: dict[str, float], grades: dict[str, list[Grade]]) -> float | None:
    """The mean of the weighted rewards over the completions on which no grader failed; None if there are none."""
    sums = [
        sum(weights[name] * grade for name, grade in zip(grades, completion_grades, strict=True) if not isinstance(grade, FailedGrade))
        for completion_grades in zip(*grades.values(), strict=True)
        if not any(isinstance(grade, FailedGrade) for grade in completion_grades)
    ]
    return sum(sums) / len(sums) if sums else None
