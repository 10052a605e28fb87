"""A tracker that writes one line per metric into the model store when it finishes."""

from pathlib import Path

from jobs.runtime.context import JobContext
from schema.events import EvaluationCompleted, MetricsLogged, SamplesGenerated


class ToyTracker:
    def __init__(self, context: JobContext) -> None:
        self._context = context
        self._lines: list[str] = []
        self.run_id: str | None = None

    def start(self) -> str | None:
        self.run_id = "toy-run"
        return None

    def log_metrics(self, event: MetricsLogged) -> None:
        self._lines.append(f"{event.step} {event.values['count']}")

    def log_evaluation(self, event: EvaluationCompleted) -> None: ...

    def log_samples(self, event: SamplesGenerated) -> None: ...

    def log_checkpoint(self, folder: Path, step: int) -> None: ...

    def log_model(self, folder: Path) -> None: ...

    def finish(self, *, succeeded: bool) -> None:
        key = f"trackers/{self._context.spec.job_id}/toy/{self._context.attempt}.txt"
        self._context.stores.models.write(key, "\n".join(self._lines).encode())
