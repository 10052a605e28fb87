"""What a job's numbers are called on every tracker: as Hugging Face's own integrations call them, so that runs can be compared."""

from schema.events import EvaluationCompleted, MetricsLogged


def training_scalars(event: MetricsLogged) -> dict[str, float]:
    """A point of the curves: `train/loss`, `train/epoch`. What could not be had is left out."""
    values = {**event.values, "epoch": event.epoch}
    return {f"train/{name}": value for name, value in values.items() if value is not None}


def evaluation_scalars(event: EvaluationCompleted) -> dict[str, float]:
    """A measurement on the held-out rows: `eval/loss`, and of the model before training `base/loss`."""
    numbers = event.metrics.model_dump(exclude={"notes", "values"}) | event.metrics.values
    group = "base" if event.when == "before" else "eval"
    return {f"{group}/{name.removeprefix('eval_')}": value for name, value in numbers.items() if value is not None}
