"""The exporters of the toy family."""

from collections.abc import Sequence
from pkgutil import resolve_name
from typing import Any

from jobs.runtime.artifacts import ExportedArtifact, upload_artifacts
from jobs.runtime.context import JobContext
from jobs.runtime.family import FinalizeArtifacts
from schema.job import Artifact

EXPORTERS = {"text": "jobs.toy.exporters.text:export"}


def check_exportable(config: Any) -> None:
    """Everything can be exported."""


def export_all(trained: Any, context: JobContext, finalize: FinalizeArtifacts) -> Sequence[Artifact]:
    export = resolve_name(EXPORTERS[context.spec.training_config.export_config.format])
    exported: list[ExportedArtifact] = [export(trained, context)]
    return finalize(exported, upload_artifacts(exported, context), lambda record, repo_id: f"# {repo_id}")
