"""Plans a job of any family: resolves what a request leaves to the service, and answers a dry run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Protocol, cast

from pydantic import JsonValue

from schema.dry_run import BudgetShare, DryRunResponse, DryRunWarning, HardwareEstimate
from schema.job import EarlierModel
from schema.placement import MAX_CANDIDATES, Placement
from schema.requests import TrainRequest
from schema.training import TrainingConfig
from schema.training.resolved import ResolvedValue
from service.core.dry_run.data_warnings import find_data_warnings
from service.core.dry_run.facts import JobFacts
from service.core.errors import DoesNotFit, Unsupported
from service.core.launchers import Offer

# One line for each family that can be planned: its module, with the functions of FamilyPlanner.
FAMILY_PLANNERS: dict[str, str] = {"llm": "service.core.dry_run.llm_family"}


class FamilyPlanner(Protocol):
    """What a family plans: the functions of its module."""

    def has_auto(self, config: TrainingConfig) -> bool:
        """Whether a number of the configuration is left to the service."""
        ...

    def set_defaults(self, config: TrainingConfig) -> TrainingConfig:
        """The configuration with usual numbers instead, for checks of a request that is refused anyway."""
        ...

    def choose_numbers(
        self, config: TrainingConfig, facts: JobFacts, offers: Sequence[Offer]
    ) -> tuple[TrainingConfig, tuple[ResolvedValue, ...]]:
        """The configuration with a number in place of every "auto", for all of the offers, and what was chosen."""
        ...

    def estimate_offers(self, config: TrainingConfig, facts: JobFacts, offers: Sequence[Offer]) -> list[HardwareEstimate]:
        """What the job takes at each of the offers, the best first."""
        ...

    def plan(self, config: TrainingConfig, facts: JobFacts, offers: Sequence[Offer], supported: Sequence[bool]) -> DryRunResponse:
        """The answer to a dry run, but for what a family does not know. `offers` are all of the deployment."""
        ...


@dataclass(frozen=True)
class Resolution:
    """A configuration without any "auto", the hardware by name, and what was chosen."""

    config: TrainingConfig
    hardware: str | list[str] | None
    resolved: tuple[ResolvedValue, ...] = ()


def find_planner(config: TrainingConfig) -> FamilyPlanner | None:
    """The planner of the configuration's family; None if the family has none."""
    name = FAMILY_PLANNERS.get(config.family)
    return cast(FamilyPlanner, resolve_name(name)) if name else None


def choose_hardware(planner: FamilyPlanner, config: TrainingConfig, facts: JobFacts, offers: Sequence[Offer]) -> Resolution:
    """Every offer where the job fits, the cheapest first, with the numbers that suit the first. Raises DoesNotFit when it fits nowhere."""
    trials = [(offer, *planner.choose_numbers(config, facts, [offer])) for offer in offers]
    estimates = {offer.placement.hardware: planner.estimate_offers(chosen, facts, [offer])[0] for offer, chosen, _ in trials}
    fitting = [each for each in _rank(list(estimates.values())) if each.fit != "does_not_fit"]
    if not fitting:
        reasons = "; ".join(f"{name}: {each.reason}" for name, each in estimates.items())
        message = (
            f"the job fits on no hardware of this deployment: {reasons}" if reasons else "no hardware of this deployment can run the job"
        )
        raise DoesNotFit(message, hint="GET /capabilities lists the hardware and what it can run", param="hardware")
    best = fitting[0]
    chosen, resolved = next((chosen, resolved) for offer, chosen, resolved in trials if offer.placement.hardware == best.hardware)
    names = [offer.placement.hardware for offer in offers]
    others = planner.estimate_offers(chosen, facts, [offer for offer in offers if offer.placement.hardware != best.hardware])
    ranked = [best.hardware, *(each.hardware for each in others if each.fit != "does_not_fit")][:MAX_CANDIDATES]
    price = f"about ${best.usd.low:.2f} to ${best.usd.high:.2f}" if best.usd else "the fastest, as no price is known"
    reason = f"{price}; the job fits on {len(ranked)} of the {len(names)} profiles that can run it"
    value = ResolvedValue(field="hardware", value=list[JsonValue](ranked), reason=reason)
    return Resolution(chosen, ranked, (*resolved, value))


