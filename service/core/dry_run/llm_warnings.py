"""What is likely wrong with a language model job, and does not stop it: settings, and what the report of a dataset found."""

from collections.abc import Iterator

from schema.dry_run import DryRunWarning
from schema.estimate.devices import GIB
from schema.estimate.llm_steps import StepPlan
from schema.training.llm import DpoConfig, GrpoConfig, KtoConfig, LlmTrainingConfig
from service.core.dry_run.llm_facts import LlmFacts

PATH = "training_config"
HYPERPARAMETERS = f"{PATH}.hyperparameters"

# Learning rates by trainer type and method that usually work, a factor around the defaults.
USUAL_FACTOR = 20.0
MANY_EPOCHS, FEW_ROWS = 10, 500
USUAL_ALPHA_PER_RANK = (0.25, 4.0)
MUCH_LONGER, SHORT_LENGTH = 4, 512  # times the longest row; a length that is never too long
MAX_TRUNCATED_SHARE = 0.05
FEW_BLOCKS_PER_STEP = 2
USUAL_BETA = (0.01, 0.5)
QLORA_WORTH_BYTES = 8 * GIB  # weights in bf16; smaller ones fit into most GPUs
INSTRUCT_MARKERS = ("-it", "instruct", "chat")
FEW_TRAINING_ROWS = 50


def find_warnings(config: LlmTrainingConfig, facts: LlmFacts, steps: StepPlan) -> tuple[DryRunWarning, ...]:
    """Every warning, in the order of the fields."""
    return tuple(
        DryRunWarning(param=param, message=message, hint=hint)
        for check in (_check_rate, _check_length, _check_adapter, _check_rows, _check_steps, _check_preferences, _check_base, _check_export)
        for param, message, hint in check(config, facts, steps)
    )


Found = Iterator[tuple[str, str, str]]  # the field, what is wrong, what would work


def _check_rate(config: LlmTrainingConfig, facts: LlmFacts, steps: StepPlan) -> Found:  # noqa: ARG001  # all checks are called alike
    rate, usual = config.hyperparameters.learning_rate or 0.0, config.learning_rates[config.method]
    if not usual / USUAL_FACTOR <= rate <= usual * USUAL_FACTOR:
        kind = "low: the model may learn nothing" if rate < usual else "high: the training may diverge"
        message = f"learning_rate {rate:g} is unusually {kind}, with trainer_type {config.trainer_type_name()} and method {config.method}"
        yield f"{HYPERPARAMETERS}.learning_rate", message, f"leave it out for {usual:g}, or stay within {USUAL_FACTOR:g} times of that"


def _check_length(config: LlmTrainingConfig, facts: LlmFacts, steps: StepPlan) -> Found:  # noqa: ARG001
    max_length, rows = config.hyperparameters.max_seq_length, facts.train
    if not rows.top or not rows.rows:
        return
    longer = rows.count_longer(max_length)
    if longer > MAX_TRUNCATED_SHARE * rows.rows:
        share = 100 * longer / rows.rows
        message = f"max_seq_length {max_length} truncates about {longer} of {rows.rows} rows ({share:.0f} %)"
        message += f"; the longest has {rows.longest} tokens"
        yield f"{HYPERPARAMETERS}.max_seq_length", message, 'raise it, or send "auto"'
    reserved = config.hyperparameters.max_completion_length if isinstance(config, GrpoConfig) else 0
    is_sent = "max_seq_length" in config.hyperparameters.model_fields_set and max_length > SHORT_LENGTH
    if is_sent and max_length > MUCH_LONGER * (rows.longest + reserved) and not config.hyperparameters.packing:
        message = f"max_seq_length {max_length} is much longer than the longest row, of {rows.longest} tokens"
        yield (
            f"{HYPERPARAMETERS}.max_seq_length",
            message,
            'it costs nothing by itself, but hides rows that grow; send "auto" to fit it to the rows',
        )


def _check_adapter(config: LlmTrainingConfig, facts: LlmFacts, steps: StepPlan) -> Found:  # noqa: ARG001
    hyperparameters = config.hyperparameters
    if config.method == "Full":
        return
    ratio = hyperparameters.lora_alpha / hyperparameters.lora_rank
    if not hyperparameters.use_rslora and not USUAL_ALPHA_PER_RANK[0] <= ratio <= USUAL_ALPHA_PER_RANK[1]:
        kind = "weakens the adapter" if ratio < 1 else "multiplies the learning rate of the adapter"
        message = f"lora_alpha {hyperparameters.lora_alpha} is {ratio:g} times lora_rank {hyperparameters.lora_rank}, which {kind}"
        yield f"{HYPERPARAMETERS}.lora_alpha", message, "set lora_alpha to lora_rank, or to twice as much"
    if config.method == "QLoRA" and facts.model is not None and 2 * facts.model.parameters <= QLORA_WORTH_BYTES:
        message = f"method QLoRA quantizes a base whose {2 * facts.model.parameters / 1e9:.1f} GB fit into most GPUs as they are"
        yield f"{PATH}.method", message, "method LoRA is faster and more exact"


