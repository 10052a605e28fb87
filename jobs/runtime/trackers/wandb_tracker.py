"""Weights & Biases, online or as a folder in the model store for `wandb sync`."""

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.runtime.context import JobContext
from jobs.runtime.files import list_files
from jobs.runtime.trackers.names import evaluation_scalars, training_scalars
from jobs.runtime.trackers.state import UPLOAD_INTERVAL_S, save_state, state_url
from schema.events import EvaluationCompleted, MetricsLogged, SamplesGenerated

if TYPE_CHECKING:
    import wandb

STEP_METRIC = "train/global_step"  # the name that Hugging Face's W&B integration uses
MAX_RUN_ID_LENGTH = 64  # W&B rejects longer ones; a job id is unique in its last characters


class WandbTracker:
    """One W&B run for the job. The API key is passed in wandb's settings, not in the environment, a netrc file or a command line."""

    def __init__(self, context: JobContext, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._context = context
        self._monotonic = monotonic
        self._run: wandb.Run | None = None
        self._uploaded_at = monotonic()

    @property
    def run_id(self) -> str | None:
        return self._run.id if self._run is not None else None

    def start(self) -> str | None:
        import wandb

        spec, config = self._context.spec, self._context.spec.training_config.wandb_config
        assert config is not None
        run: wandb.Run = wandb.init(
            project=config.project,
            name=spec.job_name,
            id=spec.job_id[-MAX_RUN_ID_LENGTH:].lstrip("-_."),
            resume="allow",  # every attempt of the job continues the same run
            dir=self._context.workdir,
            config=spec.training_config.model_dump(mode="json", exclude={"wandb_config": {"api_key"}}),
            settings=wandb.Settings(
                api_key=self._context.secrets.get("wandb_api_key") if config.mode == "online" else None,
                mode=config.mode,
                console="off",  # otherwise wandb would capture the attempt's log
                silent=True,
                disable_git=True,
                disable_code=True,
            ),
        )
        run.define_metric("*", step_metric=STEP_METRIC)
        self._run = run
        return run.url if config.mode == "online" else state_url(self._context, "wandb")

    def log_metrics(self, event: MetricsLogged) -> None:
        self._log(training_scalars(event), event.step)
        if self._is_offline and self._monotonic() - self._uploaded_at >= UPLOAD_INTERVAL_S:
            self._upload_run()

    def log_evaluation(self, event: EvaluationCompleted) -> None:
        self._log(evaluation_scalars(event), event.step)

    def log_samples(self, event: SamplesGenerated) -> None:
        import wandb

        table = wandb.Table(columns=["step", "prompt", "reference", "answer"])
        for sample in event.samples:
            table.add_data(event.step, sample.prompt, sample.reference, sample.text)
        self._log({f"samples/{event.when}": table}, event.step)

    def log_checkpoint(self, folder: Path, step: int) -> None:
        if self._log_model_mode == "checkpoint":
            self._upload(folder, aliases=[f"step-{step}"])

    def log_model(self, folder: Path) -> None:
        if self._log_model_mode != "false":
            self._upload(folder, aliases=["final"])

    def finish(self, *, succeeded: bool) -> None:
        import wandb

        if self._run is not None:
            self._run.finish(exit_code=0 if succeeded else 1)
            wandb.teardown()  # waits for wandb's helper process, which the attempt would kill while it writes
            if self._is_offline:
                self._upload_run()

    @property
    def _is_offline(self) -> bool:
        config = self._context.spec.training_config.wandb_config
        return config is not None and config.mode == "offline"

    @property
    def _log_model_mode(self) -> str:
        config = self._context.spec.training_config.wandb_config
        return config.log_model if config else "false"

    def _log(self, values: Mapping[str, object], step: int) -> None:
        if self._run is not None:
            self._run.log({**values, STEP_METRIC: step})

    def _upload_run(self) -> None:
        """Upload the run's folder as it is now, from a copy: wandb's helper process appends to its files. Raises JobFailed."""
        assert self._run is not None
        source, copies = Path(self._run.dir).parent, self._context.workdir / "wandb-upload"
        shutil.rmtree(copies, ignore_errors=True)
        shutil.copytree(source, copies / source.name, ignore=shutil.ignore_patterns("logs"), symlinks=True)
        save_state(self._context, "wandb", copies, list_files(copies))
        shutil.rmtree(copies)
        self._uploaded_at = self._monotonic()

    def _upload(self, folder: Path, aliases: list[str]) -> None:
        import wandb

        assert self._run is not None
        artifact = wandb.Artifact(f"model-{self._run.id}", type="model")
        artifact.add_dir(str(folder))
        self._run.log_artifact(artifact, aliases=aliases)
