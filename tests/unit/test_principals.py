"""Every verb of the core takes a Principal first and refuses one that lacks its scope."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from service.core.datasets.assembly import DatasetServices
from service.core.errors import Forbidden
from service.core.jobs.assembly import JobServices
from service.core.models.registry import ModelRegistry
from service.core.principals import LOCAL_PRINCIPAL, UPKEEP_PRINCIPAL, Principal, Scope, attempt_principal
from tests.unit.dataset_records import make_datasets
from tests.unit.jobs_harness import JobsHarness, make_batch

# Steps of the service itself, which no request names: they act on records that were found before.
INTERNAL = {"JobQueries.describe", "Attempts.apply_result", "Attempts.check_result", "Reconciliation.reconcile_job"}
NOBODY = Principal("local", "nobody", frozenset())


def iter_verbs() -> Iterator[tuple[str, Callable[..., object]]]:
    """Every public method of the core's services."""
    parts = [field.type for services in (JobServices, DatasetServices) for field in fields(services) if field.name != "repository"]
    for owner in [*parts, ModelRegistry]:
        assert isinstance(owner, type)
        for name, method in vars(owner).items():
            if inspect.isfunction(method) and not name.startswith("_"):
                yield f"{owner.__name__}.{name}", method


VERBS = dict(iter_verbs())


def test_there_are_verbs_of_every_service() -> None:
    assert {name.partition(".")[0] for name in VERBS} == {
        *("Submission", "JobControl", "Exports", "JobQueries", "JobMetrics", "Deletion", "Attempts", "Reconciliation"),
        *("CheckpointRetention", "StorageQueries", "ModelRegistry", "Datasets", "DatasetIngestion", "IncomingFiles", "TokenCounts"),
        "Ingestions",
    }
    assert set(VERBS) > INTERNAL


@pytest.mark.parametrize("name", sorted(set(VERBS) - INTERNAL))
def test_verb_takes_a_principal_first_and_refuses_one_without_scopes(name: str, harness: JobsHarness) -> None:
    parameters = list(inspect.signature(VERBS[name]).parameters.values())[1:]
    assert (parameters[0].name, parameters[0].annotation) == ("principal", Principal)
    owner = make_owner(name, harness)
    arguments: list[Any] = [parameter.default if parameter.default is not parameter.empty else "x" for parameter in parameters[1:]]
    keywords = {p.name: value for p, value in zip(parameters[1:], arguments, strict=True) if p.kind is p.KEYWORD_ONLY}
    positional = [value for p, value in zip(parameters[1:], arguments, strict=True) if p.kind is not p.KEYWORD_ONLY]
    if name == "Attempts.finish":
        positional = [harness.write_result(harness.start_training())]
    verb = getattr(owner, name.partition(".")[2])
    with pytest.raises(Forbidden):
        verb(NOBODY, *positional, **keywords)


def make_owner(name: str, harness: JobsHarness) -> object:
    owner = name.partition(".")[0]
    if owner == "ModelRegistry":
        return ModelRegistry(harness.objects, harness.hub)
    datasets = make_datasets(Path("/unused"))
    return next(part for services in (harness.jobs, datasets) for part in vars(services).values() if type(part).__name__ == owner)


def test_attempt_may_report_for_itself_alone(harness: JobsHarness) -> None:
    job = harness.start_training()
    other = attempt_principal(job.job_id, 2)
    with pytest.raises(Forbidden, match="is not attempt 1"):
        harness.jobs.attempts.report(other, job.job_id, 1, make_batch(), "p")
    with pytest.raises(Forbidden):
        harness.jobs.attempts.claim(LOCAL_PRINCIPAL, job.job_id, 1, "p")
    with pytest.raises(Forbidden):
        harness.jobs.control.cancel(attempt_principal(job.job_id, 1), job.job_id)


def test_upkeep_may_not_read_jobs_and_reader_may_not_change_them(harness: JobsHarness) -> None:
    job = harness.submit()
    with pytest.raises(Forbidden, match="jobs:read"):
        harness.jobs.queries.get_refreshed(UPKEEP_PRINCIPAL, job.job_id)
    reader = replace(LOCAL_PRINCIPAL, scopes=frozenset({Scope.JOBS_READ}))
    assert harness.jobs.queries.get_refreshed(reader, job.job_id).job == job
    with pytest.raises(Forbidden, match="jobs:write"):
        harness.jobs.control.pause(reader, job.job_id)
