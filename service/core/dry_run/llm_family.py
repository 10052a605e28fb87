"""The functions by which language models are planned, as `planner.py` calls them."""

from collections.abc import Sequence

from schema.dry_run import DryRunResponse, HardwareEstimate
from schema.training.llm import LlmTrainingConfig
from schema.training.resolved import ResolvedValue
from service.core.dry_run import llm_choices
from service.core.dry_run.facts import JobFacts
from service.core.dry_run.llm import LlmPlanner, rank
from service.core.dry_run.llm_facts import make_device, read_llm_facts
from service.core.launchers import Offer

has_auto = llm_choices.has_auto
set_defaults = llm_choices.set_defaults


def choose_numbers(
    config: LlmTrainingConfig, facts: JobFacts, offers: Sequence[Offer]
) -> tuple[LlmTrainingConfig, tuple[ResolvedValue, ...]]:
    """The configuration with a number in place of every "auto", for all of the offers."""
    devices = [make_device(offer.profile) for offer in offers]
    return llm_choices.choose_numbers(config, read_llm_facts(config, facts), devices)


def estimate_offers(config: LlmTrainingConfig, facts: JobFacts, offers: Sequence[Offer]) -> list[HardwareEstimate]:
    """What the job takes at each of the offers, the best first."""
    planner = _make_planner(config, facts)
    return sorted((planner.estimate_offer(offer, supported=True) for offer in offers), key=rank)


def plan(config: LlmTrainingConfig, facts: JobFacts, offers: Sequence[Offer], supported: Sequence[bool]) -> DryRunResponse:
    """The family's part of a dry run."""
    return _make_planner(config, facts).plan(offers, supported)


def _make_planner(config: LlmTrainingConfig, facts: JobFacts) -> LlmPlanner:
    return LlmPlanner(config, read_llm_facts(config, facts), is_stored=facts.base is not None)
