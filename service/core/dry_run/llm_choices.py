"""What the service chooses where a request for a language model says "auto": lengths, batches and hardware, each with its reason."""

from collections.abc import Sequence
from dataclasses import replace

from schema.estimate.devices import Device
from schema.estimate.llm_memory import usable_memory_bytes
from schema.estimate.llm_plan import PassPlan
from schema.training.auto import AUTO
from schema.training.llm import GrpoConfig, LlmTrainingConfig
from schema.training.resolved import ResolvedValue
from service.core.dry_run.llm_facts import LlmFacts, make_needs

TARGET_ROWS_PER_STEP = 16
MIN_ROWS_PER_STEP, MIN_STEPS_PER_EPOCH = 4, 10  # a small dataset gets smaller steps, so that an epoch has some
MAX_BATCH_SIZE = 8  # of a forward pass; more gains little, and rows of different lengths cost padding
MIN_BATCH_SIZE = {"kto": 2}
MAX_TRUNCATED_SHARE = 0.01
# Powers of two and the halves between.
LENGTHS = tuple(sorted({1 << n for n in range(6, 18)} | {3 << n for n in range(5, 16)}))
MIN_PACKED_LENGTH = 1024  # shorter blocks would hold few rows
DEFAULT_LENGTH, DEFAULT_BATCH_SIZE, DEFAULT_ACCUMULATION = 1024, 2, 4
PATH = "training_config.hyperparameters"


def has_auto(config: LlmTrainingConfig) -> bool:
    """Whether a number of the configuration is left to the service."""
    hyperparameters = config.hyperparameters
    return AUTO in (hyperparameters.batch_size, hyperparameters.gradient_accumulation_steps, hyperparameters.max_seq_length)


def set_defaults(config: LlmTrainingConfig) -> LlmTrainingConfig:
    """The configuration with the usual numbers in place of "auto", for checks of a request that is refused anyway."""
    chosen = {"max_seq_length": DEFAULT_LENGTH, "batch_size": DEFAULT_BATCH_SIZE, "gradient_accumulation_steps": DEFAULT_ACCUMULATION}
    return _set(config, {name: value for name, value in chosen.items() if getattr(config.hyperparameters, name) == AUTO})


def choose_numbers(
    config: LlmTrainingConfig, facts: LlmFacts, devices: Sequence[Device]
) -> tuple[LlmTrainingConfig, tuple[ResolvedValue, ...]]:
    """The configuration with a number in place of every "auto", with which the training fits into each of the devices if it can."""
    resolved: list[ResolvedValue] = []
    if config.hyperparameters.max_seq_length == AUTO:
        length, reason = _choose_length(config, facts, devices)
        config = _set(config, {"max_seq_length": length})
        resolved.append(ResolvedValue(field=f"{PATH}.max_seq_length", value=length, reason=reason))
    hyperparameters = config.hyperparameters
    chosen: dict[str, int | None] = {}
    if AUTO in (hyperparameters.batch_size, hyperparameters.gradient_accumulation_steps):
        chosen, reasons = _choose_batch(config, facts, devices)
        config = _set(config, chosen)
        resolved += [ResolvedValue(field=f"{PATH}.{name}", value=value, reason=reasons[name]) for name, value in chosen.items()]
    return config, tuple(resolved)


def _choose_length(config: LlmTrainingConfig, facts: LlmFacts, devices: Sequence[Device]) -> tuple[int, str]:
    """The smallest length that truncates few rows, as far as the base and the memory allow."""
    completion = config.hyperparameters.max_completion_length if isinstance(config, GrpoConfig) else 0
    rows = facts.train
    allowed = [length for length in LENGTHS if length > completion and (facts.max_positions is None or length <= facts.max_positions)] or [
        max(LENGTHS[0], completion + 8)
    ]
    room = [length for length in allowed if _fits_somewhere(config, facts, devices, length)] or allowed[:1]
    wanted = next((length for length in allowed if rows.count_longer(length - completion) <= MAX_TRUNCATED_SHARE * rows.rows), allowed[-1])
    if config.hyperparameters.packing:
        wanted = max(wanted, MIN_PACKED_LENGTH)
    source = "as its tokenizer counts them" if facts.is_counted else "as their characters suggest; their tokens were not counted"
    if wanted > room[-1]:
        longer = rows.count_longer(room[-1] - completion)
        return room[-1], f"more does not fit into memory; about {longer} of {rows.rows} rows are longer, {source}"
    longer = rows.count_longer(wanted - completion)
    return wanted, f"the smallest that truncates at most 1 % of the rows: {longer} of {rows.rows}, {source}"


def _fits_somewhere(config: LlmTrainingConfig, facts: LlmFacts, devices: Sequence[Device], length: int) -> bool:
    trial = _set(config, {"max_seq_length": length, "batch_size": MIN_BATCH_SIZE.get(config.trainer_type_name(), 1)})
    trial = _set(trial, {"gradient_accumulation_steps": 1})
    return all(_fits(trial, replace(facts, train=replace(facts.train, top=())), device, recomputes=True) for device in devices)


