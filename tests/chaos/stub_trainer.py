"""A trainer and an exporter without any ML library, so that the real `jobs.run` around them runs in a fraction of a second."""

import sys
from typing import TYPE_CHECKING

from tests.chaos.request_log import append_entry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jobs.llm.exporters.workspace import ExportWorkspace
    from jobs.llm.trained_model import TrainedModel
    from jobs.runtime.artifacts import ExportedArtifact
    from jobs.runtime.context import JobContext
    from schema.job import Artifact
    from schema.training import TrainingConfig

WEIGHTS = bytes(range(256)) * 16


def install_stubs(name: str) -> None:
    """Replace the trainer and the exporters of the attempt in this process."""
    import httpx2

    from jobs.llm.exporters import EXPORTERS
    from jobs.runtime import attempt
    from schema.training import SftConfig

    append_entry(name, "started")
    sys.modules["httpx"] = httpx2  # the same client, under the name that the trainer's environment has it by
    SftConfig.trainer = f"{__name__}:train"
    EXPORTERS["adapter"] = f"{__name__}:export"
    attempt.PROVENANCE_RECORDER = f"{__name__}:NoProvenance"


def train(_training_config: "TrainingConfig", context: "JobContext") -> "TrainedModel":
    """Write a few bytes as the adapter. Runs only in a process that got the claim."""
    from jobs.llm.trained_model import TrainedModel

    append_entry(f"{context.spec.job_id}.{context.attempt}", "claimed")
    context.enter_phase("training")
    folder = context.workdir / "model"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    return TrainedModel(
        folder=folder,
        is_adapter=True,
        base_folder=folder,
        held_out_examples=(),
        metrics=None,
        base_metrics=None,
        train_rows=1,
        train_tokens=1,
        train_runtime_s=0.0,
    )


def export(workspace: "ExportWorkspace") -> "tuple[ExportedArtifact, ...]":
    """Return the adapter unchanged."""
    from jobs.runtime.artifacts import ExportedArtifact, artifact_key

    spec = workspace.context.spec
    key = artifact_key("adapter", spec.job_id, workspace.context.attempt)
    return (ExportedArtifact(name="adapter", kind="adapter", path=workspace.trained.folder, key=key),)


class NoProvenance:
    """Records nothing: that would need the ML libraries."""

    def __init__(self, _context: "JobContext", **_: object) -> None:
        pass

    def finalize(self, _trained: "TrainedModel", _products: object, artifacts: "Sequence[Artifact]") -> "tuple[Artifact, ...]":
        """Return the artifacts unchanged."""
        return tuple(artifacts)
