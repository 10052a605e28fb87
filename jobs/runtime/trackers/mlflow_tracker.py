"""MLflow, through the library's REST store.

Not through `MlflowClient`, which reads the token from the environment and starts the library's telemetry. Each connection is checked
against the egress policy, and redirects are errors.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import quote, urlsplit

from pydantic import JsonValue

from jobs.runtime.context import JobContext
from jobs.runtime.egress import check_url, guard_connections
from jobs.runtime.settings import read_egress_policy, refuse_mlflow_redirects
from jobs.runtime.trackers.names import evaluation_scalars, training_scalars
from schema.egress import Target
from schema.events import EvaluationCompleted, MetricsLogged, SamplesGenerated

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.store.tracking.rest_store import RestStore
    from mlflow.utils.rest_utils import MlflowHostCreds

JOB_TAG = "tunesmith.job_id"
TABLES_TAG = "mlflow.loggedArtifacts"  # MLflow's UI finds tables by this tag
MAX_TABLES = 60  # a tag holds some 5000 characters; older tables stay in the run but are not listed
MAX_PARAMS_PER_BATCH = 100  # the server's limit
MAX_PARAM_CHARACTERS = 6000
SAMPLE_COLUMNS = ("step", "prompt", "reference", "answer")


class MlflowTracker:
    """One MLflow run for the job, found again by a tag. The token is only sent in requests; it is not in the environment."""

    def __init__(self, context: JobContext) -> None:
        config = context.spec.training_config.mlflow_config
        assert config is not None
        self._context, self._config = context, config
        self._policy = read_egress_policy()
        self._target: Target | None = None
        self._store: RestStore | None = None
        self._run: Run | None = None
        self._tables: list[str] = []

    @property
    def run_id(self) -> str | None:
        return self._run.info.run_id if self._run is not None else None

    def start(self) -> str | None:
        # Before the import, which takes seconds. Raises EgressRefused.
        self._target = check_url(self._config.tracking_uri, self._policy)
        from mlflow.store.tracking.rest_store import RestStore

        refuse_mlflow_redirects()
        self._store = RestStore(self._credentials)
        with self._guard():
            experiment_id = self._get_or_create_experiment()
            run = self._run = self._resume_run(experiment_id) or self._create_run(experiment_id)
        return f"{self._tracking_uri}/#/experiments/{experiment_id}/runs/{run.info.run_id}"

    def log_metrics(self, event: MetricsLogged) -> None:
        self._log_scalars(training_scalars(event), event.step)

    def log_evaluation(self, event: EvaluationCompleted) -> None:
        self._log_scalars(evaluation_scalars(event), event.step)

    def log_samples(self, event: SamplesGenerated) -> None:
        path = f"samples/{event.when}-{event.step}.json"
        rows = [[event.step, sample.prompt, sample.reference, sample.text] for sample in event.samples]
        if not self._put_artifact(path, json.dumps({"columns": SAMPLE_COLUMNS, "data": rows}).encode()):
            return
        self._tables = [*(table for table in self._tables if table != path), path][-MAX_TABLES:]
        self._set_tag(TABLES_TAG, json.dumps([{"path": table, "type": "table"} for table in self._tables]))

    def log_checkpoint(self, folder: Path, step: int) -> None:
        """Checkpoints are in the model store."""

    def log_model(self, folder: Path) -> None:
        """The model is in the model store."""

    def finish(self, *, succeeded: bool) -> None:
        from mlflow.entities import RunStatus

        if self._store is not None and self._run is not None:
            status = RunStatus.FINISHED if succeeded else RunStatus.FAILED
            with self._guard():
                self._store.update_run_info(self._run.info.run_id, status, _now_ms(), None)

    def _guard(self) -> AbstractContextManager[None]:
        assert self._target is not None
        return guard_connections(self._target, self._policy)

    @property
    def _tracking_uri(self) -> str:
        return self._config.tracking_uri.rstrip("/")

    def _credentials(self) -> "MlflowHostCreds":
        from mlflow.utils.rest_utils import MlflowHostCreds

        return MlflowHostCreds(self._tracking_uri, token=self._context.secrets.get("mlflow_token"))

    def _get_or_create_experiment(self) -> str:
        assert self._store is not None
        experiment = self._store.get_experiment_by_name(self._config.experiment_name)
        return str(experiment.experiment_id if experiment else self._store.create_experiment(self._config.experiment_name))

    def _resume_run(self, experiment_id: str) -> "Run | None":
        """The run that an earlier attempt started, set to running again."""
        from mlflow.entities import RunStatus, ViewType

        assert self._store is not None
        job_filter = f"tags.`{JOB_TAG}` = '{self._context.spec.job_id}'"
        for run in self._store.search_runs([experiment_id], job_filter, ViewType.ACTIVE_ONLY, max_results=1):
            self._store.update_run_info(run.info.run_id, RunStatus.RUNNING, None, None)
            self._tables = [table["path"] for table in json.loads(run.data.tags.get(TABLES_TAG, "[]"))]
            return run
        return None

    def _create_run(self, experiment_id: str) -> "Run":
        from mlflow.entities import Param, RunTag

        assert self._store is not None
        spec = self._context.spec
        tags = [RunTag(JOB_TAG, spec.job_id), RunTag("mlflow.source.name", "tunesmith")]
        run = cast("Run", self._store.create_run(experiment_id, spec.tenant_id, _now_ms(), tags, spec.job_name))
        params = (Param(name, value[:MAX_PARAM_CHARACTERS]) for name, value in flatten_config(spec.training_config.model_dump(mode="json")))
        while batch := list(islice(params, MAX_PARAMS_PER_BATCH)):
            self._store.log_batch(run.info.run_id, [], batch, [])
        return run

    def _log_scalars(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        assert self._store is not None
        assert self._run is not None
        now = _now_ms()
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        with self._guard():
            self._store.log_batch(self._run.info.run_id, metrics, [], [])

    def _set_tag(self, name: str, value: str) -> None:
        from mlflow.entities import RunTag

        assert self._store is not None
        assert self._run is not None
        with self._guard():
            self._store.set_tag(self._run.info.run_id, RunTag(name, value))

    def _put_artifact(self, path: str, content: bytes) -> bool:
        """Upload a file of the run to the server; False if the server does not proxy its artifact store."""
        from mlflow.utils.rest_utils import augmented_raise_for_status, http_request

        assert self._run is not None
        root = urlsplit(self._run.info.artifact_uri or "")
        if root.scheme != "mlflow-artifacts":
            return False
        endpoint = f"/api/2.0/mlflow-artifacts/artifacts{root.path.rstrip('/')}/{quote(path)}"
        headers = {"Content-Type": "application/json"}
        with self._guard():
            augmented_raise_for_status(http_request(self._credentials(), endpoint, "PUT", data=content, extra_headers=headers))
        return True


def flatten_config(value: JsonValue, name: str = "") -> Iterator[tuple[str, str]]:
    """A config as MLflow parameters: `hyperparameters.lora_rank`, `16`. Fields that are None are left out."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from flatten_config(child, f"{name}.{key}" if name else key)
    elif value is not None:
        yield name, value if isinstance(value, str) else json.dumps(value)


def _now_ms() -> int:
    return int(time.time() * 1000)