def _choose_batch(config: LlmTrainingConfig, facts: LlmFacts, devices: Sequence[Device]) -> tuple[dict[str, int | None], dict[str, str]]:
    """The rows of a forward pass, the passes of a step, and the reason of each that was asked for."""
    hyperparameters, rows = config.hyperparameters, facts.train.rows
    least = MIN_BATCH_SIZE.get(config.trainer_type_name(), 1)
    if isinstance(config, GrpoConfig):
        return _choose_grpo_batch(config, facts, devices)
    target = TARGET_ROWS_PER_STEP
    while target > MIN_ROWS_PER_STEP and rows < target * MIN_STEPS_PER_EPOCH:
        target //= 2
    small = "" if target == TARGET_ROWS_PER_STEP else f", fewer than {TARGET_ROWS_PER_STEP} because there are only {rows} rows"
    chosen: dict[str, int | None] = {}
    reasons: dict[str, str] = {}
    size, given_steps = hyperparameters.batch_size, hyperparameters.gradient_accumulation_steps
    if size == AUTO:
        most = max(least, min(MAX_BATCH_SIZE, target if given_steps == AUTO else max(1, target // given_steps)))
        size, how = _find_batch_size(config, facts, devices, most, least, target)
        chosen["batch_size"] = size
        reasons["batch_size"] = f"rows of a forward pass: {how}"
    if given_steps == AUTO:
        steps = max(1, target // size)
        chosen["gradient_accumulation_steps"] = steps
        reasons["gradient_accumulation_steps"] = f"an optimizer step of {size * steps} rows{small}"
    return chosen, reasons


def _find_batch_size(
    config: LlmTrainingConfig, facts: LlmFacts, devices: Sequence[Device], most: int, least: int, target: int
) -> tuple[int, str]:
    """The largest power of two that fits into every device, rather without recomputed activations."""
    if facts.model is None:
        return least, "the least, because the size of the base is not known"
    sizes = [size for size in (64, 32, 16, 8, 4, 2, 1) if least <= size <= most] or [least]
    for recomputes in (False, True):
        if recomputes and config.hyperparameters.gradient_checkpointing is False:
            break
        for size in sizes:
            trial = _set(config, {"batch_size": size, "gradient_accumulation_steps": max(1, target // size)})
            if all(_fits(trial, facts, device, recomputes=recomputes) for device in devices):
                with_what = " with gradient checkpointing" if recomputes else ""
                return size, f"at most {most}, and as many as fit into memory{with_what}"
    return sizes[-1], "the least; even that may not fit into memory"


def _choose_grpo_batch(config: GrpoConfig, facts: LlmFacts, devices: Sequence[Device]) -> tuple[dict[str, int | None], dict[str, str]]:
    """Completions of a pass, so that a step has whole groups. An accumulation that is left out is chosen by the attempt."""
    hyperparameters = config.hyperparameters
    generations = hyperparameters.num_generations
    chosen: dict[str, int | None] = {}
    reasons: dict[str, str] = {}
    size, steps = hyperparameters.batch_size, hyperparameters.gradient_accumulation_steps
    if steps == AUTO:
        steps = None
        chosen["gradient_accumulation_steps"] = None
        reasons["gradient_accumulation_steps"] = (
            "the attempt chooses them: on a GPU as many as 8 prompts need, elsewhere as few as possible"
        )
    if size == AUTO:
        whole = [count for count in range(generations, 0, -1) if (count * (steps or generations)) % generations == 0]
        trial_steps = 1 if steps is None else steps
        fitting = (
            count
            for count in whole
            if all(
                _fits(_set(config, {"batch_size": count, "gradient_accumulation_steps": trial_steps}), facts, device, recomputes=True)
                for device in devices
            )
        )
        chosen["batch_size"] = next(fitting, whole[-1])
        reasons["batch_size"] = f"completions of a forward pass that fit into memory, of {generations} for each prompt"
    return chosen, reasons


def _fits(config: LlmTrainingConfig, facts: LlmFacts, device: Device, *, recomputes: bool) -> bool:
    if facts.model is None or device.memory_bytes is None:
        return True
    needs = make_needs(config, facts, facts.model, device)
    plan = PassPlan(needs.training.batch_size, needs.training.gradient_accumulation_steps, gradient_checkpointing=recomputes)
    return needs.estimate(plan).peak < usable_memory_bytes(device.memory_bytes) - device.process_bytes


def _set(config: LlmTrainingConfig, values: dict[str, int | None] | dict[str, int]) -> LlmTrainingConfig:
    return config.model_copy(update={"hyperparameters": config.hyperparameters.model_copy(update=dict(values))})