def _check_rows(config: LlmTrainingConfig, facts: LlmFacts, steps: StepPlan) -> Found:  # noqa: ARG001
    rows, hyperparameters = steps.rows, config.hyperparameters
    if 0 < rows < FEW_TRAINING_ROWS and config.trainer_type_name() != "grpo":
        message = f"the training has {rows} rows, which teach little more than a form"
        yield "processed_dataset_id", message, f"add rows; from {FEW_TRAINING_ROWS} on a model learns more than to repeat them"
    if rows < FEW_ROWS and steps.epochs > MANY_EPOCHS:
        message = f"{steps.epochs:.0f} passes over {rows} rows are likely to make the model repeat them"
        field = "max_steps" if hyperparameters.max_steps > 0 else "epochs"
        yield (
            f"{HYPERPARAMETERS}.{field}",
            message,
            f"lower it to {MANY_EPOCHS} passes or fewer, or set eval_config.early_stopping_patience",
        )
    if 0 < steps.examples < steps.examples_per_step:
        what = "packed blocks" if hyperparameters.packing else "rows"
        message = (
            f"an optimizer step takes {steps.examples_per_step} {what}, and an epoch has {steps.examples}: each step takes all of them"
        )
        yield f"{HYPERPARAMETERS}.batch_size", message, 'lower batch_size or gradient_accumulation_steps, or send "auto"'
    elif hyperparameters.packing and steps.examples < FEW_BLOCKS_PER_STEP * steps.examples_per_step:
        message = f"packing makes about {steps.examples} blocks of the rows, so that an epoch has {steps.steps_per_epoch} steps"
        yield f"{HYPERPARAMETERS}.packing", message, "set packing to false, or lower max_seq_length"


def _check_steps(config: LlmTrainingConfig, facts: LlmFacts, steps: StepPlan) -> Found:  # noqa: ARG001
    hyperparameters, eval_config, total = config.hyperparameters, config.eval_config, steps.total_steps
    if eval_config.eval_strategy == "steps" and eval_config.eval_steps > total:
        message = (
            f"eval_steps {eval_config.eval_steps} is more than the {total} steps of the training, so that nothing is evaluated during it"
        )
        yield f"{PATH}.eval_config.eval_steps", message, f"set it to {max(1, total // 4)}, or eval_strategy to 'epoch'"
    if hyperparameters.save_strategy == "steps" and hyperparameters.save_steps > total:
        message = f"save_steps {hyperparameters.save_steps} is more than the {total} steps of the training"
        yield f"{HYPERPARAMETERS}.save_steps", message, f"set it to {max(1, total // 4)}, or save_strategy to 'epoch'"
    if hyperparameters.logging_steps > total and "logging_steps" in hyperparameters.model_fields_set:
        message = f"logging_steps {hyperparameters.logging_steps} is more than the {total} steps of the training, so that no curve is drawn"
        yield f"{HYPERPARAMETERS}.logging_steps", message, "set it to 1"
    warmup = hyperparameters.warmup_ratio * total
    if hyperparameters.warmup_ratio > 0.5:
        message = f"the warm-up takes {warmup:.0f} of {total} steps, so that the learning rate hardly reaches its peak"
        yield f"{HYPERPARAMETERS}.warmup_ratio", message, "set it to 0.1 or less"
    decay = hyperparameters.lr_scheduler_kwargs.get("num_decay_steps", 0.0)
    if decay + warmup > total:
        message = f"warm-up and num_decay_steps take {warmup + decay:.0f} steps, and the training has {total}"
        yield f"{HYPERPARAMETERS}.lr_scheduler_kwargs", message, f"set num_decay_steps to {max(1, round(0.2 * total))}"


def _check_preferences(config: LlmTrainingConfig, facts: LlmFacts, steps: StepPlan) -> Found:  # noqa: ARG001
    if isinstance(config, DpoConfig | KtoConfig) and not USUAL_BETA[0] <= config.hyperparameters.beta <= USUAL_BETA[1]:
        beta = config.hyperparameters.beta
        effect = "lets the model drift far from its base" if beta < USUAL_BETA[0] else "hardly lets it move from its base"
        yield f"{HYPERPARAMETERS}.beta", f"beta {beta:g} {effect}", f"{USUAL_BETA[0]:g} to {USUAL_BETA[1]:g} is usual; the default is 0.1"


def _check_base(config: LlmTrainingConfig, facts: LlmFacts, steps: StepPlan) -> Found:  # noqa: ARG001
    name = config.base_model_id.lower()
    is_instruct = any(marker in name.rpartition("/")[2] for marker in INSTRUCT_MARKERS)
    if config.trainer_type_name() in ("dpo", "kto", "grpo") and not is_instruct:
        message = f"{config.base_model_id} does not look like a model that answers; {config.trainer_type_name()} improves answers"
        yield (
            f"{PATH}.base_model_id",
            message,
            "train it with trainer_type 'sft' first and start from that job, or use its instruct version",
        )
    if is_instruct and config.prompt_format == "raw":
        message = f"{config.base_model_id} knows a chat template, and prompt_format 'raw' trains without it"
        yield f"{PATH}.prompt_format", message, "leave it out, or use the base version of the model"
    if is_instruct and config.chat_template is not None:
        message = f"{config.base_model_id} knows a chat template of its own, and another one has to be learned first"
        yield f"{PATH}.chat_template", message, "leave it out to use the model's own"


def _check_export(config: LlmTrainingConfig, facts: LlmFacts, steps: StepPlan) -> Found:  # noqa: ARG001
    export = config.export_config
    if export.destination == "hfhub" and not export.hf_private:
        yield (
            f"{PATH}.export_config.hf_private",
            f"everybody will be able to read {export.hf_repo_id}",
            "leave hf_private out, or set it to true",
        )
