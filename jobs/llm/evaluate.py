"""Evaluate a model before, during and after its training: held-out loss, generated answers, and lm-evaluation-harness tasks.

The base is evaluated before the first step. Where it is the trained model without its adapter, it is evaluated after the first step
instead, so that a training shows its first loss sooner. The numbers are the same.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from jobs.llm.evaluation.benchmarks import evaluate_with_lm_eval
from jobs.llm.evaluation.generation import generate_batch, make_samples, max_generation_batch
from jobs.llm.evaluation.prompts import make_eval_prompts
from jobs.llm.evaluation.state import without_adapter
from jobs.llm.evaluation.text_metrics import task_metrics
from jobs.llm.training_context import MultimodalTask, TrainingContext, TrainingTask
from jobs.runtime.remaining_time import PlannedPhase
from jobs.runtime.training_control import TrainingControl
from schema.events import SamplesGenerated
from schema.job import EvalMetrics

EvaluationTime = Literal["before", "during", "after"]

# Whose adapters add exactly zero at the first step; others may differ from the base by rounding.
ZERO_LORA_INITS = ("default", "gaussian")


def evaluate_before_training(
    task: TrainingTask,
    training: TrainingContext,
    checkpoint: Path | None,
    trainer: Any,
    control: TrainingControl,
    *,
    may_defer: bool,
) -> None:
    """Evaluate the base model unless the training does, and run the evaluation that the attempt before `checkpoint` had no time for."""
    context = training.context
    if not has_evaluation_data(task, training) or (checkpoint is not None and not control.evaluation_is_due):
        return
    evaluates_base = checkpoint is None and context.state.base_metrics is None
    if may_defer and can_disable_adapter(training, trainer.model):
        evaluates_base = False
    if not evaluates_base and not control.evaluation_is_due:
        return
    context.enter_phase("evaluating")
    if evaluates_base:
        control.evaluate_base(lambda _: _evaluate_base(task, training, trainer, context.check_stop))
    if control.evaluation_is_due:
        control.evaluate(lambda _: evaluate_step(task, training, trainer, "during", control.step, context.check_stop))


def evaluate_after_training(task: TrainingTask, training: TrainingContext, trainer: Any, control: TrainingControl) -> EvalMetrics | None:
    """Evaluate the model that is published. None without held-out rows and lm_eval_tasks."""
    context, step = training.context, control.published_step
    if not has_evaluation_data(task, training):
        return None
    context.enter_phase("evaluating")
    if base_is_due(task, training, trainer.model):
        with without_adapter(trainer.model):
            control.evaluate_base(lambda _: _evaluate_base(task, training, trainer, context.check_stop))
    metrics = control.state.metrics_by_step.get(step)
    if metrics is not None and not training.config.eval_config.lm_eval_tasks:
        context.remaining.estimate_current(0.0)
    metrics = metrics or evaluate_step(task, training, trainer, "after", step, context.check_stop)
    metrics = _add_lm_eval(training, trainer.model, metrics, context.check_stop)
    context.log_evaluation("after", step, metrics)
    return metrics


def evaluate_base_during_training(task: TrainingTask, training: TrainingContext, trainer: Any, control: TrainingControl) -> None:
    """Evaluate the base between two steps, as the model without its adapter. A training that must stop first leaves it to the next step."""
    context = training.context
    context.remaining.plan([PlannedPhase("evaluating", None), PlannedPhase("training", None), *context.remaining.planned])
    context.enter_phase("evaluating")
    with without_adapter(trainer.model):
        control.evaluate_base(lambda check_stop: _evaluate_base(task, training, trainer, check_stop))
    context.enter_phase("training")


def base_is_due(task: TrainingTask, training: TrainingContext, model: Any) -> bool:
    """Whether the base is still to be evaluated, as the model without its adapter."""
    is_missing = training.context.state.base_metrics is None and has_evaluation_data(task, training)
    return is_missing and can_disable_adapter(training, model)


def can_disable_adapter(training: TrainingContext, model: Any) -> bool:
    """Whether the base can be evaluated as the model without its adapter, with the numbers that it has before the first step.

    Other losses than SFT's use the model without its adapter themselves, or evaluate a head that is trained. A compiled model would be
    compiled once more, a sharded one is evaluated by all processes together, and the experts of a mixture have adapters of another kind.
    """
    from peft import PeftModel
    from peft.tuners.lora.layer import ParamWrapper

    config = training.config
    if not isinstance(model, PeftModel) or config.trainer_type != "sft" or config.provider != "huggingface":
        return False
    if training.device_config.torch_compile or config.hyperparameters.use_dora or config.hyperparameters.lora_init not in ZERO_LORA_INITS:
        return False
    return not any(isinstance(module, ParamWrapper) for module in model.modules())


def _evaluate_base(task: TrainingTask, training: TrainingContext, trainer: Any, check_stop: Callable[[], None]) -> EvalMetrics:
    metrics = evaluate_step(task, training, trainer, "before", 0, check_stop)
    return _add_lm_eval(training, trainer.model, metrics, check_stop)


def has_evaluation_data(task: TrainingTask, training: TrainingContext) -> bool:
    """Whether there is anything to evaluate a model on."""
    return task.has_held_out_rows or bool(training.config.eval_config.lm_eval_tasks)


def evaluate_step(
    task: TrainingTask, training: TrainingContext, trainer: Any, when: EvaluationTime, step: int, check_stop: Callable[[], None]
) -> EvalMetrics:
    """The task's own metrics on the held-out rows, and metrics of generated answers. `check_stop` may raise."""
    import torch

    device_config = training.device_config
    with torch.autocast(device_config.device.type, torch.bfloat16, enabled=device_config.autocast):
        metrics = task.evaluate(trainer, check_stop) if task.has_held_out_rows else EvalMetrics()
        return _add_generation_metrics(task, training, trainer.model, metrics, when, step, check_stop)


