"""TRL's GRPO trainer with our prompt tokens, graders and reproducible sampling.

Every override calls TRL's own method or replaces it where TRL has no option for what we need. `trainers/grpo.py` builds the trainer.
"""

import random
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.data.prompts import PromptRow
from jobs.llm.data.tokenize import RowTokenizer
from jobs.llm.distributed import disable_metric_gathering
from jobs.llm.evaluation.state import preserve_rng_state
from jobs.llm.graders.reward import RewardFunction, mask_incomparable
from jobs.llm.loss import compute_log_probs
from jobs.runtime.training_control import TrainingControl

if TYPE_CHECKING:
    from trl import GRPOTrainer
else:
    GRPOTrainer = object  # GrpoTrainerMixin is a mixin; importing this module must not import TRL

NAN = float("nan")


class GrpoTrainerMixin(GRPOTrainer):
    """A mixin of TRL's trainer: generates one batch at a time, and grades in rank 0."""

    # Set by the subclass.
    training_control: TrainingControl
    train_prompts: list[PromptRow]
    graders: list[RewardFunction]  # empty in other ranks than 0
    uses_own_log_probs: bool
    row_tokenizer: RowTokenizer

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return epoch_seeded_sampler(super()._get_train_sampler(dataset), lambda: int(self.state.epoch or 0))

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        inputs = super()._prepare_inputs(generation_batch)
        tokens = inputs["prompt_mask"].sum() + inputs["completion_mask"].sum()
        self.training_control.tokens_seen += int(self.accelerator.gather(tokens).sum())
        return inputs

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        before = {name: list(values) for name, values in self._metrics["train"].items()}
        scored = super()._generate_and_score_completions(inputs)
        if not self.accelerator.is_main_process:  # these metrics are of all processes already; only rank 0 reports them
            self._metrics["train"].clear()
            self._metrics["train"].update(before)
        return scored

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [self.row_tokenizer.tokenize_prompt(prompt).input_ids for prompt in prompts], None, {}

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> tuple[list[list[int]], None]:
        batch_size = self.args.per_device_train_batch_size
        first = self.accelerator.process_index * len(prompt_ids)
        completion_ids: list[list[int]] = []
        for n in range(0, len(prompt_ids), batch_size):
            with deterministic_sampling(f"{self.args.seed} {self.state.global_step} {first + n}"):
                completion_ids += super()._generate_single_turn(prompt_ids[n : n + batch_size], *args, **kwargs)[0]
        return completion_ids, None

    def _calculate_rewards(self, inputs: list[Any], prompts: list[Any], completions: list[Any], completion_ids_list: Any) -> Any:
        """Rewards (completions, graders) of all processes, graded in rank 0. NaN where a completion cannot be compared with its group."""
        import torch
        from accelerate.utils import broadcast_object_list, gather_object

        row_indices = [row["row_index"] for row in inputs]
        all_completions = gather_object(list(zip(row_indices, completions, strict=True)))
        rewards_by_grader = [self._grade(all_completions) if self.accelerator.is_main_process else []]
        broadcast_object_list(rewards_by_grader)
        rewards = torch.tensor(rewards_by_grader[0], dtype=torch.float32, device=self.accelerator.device).T
        return mask_incomparable(rewards, self.num_generations)

    def _grade(self, indexed_completions: list[tuple[int, Any]]) -> list[list[float]]:
        """The rewards of each grader for each completion; NaN where a grader failed."""
        rows = [self.train_prompts[index] for index, _ in indexed_completions]
        completions = [completion for _, completion in indexed_completions]
        prompts, columns = [row.prompt for row in rows], [row.columns for row in rows]
        rewards_by_grader = [grader(prompts, completions, row=columns, log_metric=self._log_metric) for grader in self.graders]
        return [[NAN if reward is None else reward for reward in rewards] for rewards in rewards_by_grader]

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self.uses_own_log_probs:
            return compute_log_probs(model, *args, temperature=self.temperature, **kwargs)
        return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with disable_metric_gathering(self.accelerator):
            return super().compute_loss(*args, **kwargs)


@dataclass(frozen=True)
class RewardPlaceholder:
    """A reward function for TRL that is never called: GrpoTrainerMixin calls the graders, in rank 0."""

    name: str
    weight: float

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, *_: object, **__: object) -> list[float | None]:
        raise NotImplementedError(f"GrpoTrainerMixin calls grader {self.name!r}")


@contextmanager
def override_name_or_path(folder: Path, model: Any) -> Generator[None]:
    """Inside, the model's config names `folder` as its source. With `beta`, TRL loads the reference model from there; for a resumed
    training it would otherwise load the checkpoint."""
    config, name = model.config, model.config._name_or_path
    config._name_or_path = str(folder)
    try:
        yield
    finally:
        config._name_or_path = name


@contextmanager
def deterministic_sampling(seed: str) -> Generator[None]:
    """Inside, random numbers depend only on `seed`; afterwards the RNG state is restored. So the completions do not depend on the
    number of processes, or on where a training was resumed."""
    import torch

    with preserve_rng_state():
        torch.manual_seed(random.Random(seed).getrandbits(63))  # noqa: S311  # not for security
        yield


def epoch_seeded_sampler(sampler: Any, epoch: Callable[[], int]) -> Any:
    """The sampler with an order that depends only on seed and epoch. TRL's own continues from the previous epoch's random state, which
    a resumed training does not have."""

    class EpochSeededSampler(type(sampler)):
        def __iter__(self) -> Iterator[int]:
            self.generator.manual_seed(self.seed + epoch())
            return super().__iter__()

    sampler.__class__ = EpochSeededSampler
    return sampler
