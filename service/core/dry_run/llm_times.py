"""How long a language model job takes on a device: the parts of the job, with what each of them repeats."""

from dataclasses import dataclass, replace

from schema.estimate.devices import Device
from schema.estimate.disk import estimate_checkpoint_bytes
from schema.estimate.llm_export import plan_artifacts, plan_export_phases
from schema.estimate.llm_memory import FP32_BYTES, PAIRED_TRAINER_TYPES
from schema.estimate.llm_plan import PassPlan
from schema.estimate.llm_shapes import ModelShape
from schema.estimate.llm_steps import StepPlan
from schema.estimate.llm_time import (
    Work,
    estimate_download,
    estimate_evaluation,
    estimate_preparation,
    estimate_saves,
    estimate_start,
    estimate_training,
    estimate_upload,
)
from schema.estimate.ranges import NOTHING, Range
from schema.training.llm import GrpoConfig, LlmTrainingConfig
from service.core.dry_run.llm_facts import LlmFacts, concatenates_rows, make_export_plan, make_step_plan

CHECKPOINT_INTERVAL_S = 300.0  # unless save_strategy is "no", an attempt saves at least as often
EXPORT_SPREAD = (0.4, 2.5)  # of the measured seconds of an export, by machine
LM_EVAL_ROW_TOKENS, LM_EVAL_ROWS = 400, 2000  # of a task, without lm_eval_limit: about


@dataclass(frozen=True)
class LlmTimes:
    """The times of one configuration. `is_stored`: the base is in the model store."""

    config: LlmTrainingConfig
    facts: LlmFacts
    is_stored: bool

    def list_phases(self, model: ModelShape, device: Device, plan: PassPlan, launcher: str, gpus: int = 1) -> list[tuple[str, Range]]:
        """Each part of the job, in order, with its seconds. Several GPUs may share the steps, at best evenly."""
        config, facts = self.config, self.facts
        steps = make_step_plan(config, facts, on_gpu=device.on_gpu)
        work = self._make_work(steps, plan, device)
        training = estimate_training(model, device, work).spread(1 / max(1, gpus), 1.0)
        evaluation, evaluations = self._estimate_evaluation(model, device, plan), self._count_evaluations(steps)
        export_plan = make_export_plan(config, model)
        exports = plan_export_phases(export_plan.kinds, len(export_plan.quantizations), model.parameters)
        exporting = sum(seconds for phase, seconds in exports if phase != "uploading")
        artifacts = sum(each.size_bytes for each in plan_artifacts(model, export_plan))
        saves = self.count_saves(steps, training)
        base_evaluations = 1 if evaluation != NOTHING else 0
        return [
            ("start", estimate_start(launcher)),
            ("downloading", estimate_download(model.weights_bytes, launcher, is_stored=self.is_stored)),
            ("tokenizing", estimate_preparation(facts.train.tokens + facts.held_out.tokens, model.weights_bytes)),
            ("evaluating the base", evaluation.scale(base_evaluations)),
            ("training", training),
            ("evaluating", evaluation.scale(evaluations)),
            ("saving checkpoints", self._estimate_saves(model, saves)),
            ("exporting", Range(exporting * EXPORT_SPREAD[0], exporting * EXPORT_SPREAD[1])),
            ("uploading", estimate_upload(artifacts, launcher)),
        ]

    def _make_work(self, steps: StepPlan, plan: PassPlan, device: Device) -> Work:
        config = self.config
        trainer = config.trainer_type_name()
        passes = steps.total_examples / max(1, plan.batch_size)
        padded = steps.total_tokens
        if not concatenates_rows(config, on_gpu=device.on_gpu) and not config.hyperparameters.packing:
            lengths = self.facts.train.truncate(config.hyperparameters.max_seq_length)
            copies = 2 if trainer in PAIRED_TRAINER_TYPES else 1
            padded *= lengths.pad(plan.batch_size * copies) / lengths.tokens if lengths.tokens else 1.0
        work = Work(trainer, config.method, padded, max(passes, float(steps.total_steps)), plan.gradient_checkpointing, steps.total_steps)
        if not isinstance(config, GrpoConfig):
            return work
        grpo = config.hyperparameters
        return replace(
            work,
            generated_batches=steps.total_steps / grpo.num_iterations,
            generated_tokens=grpo.max_completion_length,
            generation_batch=steps.examples_per_step,
        )

    def _estimate_evaluation(self, model: ModelShape, device: Device, plan: PassPlan) -> Range:
        """One evaluation; nothing without held-out rows and tasks."""
        config, eval_config = self.config, self.config.eval_config
        held_out = self.facts.held_out.truncate(config.hyperparameters.max_seq_length)
        total = NOTHING
        if held_out.rows:
            prompts = max(eval_config.task_rows if eval_config.compute_eval_metrics else 0, eval_config.sample_prompts)
            can_generate = config.trainer_type_name() != "reward"
            copies = 2 if config.trainer_type_name() in PAIRED_TRAINER_TYPES else 1
            total = estimate_evaluation(
                model,
                device,
                tokens=held_out.tokens * copies,
                rows=held_out.rows * copies,
                prompts=min(prompts, held_out.rows) if can_generate else 0,
                new_tokens=eval_config.max_new_tokens,
                batch=plan.batch_size,
            )
        if eval_config.lm_eval_tasks:
            rows = (eval_config.lm_eval_limit or LM_EVAL_ROWS) * len(eval_config.lm_eval_tasks)
            tokens = rows * LM_EVAL_ROW_TOKENS
            total = total + estimate_evaluation(
                model, device, tokens=tokens, rows=rows, prompts=0, new_tokens=0, batch=plan.batch_size
            ).spread(0.3, 3.0)
        return total

    def _count_evaluations(self, steps: StepPlan) -> int:
        """Evaluations of the model while it trains and afterwards."""
        match self.config.eval_config.eval_strategy:
            case "no":
                during = 0
            case "steps":
                during = steps.count_repetitions(self.config.eval_config.eval_steps)
            case "epoch":
                during = steps.count_repetitions(steps.steps_per_epoch)
        return max(1, during)  # the last one is that of the trained model

    def count_saves(self, steps: StepPlan, training: Range) -> Range:
        """Checkpoints, of which there are more in a slow training."""
        match self.config.hyperparameters.save_strategy:
            case "no":
                return Range(1, 1)
            case "steps":
                planned = steps.count_repetitions(self.config.hyperparameters.save_steps)
            case "epoch":
                planned = steps.count_repetitions(steps.steps_per_epoch)
        return Range(max(1, planned), max(1, planned) + training.high // CHECKPOINT_INTERVAL_S)

    def _estimate_saves(self, model: ModelShape, saves: Range) -> Range:
        size = self.measure_checkpoint(model)
        return Range(
            estimate_saves(size, saves.low).low * 0.2, estimate_saves(size, saves.high).high
        )  # most is saved beside the next steps

    def measure_checkpoint(self, model: ModelShape) -> int:
        """Bytes of a checkpoint."""
        trained = model.parameters if self.config.method == "Full" else make_export_plan(self.config, model).adapter_parameters
        return estimate_checkpoint_bytes(round(trained) * FP32_BYTES)
