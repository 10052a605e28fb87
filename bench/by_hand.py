"""The trainer run by hand, without a service: `python -m bench.by_hand SPEC.json WORKDIR` in the trainer's environment.

Prints the seconds of training. Its events go nowhere.
"""

import sys
from pathlib import Path

from jobs.context import JobContext, Secrets, Stores
from jobs.trainers.sft import train
from schema.events import Event
from schema.spec import JobSpec


class Nobody:
    """Neither listens nor stops anything."""

    def report(self, event: Event) -> None:
        """Forget it."""

    def place(self, **_: object) -> None:
        """Forget it."""

    def check(self) -> None:
        """Go on."""


def main() -> None:
    """Train as the spec says."""
    spec = JobSpec.load(Path(sys.argv[1]).read_bytes())
    context = JobContext(
        spec=spec,
        attempt=1,
        workdir=Path(sys.argv[2]),
        secrets=Secrets({}),
        stores=Stores(spec.stores),
        voice=Nobody(),
        stop=Nobody(),
    )
    print(train(spec.training_config, context).train_runtime_s)


if __name__ == "__main__":
    main()
