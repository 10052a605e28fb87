"""TensorBoard: event files in the model store, at trackers/{job_id}/tensorboard/attempt-{n}/.

Point `tensorboard --logdir` at the folder above them, which may be in a bucket; it shows each attempt as a run.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.runtime.context import JobContext
from jobs.runtime.errors import JobFailed
from jobs.runtime.trackers.names import evaluation_scalars, training_scalars
from jobs.runtime.trackers.state import UPLOAD_INTERVAL_S, save_state, state_url
from schema.events import EvaluationCompleted, MetricsLogged, SamplesGenerated

if TYPE_CHECKING:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.summary_pb2 import Summary


class TensorboardTracker:
    """Event files, written locally and uploaded to the store every minute and at the end."""

    def __init__(self, context: JobContext, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._context = context
        self._monotonic = monotonic
        self._folder = context.workdir / "tensorboard"
        self._writer: EventsWriter | None = None
        self._uploaded_at = monotonic()

    @property
    def run_id(self) -> str | None:
        return f"attempt-{self._context.attempt}" if self._writer is not None else None

    def start(self) -> str | None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.summary import text

        self._folder.mkdir(parents=True, exist_ok=True)
        # Not the library's SummaryWriter, whose `flush` does not wait for its queue.
        self._writer = EventsWriter(str(self._folder / "events"))
        config = self._context.spec.training_config.model_dump_json(indent=1)
        self._write(text("training_config", f"```json\n{config}\n```"), 0)
        self._upload()  # a store that rejects it fails here, at the start
        return state_url(self._context, "tensorboard")

    def log_metrics(self, event: MetricsLogged) -> None:
        self._log_scalars(training_scalars(event), event.step)
        if self._monotonic() - self._uploaded_at >= UPLOAD_INTERVAL_S:
            self._upload()

    def log_evaluation(self, event: EvaluationCompleted) -> None:
        self._log_scalars(evaluation_scalars(event), event.step)

    def log_samples(self, event: SamplesGenerated) -> None:
        from tensorboardX.summary import text

        for number, sample in enumerate(event.samples):
            parts = {"prompt": sample.prompt, "answer": sample.text, "reference": sample.reference}
            markdown = "\n\n".join(f"**{name}**\n\n{_to_code_block(part)}" for name, part in parts.items() if part is not None)
            self._write(text(f"samples-{event.when}/{number}", markdown), event.step)

    def log_checkpoint(self, folder: Path, step: int) -> None:
        """Checkpoints are in the model store."""

    def log_model(self, folder: Path) -> None:
        """The model is in the model store."""

    def finish(self, *, succeeded: bool) -> None:  # noqa: ARG002  # event files have no status
        if self._writer is not None:
            self._upload()
            self._writer.close()

    def _log_scalars(self, values: Mapping[str, float], step: int) -> None:
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._write(scalar(name, value), step)

    def _write(self, summary: "Summary", step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event

        assert self._writer is not None
        self._writer.write_event(Event(summary=summary, wall_time=time.time(), step=step))

    def _upload(self) -> None:
        """Upload what is written so far, waiting while the store is unavailable. Raises JobFailed."""
        assert self._writer is not None
        self._writer.flush()
        try:
            save_state(self._context, "tensorboard", self._folder, sorted(self._folder.iterdir()))
        except JobFailed:
            self._writer.close()  # nothing written later could be uploaded
            raise
        self._uploaded_at = self._monotonic()


def _to_code_block(text: str) -> str:
    """A text as an indented code block of Markdown, which shows it verbatim."""
    return "\n".join(f"    {line}" for line in text.splitlines())
