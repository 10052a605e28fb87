"""Runs the trainer without the service: `python -m bench.direct_training SPEC.json WORKDIR` in the trainer's environment.

Prints the training time in seconds; discards all events.
"""

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from jobs.llm.trainers.sft import train
from jobs.runtime.checkpoints import Checkpoints
from jobs.runtime.context import JobContext, Secrets, Stores
from jobs.runtime.errors import StopReason
from schema.events import Event
from schema.spec import JobSpec
from schema.training import SftConfig


class NoOpControl:
    """Ignores events and never stops."""

    def report(self, event: Event) -> None:
        """Do nothing."""

    def set_progress(self, **_: object) -> None:
        """Do nothing."""

    @property
    def stop_reason(self) -> StopReason | None:
        """Always None."""
        return None

    def check(self) -> None:
        """Do nothing."""

    def defer_stop(self) -> AbstractContextManager[None]:
        """A context that defers nothing."""
        return nullcontext()

    def time_left_s(self) -> float | None:
        """No limit."""
        return None


def main() -> None:
    """Train according to the spec."""
    # Resume from this attempt itself, so that the job's checkpoints are ignored.
    spec = JobSpec.load(Path(sys.argv[1]).read_bytes()).model_copy(update={"resume_from_attempt": 2})
    workdir = Path(sys.argv[2])
    assert isinstance(spec.training_config, SftConfig)
    context = JobContext(
        spec=spec,
        attempt=2,
        workdir=workdir,
        secrets=Secrets({}),
        stores=Stores(spec.stores),
        event_sink=NoOpControl(),
        stop=NoOpControl(),
        checkpoints=Checkpoints(
            store=Stores(spec.stores).models,
            spec=spec,
            attempt=2,
            folder=workdir / "checkpoints",
            save_total_limit=2,
            emit=NoOpControl().report,
        ),
    )
    print(train(spec.training_config, context).train_runtime_s)


if __name__ == "__main__":
    main()
