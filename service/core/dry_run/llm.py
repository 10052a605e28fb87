"""The plan of a language model job: length, memory, time and price on each kind of hardware, artifacts and disk."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, inf

from schema.dry_run import (
    DryRunResponse,
    Estimate,
    HardwareEstimate,
    MemoryNeed,
    PhaseTime,
    PlannedArtifactSize,
    PlannedBase,
    PlannedDisk,
    PlannedSteps,
    PlannedTokens,
)
from schema.estimate.devices import GIB, KNOWN_GPUS, Device, make_cpu
from schema.estimate.disk import estimate_export_bytes
from schema.estimate.llm_export import (
    ExportPlan,
    estimate_export_memory,
    explain_impossible_export,
    plan_artifacts,
)
from schema.estimate.llm_memory import TrainingMemory, estimate_evaluation_bytes, estimate_training_bytes, usable_memory_bytes
from schema.estimate.llm_plan import PassPlan, TrainingNeeds, find_fitting_plan
from schema.estimate.llm_shapes import ModelShape
from schema.estimate.llm_steps import StepPlan
from schema.estimate.prices import estimate_usd, find_price
from schema.estimate.ranges import NOTHING, Range, sum_ranges
from schema.training.llm import LlmTrainingConfig, SftConfig
from service.core.dry_run.llm_facts import (
    LlmFacts,
    concatenates_rows,
    make_device,
    make_export_plan,
    make_needs,
    make_step_plan,
)
from service.core.dry_run.llm_times import LlmTimes
from service.core.dry_run.llm_warnings import find_warnings
from service.core.launchers import Offer
from service.core.validation.llm_support import can_shard, list_options

REFERENCE_CPU = make_cpu("CPU with 8 cores, 32 GB", 8, 32 * GIB, has_bf16=False)
SLICE_MARGIN_S = 60.0  # of a time limit, for saving and stopping
TOKEN_BYTES = 8  # of a tokenized row on disk: the token and its label
FITTING = ("fits", "fits_with_gradient_checkpointing", "fits_with_smaller_batch")


@dataclass(frozen=True)
class LlmPlanner:
    """Plans one configuration. `is_stored`: the base is in the model store."""

    config: LlmTrainingConfig
    facts: LlmFacts
    is_stored: bool

    @property
    def _times(self) -> LlmTimes:
        return LlmTimes(self.config, self.facts, self.is_stored)

    def plan(self, offers: Sequence[Offer], supported: Sequence[bool]) -> DryRunResponse:
        """The whole answer but what the family does not know: placements, resolved values, the original request."""
        profiles = tuple(sorted((self.estimate_offer(offer, supported=ok) for offer, ok in zip(offers, supported, strict=True)), key=rank))
        accelerators = tuple(self._estimate_device(device.name, device, "") for device in (*KNOWN_GPUS, REFERENCE_CPU))
        fitting = [each for each in profiles if each.fit in FITTING and each.supported]
        on_gpu = bool(offers) and offers[0].profile.device == "cuda"
        steps = make_step_plan(self.config, self.facts, on_gpu=on_gpu)
        return DryRunResponse(
            training_config={},
            placements=(),
            base=self._describe_base(),
            steps=_describe_steps(steps),
            tokens=self._describe_tokens(steps),
            profiles=profiles,
            accelerators=accelerators,
            cheapest=fitting[0].hardware if fitting else None,
            artifacts=self._list_artifacts(),
            disk=self._plan_disk(steps),
            warnings=find_warnings(self.config, self.facts, steps),
        )

    def estimate_offer(self, offer: Offer, *, supported: bool) -> HardwareEstimate:
        """What the job would take at a profile of this deployment."""
        placement, profile = offer.placement, offer.profile
        estimate = self._estimate_device(placement.hardware, make_device(profile), placement.launcher, offer)
        price = find_price(placement.launcher, placement.profile)
        usd = time_slices = None
        if estimate.seconds is not None:
            seconds = Range(estimate.seconds.low, estimate.seconds.high)
            if profile.time_limit_s:
                time_slices = _count_slices(seconds, profile.time_limit_s)
            usd = estimate_usd(price, seconds) if price else None
        return estimate.model_copy(
            update={
                "gpus": profile.gpus,
                "environment": placement.environment,
                "supported": supported,
                "usd_per_hour": price.usd_per_hour if price else None,
                "usd": _show(usd) if usd else None,
                "time_slices": _show(time_slices) if time_slices else None,
                "reason": estimate.reason if supported else "this profile cannot run the job; GET /capabilities says what it can",
            }
        )

    def _estimate_device(self, name: str, device: Device, launcher: str, offer: Offer | None = None) -> HardwareEstimate:
        model = self.facts.model
        if model is None:
            reason = "the size of this base model is not known before it is downloaded; once it is in the model store it is"
            return HardwareEstimate(hardware=name, device=device.name, fit="unknown", reason=reason)
        needs = make_needs(self.config, self.facts, model, device)
        export = estimate_export_memory(model, make_export_plan(self.config, model), on_gpu=device.on_gpu, has_bf16=device.has_bf16)
        available = None if device.memory_bytes is None else usable_memory_bytes(device.memory_bytes) - device.process_bytes
        is_auto = concatenates_rows(self.config, on_gpu=device.on_gpu) and not self.config.hyperparameters.packing
        fit, plan = find_fitting_plan(
            needs,
            inf if available is None else available,
            chooses_batch=is_auto,
            gradient_checkpointing=self.config.hyperparameters.gradient_checkpointing,
        )
        memory = needs.estimate(plan)
        need = MemoryNeed(
            parts=_list_parts(memory, device),
            peak_bytes=round(memory.peak + device.process_bytes),
            evaluation_bytes=self._estimate_evaluation_bytes(needs, plan, device),
            available_bytes=None if device.memory_bytes is None else round(usable_memory_bytes(device.memory_bytes)),
            export_bytes=round(export.device + (device.process_bytes if export.device else 0)),
            export_host_bytes=round(export.host),
            batch_size=plan.batch_size,
            gradient_accumulation_steps=plan.gradient_accumulation_steps,
            gradient_checkpointing=plan.gradient_checkpointing,
        )
        host_bytes = offer.profile.memory_bytes if offer is not None else None
        gpus = offer.profile.gpus if offer is not None else 1
        if fit == "does_not_fit" and available is not None and (shard := self._estimate_shard(needs, plan, gpus)) < available:
            fit, need = "fits_with_gradient_checkpointing", need.model_copy(update={"peak_bytes": round(shard)})
        reason = self._explain_misfit(needs, need, fit, device, host_bytes, offer)
        if fit == "does_not_fit" or reason:
            reason = reason or "it does not fit"
            return HardwareEstimate(hardware=name, device=device.name, fit="does_not_fit", reason=reason, memory=need)
        phases = self._times.list_phases(model, device, plan, launcher, gpus)
        seconds = sum_ranges(each for _, each in phases)
        shown = "unknown" if device.memory_bytes is None else fit
        return HardwareEstimate(
            hardware=name,
            device=device.name,
            fit=shown,
            reason=_describe_fit(shown, need, self.config),
            memory=need,
            seconds=_show(seconds),
            phases=tuple(PhaseTime(phase=phase, seconds=_show(each)) for phase, each in phases),
        )

    def _explain_misfit(
        self, needs: TrainingNeeds, need: MemoryNeed, fit: str, device: Device, host_bytes: int | None, offer: Offer | None
    ) -> str:
        """Why the job does not fit, and what would help; empty if it does."""
        export_plan = make_export_plan(self.config, needs.model)
        if problem := explain_impossible_export(needs.model, export_plan):
            return f"{problem}; use export format merged, or include_gguf"
        if device.memory_bytes is None:
            return ""
        if need.export_bytes > device.memory_bytes:
            message = (
                f"the export needs {need.export_bytes / 1e9:.1f} GB of memory, and {device.name} has {device.memory_bytes / 1e9:.0f} GB"
            )
            return f"{message}; export format adapter needs none, or use larger hardware"
        if host_bytes is not None and need.export_host_bytes > host_bytes:
            message = f"the export needs {need.export_host_bytes / 1e9:.1f} GB of main memory, and there are {host_bytes / 1e9:.0f} GB"
            return f"{message}; leave out format onnx"
        if fit != "does_not_fit":
            return ""
        methods = (
            list_options("method", offer.manifest.families["llm"], offer.profile) if offer and "llm" in offer.manifest.families else ()
        )
        helping = [
            f"method {method}"
            for method in ("LoRA", "QLoRA")
            if method != self.config.method
            and (not offer or method in methods)
            and (device.on_gpu or method != "QLoRA")
            and self._fits(replace(needs, training=replace(needs.training, method=method)), device)
        ]
        length = needs.training.max_seq_length
        shorter = next((size for size in _halve(length) if self._fits_length(size, needs.model, device)), None)
        helping += [f"max_seq_length {shorter}"] if shorter else []
        helping += ["gradient_checkpointing"] if self.config.hyperparameters.gradient_checkpointing is False else []
        message = (
            f"it needs {need.peak_bytes / 1e9:.1f} GB with the smallest batch, and {(need.available_bytes or 0) / 1e9:.1f} GB of "
            f"{device.name} can be planned with"
        )
        return f"{message}; {' or '.join(helping)} would fit" if helping else f"{message}; use a smaller base model or larger hardware"

    def _estimate_shard(self, needs: TrainingNeeds, plan: PassPlan, gpus: int) -> float:
        """Memory of one of several GPUs that share the weights; infinite where they cannot."""
        if gpus < 2 or not can_shard(self.config):
            return inf
        shape = needs.with_batch(plan.batch_size, plan.gradient_accumulation_steps)
        return estimate_training_bytes(needs.model, shape, gradient_checkpointing=True, num_shards=gpus)

    def _estimate_evaluation_bytes(self, needs: TrainingNeeds, plan: PassPlan, device: Device) -> int:
        rows = self.facts.held_out.rows
        if not rows:
            return 0
        longest = self.facts.held_out.list_longest(min(plan.batch_size, rows), needs.training.max_seq_length)
        return round(estimate_evaluation_bytes(needs.model, needs.training, sum(longest)) + device.process_bytes)

    def _fits(self, needs: TrainingNeeds, device: Device) -> bool:
        available = inf if device.memory_bytes is None else usable_memory_bytes(device.memory_bytes) - device.process_bytes
        return find_fitting_plan(needs, available, chooses_batch=False)[0] != "does_not_fit"

    def _fits_length(self, length: int, model: ModelShape, device: Device) -> bool:
        hyperparameters = self.config.hyperparameters.model_copy(update={"max_seq_length": length})
        config = self.config.model_copy(update={"hyperparameters": hyperparameters})
        return self._fits(make_needs(config, self.facts, model, device), device)

    def _describe_base(self) -> PlannedBase:
        model = self.facts.model
        return PlannedBase(
            base_model_id=self.config.base_model_id,
            parameters=round(model.parameters) if model else None,
            weights_bytes=model.weights_bytes if model else None,
            stored=self.is_stored,
            size_from=self.facts.size_from,
        )

    def _describe_tokens(self, steps: StepPlan) -> PlannedTokens:
        facts, max_length = self.facts, self.config.hyperparameters.max_seq_length
        is_counted = facts.is_counted
        lengths = facts.train.truncate(max_length)
        takes_all = self.config.trainer_type_name() == "sft" and self.config.hyperparameters.max_steps <= 0
        exact = lengths.exact and takes_all and facts.train.longest <= max_length
        ask = f'POST /datasets/{{id}}/token_lengths with {{"base_model_id": "{self.config.base_model_id}"}}'
        if exact:
            note = "counted with the base's tokenizer"
        elif is_counted:
            note = (
                "from lengths that the base's tokenizer counted; estimated is which rows a part of an epoch takes, how pairs divide, and "
            )
            note += "which rows are dropped because max_seq_length leaves nothing of their answers"
        else:
            note = f"estimated from the characters of the rows; {ask} counts them"
        return PlannedTokens(
            per_epoch=round(steps.examples * steps.tokens_per_example),
            total=round(steps.total_tokens),
            longest=facts.train.longest if is_counted else None,
            truncated_rows=facts.train.count_longer(max_length) if is_counted else None,
            exact=exact,
            note=note,
        )

    def _list_artifacts(self) -> tuple[PlannedArtifactSize, ...]:
        model = self.facts.model
        if model is None:
            return ()
        planned = plan_artifacts(model, make_export_plan(self.config, model))
        return tuple(PlannedArtifactSize(name=each.name, kind=each.kind, size_bytes=round(each.size_bytes)) for each in planned)

    def _plan_disk(self, steps: StepPlan) -> PlannedDisk | None:
        model = self.facts.model
        if model is None:
            return None
        plan = make_export_plan(self.config, model)
        export = estimate_plan_bytes(model, plan)
        checkpoint = self._times.measure_checkpoint(model)
        saves = self._times.count_saves(steps, NOTHING).high
        kept = min(self.config.hyperparameters.save_total_limit + 1, ceil(saves))
        tokens = (self.facts.train.tokens + self.facts.held_out.tokens) * TOKEN_BYTES
        return PlannedDisk(
            attempt_bytes=round(model.weights_bytes + tokens + kept * checkpoint + export),
            export_bytes=export,
            checkpoint_bytes=checkpoint,
            checkpoints=ceil(saves),
            artifacts_bytes=round(sum(each.size_bytes for each in plan_artifacts(model, plan))),
        )


def rank(estimate: HardwareEstimate) -> tuple[bool, bool, bool, float, str]:
    """The order of candidates: what fits first, then by price where it is known, then by time."""
    usd, seconds = estimate.usd, estimate.seconds
    return (
        not (estimate.supported and estimate.fit in FITTING),
        not estimate.supported or estimate.fit == "does_not_fit",
        usd is None,
        usd.high if usd else (seconds.high if seconds else inf),
        estimate.hardware,
    )


def estimate_plan_bytes(model: ModelShape, plan: ExportPlan) -> int:
    """Disk that the files of an export take at the same time."""
    return estimate_export_bytes(
        round(model.parameters),
        merged_bytes_per_parameter=plan.merged_bytes_per_parameter,
        makes_merged=plan.makes_merged,
        quantizations=plan.quantizations,
        makes_onnx="onnx" in plan.kinds,
    )


def _show(value: Range) -> Estimate:
    return Estimate(low=_round(value.low), high=_round(value.high))


def _round(number: float) -> float:
    """Four digits: more would promise too much."""
    return float(f"{number:.4g}")


def _halve(length: int) -> list[int]:
    return [length >> n for n in range(1, length.bit_length()) if length >> n >= 64]


def _count_slices(seconds: Range, time_limit_s: int) -> Range:
    """Attempts of at most that time. Each has to load the base again, which is not counted."""
    usable = max(1.0, time_limit_s - SLICE_MARGIN_S)
    return Range(max(1, ceil(seconds.low / time_limit_s)), max(1, ceil(seconds.high / usable)))


def _list_parts(memory: TrainingMemory, device: Device) -> dict[str, int]:
    parts = {
        "weights": memory.weights,
        "optimizer": memory.optimizer_state,
        "gradients": memory.gradients,
        "activations": memory.activations,
        "loss_head": memory.head,
        "backward_pass": memory.backward,
        "constant": memory.constant,
        "process": device.process_bytes,
    }
    return {name: round(size) for name, size in parts.items() if size}


def _describe_fit(fit: str, need: MemoryNeed, config: LlmTrainingConfig) -> str:
    room = f"needs {need.peak_bytes / 1e9:.1f} GB" + (
        f" of {need.available_bytes / 1e9:.1f} GB that can be planned with" if need.available_bytes is not None else ""
    )
    match fit:
        case "fits_with_gradient_checkpointing":
            return f"{room}, with gradient_checkpointing, which the attempt turns on; it costs about a third of the speed"
        case "fits_with_smaller_batch":
            batch = f"batch_size {need.batch_size} and gradient_accumulation_steps {need.gradient_accumulation_steps}"
            return f"{room} with {batch}, to which the attempt goes down when memory runs out; request them to save the time"
        case "unknown":
            return f"{room}; the memory of this hardware is not known"
        case _:
            chosen = isinstance(config, SftConfig) and need.batch_size != config.hyperparameters.batch_size
            return room + (f", with {need.batch_size} rows in a forward pass, which the attempt chooses" if chosen else "")


def _describe_steps(steps: StepPlan) -> PlannedSteps:
    return PlannedSteps(
        rows=steps.rows,
        examples=steps.examples,
        examples_per_step=steps.examples_per_step,
        steps_per_epoch=steps.steps_per_epoch,
        total_steps=steps.total_steps,
        epochs=round(steps.epochs, 4),
        exact=steps.exact,
    )
