"""`GET /jobs/{job_id}/metrics`: the curves of a job as columns, for charts."""

from datetime import datetime
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Query
from pydantic import BaseModel
from starlette.responses import Response

from schema.base import Id
from schema.events import MAX_SEQ, EvaluationCompleted
from schema.job import EvalMetrics
from service.api.dependencies import PrincipalDep, ServicesDep
from service.api.route import LimitedRoute
from service.core.errors import InvalidRequest
from service.core.event_store import StoredEvent
from service.core.jobs.curves import CurveView, Selection

router = APIRouter(route_class=LimitedRoute, prefix="/jobs", tags=["jobs"])

MAX_EVALUATIONS = 1000  # of one answer: the newest

Step = Annotated[int, Query(ge=0, le=MAX_SEQ)]


class MetricBuckets(BaseModel):
    """One metric: an item for each bucket, null where it has no value."""

    min: list[float | None]
    max: list[float | None]
    last: list[float | None]


class EvaluationRow(BaseModel):
    """An evaluation on the held-out rows."""

    step: int
    when: Literal["before", "during", "after"]
    at: datetime
    attempt: int
    metrics: EvalMetrics


class AttemptStart(BaseModel):
    """The step from which an attempt started: 0, or that of the checkpoint."""

    attempt: int
    from_step: int


class MetricCurves(BaseModel):
    """A job's metrics over its steps. `step`, `epoch`, `at`, `attempt` and the lists in `metrics` have an item for each bucket."""

    steps: int  # how many steps with metrics were selected
    buckets: int
    step: list[int]  # the last one of each bucket, to which the next three belong
    epoch: list[float | None]
    at: list[datetime]
    attempt: list[int]
    metrics: dict[str, MetricBuckets]
    notes: dict[str, str]  # why the newest value of a metric is missing, by its name
    names_left_out: int  # metrics that are not in the answer because it would be too large; `names` asks for them
    evaluations: list[EvaluationRow]
    attempts: list[AttemptStart]


@router.get("/{job_id}/metrics", response_model=MetricCurves)
def get_job_metrics(
    job_id: Id,
    services: ServicesDep,
    principal: PrincipalDep,
    from_step: Annotated[Step, Query(alias="from", description="The first step.")] = 0,
    to_step: Annotated[Step, Query(alias="to", description="The last step.")] = MAX_SEQ,
    points: Annotated[int, Query(ge=1, le=5000, description="The most buckets.")] = 500,
    names: Annotated[list[str] | None, Query(max_length=200, description="Only these metrics; repeat it for several.")] = None,
) -> Response:
    """A job's metrics in at most `points` buckets of steps, with the lowest, the highest and the last value of each bucket."""
    if from_step > to_step:
        raise InvalidRequest(f"from is {from_step}, which is after to, {to_step}", hint="exchange them", param="from")
    selection = Selection(from_step, to_step, points, tuple(dict.fromkeys(names)) if names else None)
    view = services.jobs.metrics.read(principal, job_id, selection)
    # Rendered without a second validation by pydantic: the lists are long.
    return Response(orjson.dumps(_curves(view)), media_type="application/json")


# Any: plain values in the shape of MetricCurves.
def _curves(view: CurveView) -> dict[str, Any]:
    return {
        "steps": view.steps,
        "buckets": len(view.step),
        "step": view.step,
        "epoch": view.epoch,
        "at": view.at,
        "attempt": view.attempt,
        "metrics": view.metrics,
        "notes": view.notes,
        "names_left_out": view.names_left_out,
        "evaluations": [_evaluation_row(stored) for stored in view.evaluations[-MAX_EVALUATIONS:]],
        "attempts": [{"attempt": attempt, "from_step": step} for attempt, step in view.attempts.items()],
    }


def _evaluation_row(stored: StoredEvent) -> dict[str, Any]:
    evaluation = stored.event
    assert isinstance(evaluation, EvaluationCompleted)
    metrics = evaluation.metrics.model_dump(mode="json")
    return {"step": evaluation.step, "when": evaluation.when, "at": stored.at, "attempt": stored.attempt, "metrics": metrics}
