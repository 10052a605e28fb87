"""Names of a job's metrics on every tracker: those of Hugging Face's own integrations, so that runs can be compared."""

from schema.events import EvaluationCompleted, MetricsLogged


def training_scalars(event: MetricsLogged) -> dict[str, float]:
    """Metrics of one step: `train/loss`, `train/epoch`. Missing values are left out."""
    values = {**event.values, "epoch": event.epoch}
    return {f"train/{name}": value for name, value in values.items() if value is not None}


def evaluation_scalars(event: EvaluationCompleted) -> dict[str, float]:
    """An evaluation on the held-out rows: `eval/loss`, or `base/loss` for the model before training."""
    metrics = event.metrics.model_dump(exclude={"notes", "values"}) | event.metrics.values
    group = "base" if event.when == "before" else "eval"
    return {f"{group}/{name.removeprefix('eval_')}": value for name, value in metrics.items() if value is not None}