def complete_plan(
    plan: DryRunResponse,
    request: TrainRequest,
    config: TrainingConfig,
    facts: JobFacts,
    placements: Sequence[Placement],
    earlier_model: EarlierModel | None,
    resolved: tuple[ResolvedValue, ...],
) -> DryRunResponse:
    """The whole answer: the family's plan with the placements, the cap and what the datasets' reports warn of."""
    names = tuple(placement.hardware for placement in placements)
    requested = next((each for name in names for each in plan.profiles if each.hardware == name), None)
    budget = _share_budget(request, requested)
    base = plan.base.model_copy(update={"earlier_job_id": earlier_model.job_id if earlier_model else None})
    first = tuple(each for name in names for each in plan.profiles if each.hardware == name)
    return plan.model_copy(
        update={
            "training_config": config.model_dump(mode="json"),
            "resolved": resolved,
            "placements": names,
            "base": base,
            "profiles": (*first, *(each for each in plan.profiles if each.hardware not in names)),
            "budget": budget,
            "warnings": (*find_data_warnings(facts.datasets), *plan.warnings, *_warn_of_budget(budget), *_warn_of_hardware(requested)),
        }
    )


def require_planner(config: TrainingConfig) -> FamilyPlanner:
    """The planner of the configuration's family. Raises Unsupported if the family has none."""
    planner = find_planner(config)
    if planner is None:
        hint = f"leave dry_run out; what can be planned: {', '.join(FAMILY_PLANNERS)}"
        raise Unsupported(f"jobs of family {config.family!r} cannot be estimated", hint=hint, param="dry_run")
    return planner


def _rank(estimates: list[HardwareEstimate]) -> list[HardwareEstimate]:
    def cost(estimate: HardwareEstimate) -> tuple[bool, bool, float]:
        most = estimate.usd or estimate.seconds
        return estimate.fit == "unknown", estimate.usd is None, most.high if most else 0.0

    return sorted(estimates, key=cost)


def _share_budget(request: TrainRequest, requested: HardwareEstimate | None) -> BudgetShare:
    usd = requested.usd.high if requested and requested.usd else None
    seconds = requested.seconds.high if requested and requested.seconds else None
    gpus = requested.gpus if requested else 0
    return BudgetShare(
        max_cost_usd=request.max_cost_usd,
        cost_share=usd / request.max_cost_usd if usd is not None and request.max_cost_usd else None,
        max_gpu_seconds=request.max_gpu_seconds,
        gpu_seconds_share=seconds * gpus / request.max_gpu_seconds if seconds is not None and request.max_gpu_seconds else None,
    )


def _warn_of_budget(budget: BudgetShare) -> list[DryRunWarning]:
    warnings: list[DryRunWarning] = []
    for name, cap, share in (
        ("max_cost_usd", budget.max_cost_usd, budget.cost_share),
        ("max_gpu_seconds", budget.max_gpu_seconds, budget.gpu_seconds_share),
    ):
        if cap is not None and share is not None and share > 1:
            message = f"the job may need up to {share:.2g} times its {name} of {cap:g}, and would be paused before it has used more"
            hint = (
                f"raise it to {float(f'{cap * share:.3g}'):g}, or make the training shorter; a paused job can be resumed with a higher cap"
            )
            warnings.append(DryRunWarning(param=name, message=message, hint=hint))
    return warnings


def _warn_of_evaluation(requested: HardwareEstimate | None) -> list[DryRunWarning]:
    memory = requested.memory if requested else None
    if memory is None or memory.available_bytes is None or memory.evaluation_bytes <= memory.available_bytes:
        return []
    message = f"computing the loss on {memory.batch_size} held-out rows at once may need {memory.evaluation_bytes / 1e9:.1f} GB"
    message += f", and {memory.available_bytes / 1e9:.1f} GB can be planned with"
    return [DryRunWarning(param="training_config.hyperparameters.batch_size", message=message, hint="lower batch_size or max_seq_length")]


def _warn_of_hardware(requested: HardwareEstimate | None) -> list[DryRunWarning]:
    if requested is None or requested.fit not in ("does_not_fit", "fits_with_smaller_batch"):
        return _warn_of_evaluation(requested)
    hint = 'send "auto" as hardware, or as batch_size; accelerators lists what would fit'
    return [DryRunWarning(param="hardware", message=f"{requested.hardware}: {requested.reason}", hint=hint)]
