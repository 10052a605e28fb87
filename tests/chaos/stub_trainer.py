"""A trainer and an exporter without any ML library, so that the real `jobs.run` around them runs in a fraction of a second."""

import sys
from typing import TYPE_CHECKING

from tests.chaos.attempt_log import append_entry

if TYPE_CHECKING:
    from jobs.llm.trained_model import TrainedModel
    from jobs.runtime.context import JobContext
    from jobs.runtime.family import FinalizeArtifacts
    from schema.job import Artifact
    from schema.training import TrainingConfig

WEIGHTS = bytes(range(256)) * 16


def install_stubs(name: str) -> None:
    """Make the training config name the functions of this file in place of its family's."""
    import httpx2

    from schema.training import SftConfig

    append_entry(name, "started")
    sys.modules["httpx"] = httpx2  # the trainer's environment has this client under the name httpx
    SftConfig.check_export = f"{__name__}:check_export"
    SftConfig.train = f"{__name__}:train"
    SftConfig.export = f"{__name__}:export"


def check_export(_training_config: "TrainingConfig") -> None:
    """Accept every export."""


def train(_training_config: "TrainingConfig", context: "JobContext") -> "TrainedModel":
    """Write a few bytes as the adapter. Runs only in a process that got the claim."""
    from jobs.llm.chat_format import ChatFormat
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
        chat_format=ChatFormat("raw", "raw", None, None, (), (), turn_tokens_are_trained=True),
        metrics=None,
        base_metrics=None,
        train_rows=1,
        train_tokens=1,
        train_runtime_s=0.0,
    )


def export(trained: "TrainedModel", context: "JobContext", _finalize: "FinalizeArtifacts") -> "tuple[Artifact, ...]":
    """Upload the adapter as it is. Its provenance is not recorded: that would need the ML libraries."""
    from jobs.runtime.artifacts import ExportedArtifact, upload_artifacts
    from schema.spec import artifact_key

    key = artifact_key("trained_adapters", context.spec.job_id, context.attempt)
    return upload_artifacts([ExportedArtifact(name="adapter", kind="adapter", path=trained.folder, key=key)], context)
