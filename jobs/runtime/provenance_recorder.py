"""The end of a job that trained well: where its artifacts come from is written down beside them, and they go to the Hub if they are to."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from jobs.runtime.system_metrics import EnergyMeter
from schema.job import Artifact
from schema.provenance import CodeRecord
from schema.version import VERSION

if TYPE_CHECKING:
    from jobs.llm.trained_model import TrainedModel
    from jobs.runtime.artifacts import ExportedArtifact
    from jobs.runtime.context import JobContext


class ProvenanceRecorder:
    """Made when the attempt begins, so that it knows what the attempt took; used once, when everything is uploaded."""

    def __init__(self, context: "JobContext", *, image: str | None, started_at: datetime) -> None:
        self._context = context
        self._code = CodeRecord(tunesmith_version=VERSION, image=image)
        self._started_at = started_at
        self._energy = EnergyMeter()
        self._energy.start_sampling()

    def finalize(
        self, trained: "TrainedModel", products: "Sequence[ExportedArtifact]", artifacts: Sequence[Artifact]
    ) -> tuple[Artifact, ...]:
        """The artifacts with `run.json` beside them, and where they are on the Hub. Raises JobFailed."""
        from jobs.llm.model_card import model_card, read_license
        from jobs.runtime.hub import push
        from jobs.runtime.provenance import record_bytes, run_record, store_record

        record = run_record(
            self._context,
            trained,
            artifacts,
            code=self._code,
            energy=self._energy.read(),
            started_at=self._started_at,
            now=datetime.now(UTC),
            decisions=self._context.state.decisions,
        )
        content = record_bytes(record)
        sealed = store_record(content, artifacts, self._context)
        repo_id = self._context.spec.training_config.export_config.hf_repo_id
        if repo_id is None:
            return sealed
        return push(products, sealed, model_card(record, repo_id, read_license(trained.base_folder)), content, self._context)
