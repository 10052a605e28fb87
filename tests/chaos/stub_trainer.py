"""A trainer and an exporter without any ML library, so that the real `jobs.run` around them runs in a fraction of a second."""

import sys
from typing import TYPE_CHECKING

from tests.chaos.ledger import note

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jobs.context import JobContext
    from jobs.exporters.bench import Bench
    from jobs.publish import Product
    from jobs.trained import TrainedModel
    from schema.job import Artifact
    from schema.training import TrainingConfig

WEIGHTS = bytes(range(256)) * 16


def take_their_places(name: str) -> None:
    """What the attempt of this process finds where the trainer and the exporters are named."""
    import httpx2

    from jobs import attempt
    from jobs.exporters import EXPORTERS
    from schema.training import SftConfig

    note(name, "started")
    sys.modules["httpx"] = httpx2  # the same client, under the name that the trainer's environment has it by
    SftConfig.trainer = f"{__name__}:train"
    EXPORTERS["adapter"] = f"{__name__}:export"
    attempt.SEAL = f"{__name__}:NoSeal"


def train(_training_config: "TrainingConfig", context: "JobContext") -> "TrainedModel":
    """A few bytes for an adapter. Called only by a process that was given the claim."""
    from jobs.trained import TrainedModel

    note(f"{context.spec.job_id}.{context.attempt}", "owned")
    context.phase("training")
    folder = context.workdir / "model"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    return TrainedModel(
        folder=folder,
        is_adapter=True,
        base_folder=folder,
        probes=(),
        metrics=None,
        base_metrics=None,
        train_rows=1,
        train_tokens=1,
        train_runtime_s=0.0,
    )


def export(bench: "Bench") -> "tuple[Product, ...]":
    """The adapter as it is."""
    from jobs.publish import Product, artifact_key

    spec = bench.context.spec
    key = artifact_key("adapter", spec.job_id, bench.context.attempt)
    return (Product(name="adapter", kind="adapter", path=bench.trained.folder, key=key),)


class NoSeal:
    """Nothing is written down: that would need the libraries."""

    def __init__(self, _context: "JobContext", **_: object) -> None:
        pass

    def put_on(self, _trained: "TrainedModel", _products: object, artifacts: "Sequence[Artifact]") -> "tuple[Artifact, ...]":
        """The artifacts as they are."""
        return tuple(artifacts)
