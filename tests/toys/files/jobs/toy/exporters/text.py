"""The count as a text file."""

from typing import Any

from jobs.runtime.artifacts import ExportedArtifact
from jobs.runtime.context import JobContext
from schema.spec import artifact_key


def export(trained: Any, context: JobContext) -> ExportedArtifact:
    folder = context.spec.training_config.artifact_folder("count")
    key = artifact_key(folder, context.spec.job_id, context.attempt, "count.txt")
    return ExportedArtifact(name="count", kind="count", path=trained.folder / "count", key=key)