def _add_generation_metrics(
    task: TrainingTask,
    training: TrainingContext,
    model: Any,
    metrics: EvalMetrics,
    when: EvaluationTime,
    step: int,
    check_stop: Callable[[], None],
) -> EvalMetrics:
    """The metrics with those of generated answers to held-out prompts. Logs some of the answers as samples."""
    eval_config = training.config.eval_config
    prompt_count = max(eval_config.task_rows if eval_config.compute_eval_metrics else 0, eval_config.sample_prompts)
    if not prompt_count or not model.can_generate():
        return metrics
    if isinstance(task, MultimodalTask):
        eval_prompts = task.eval_prompts(prompt_count)
        features = task.prompt_features(eval_prompts)
    else:
        eval_prompts = make_eval_prompts(task.held_out_examples, training.tokenizer, prompt_count)
        features = None
    answers: list[str] = []
    references = [prompt.reference for prompt in eval_prompts]
    if eval_prompts:
        prompt_ids = [prompt.prompt_ids for prompt in eval_prompts]
        answers = generate_batch(
            model,
            training.tokenizer,
            prompt_ids,
            max_new_tokens=eval_config.max_new_tokens,
            batch_size=max_generation_batch(training.config.hyperparameters.batch_size, prompt_ids, eval_config.max_new_tokens),
            check_stop=check_stop,
            features=features,
        )
        if eval_config.sample_prompts:
            prompt_texts = [prompt.prompt_text for prompt in eval_prompts]
            samples = make_samples(training.chat_format, training.tokenizer, prompt_texts, references, answers, eval_config.sample_prompts)
            training.context.log_samples(SamplesGenerated(when=when, step=step, samples=samples))
    if not eval_config.compute_eval_metrics:
        return metrics
    values, notes = task_metrics(answers[: eval_config.task_rows], references[: eval_config.task_rows])
    return metrics.model_copy(update={"values": metrics.values | values, "notes": metrics.notes | notes})


def _add_lm_eval(training: TrainingContext, model: Any, metrics: EvalMetrics, check_stop: Callable[[], None]) -> EvalMetrics:
    """The metrics with those of the requested lm-evaluation-harness tasks."""
    eval_config = training.config.eval_config
    if not eval_config.lm_eval_tasks:
        return metrics
    values, notes = evaluate_with_lm_eval(
        model,
        training.tokenizer,
        eval_config.lm_eval_tasks,
        limit=eval_config.lm_eval_limit,
        batch_size=training.config.hyperparameters.batch_size,
        check_stop=check_stop,
    )
    return metrics.model_copy(update={"values": metrics.values | values, "notes": metrics.notes | notes})
