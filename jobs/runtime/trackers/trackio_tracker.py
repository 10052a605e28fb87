"""Trackio: in a Hugging Face Space, or as a database in the model store, for `TRACKIO_DIR=folder trackio show`.

It runs in a child process, because the library reads its token and its folder from the environment, where the attempt must not put them.
It is not part of the trainer's environment, because it needs an older Pillow than the trainer. If it is missing, the job gets a warning.
"""

import contextlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from jobs.runtime.context import JobContext
from jobs.runtime.settings import read_egress_policy
from jobs.runtime.subprocesses import REPOSITORY
from jobs.runtime.trackers.names import evaluation_scalars, training_scalars
from jobs.runtime.trackers.state import save_state, state_url
from schema.egress import EGRESS_VARIABLE
from schema.events import EvaluationCompleted, MetricsLogged, SamplesGenerated

INSTALL_COMMAND = "pip install trackio==0.43.0"
EXIT_TIMEOUT_S = 50  # to send the remaining data; the attempt waits a minute


class TrackioTracker:
    """One Trackio run for the job, in a child process that receives one line of JSON per command and replies to each."""

    def __init__(self, context: JobContext) -> None:
        config = context.spec.training_config.trackio_config
        assert config is not None
        self._context, self._config = context, config
        self._log_path = context.workdir / "trackio" / "log"
        self._process: subprocess.Popen[str] | None = None

    @property
    def run_id(self) -> str | None:
        return self._context.spec.job_id if self._process is not None else None

    def start(self) -> str | None:
        if find_spec("trackio") is None:
            raise ModuleNotFoundError(f"trackio is not installed in the trainer's environment; {INSTALL_COMMAND}")
        folder = self._log_path.parent
        folder.mkdir(parents=True, exist_ok=True)
        with self._log_path.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jobs.runtime.trackers.trackio_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,
                env={"PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path]), **self._environment(folder)},
                text=True,
            )
        spec, config = self._context.spec, self._config
        arguments = {"project": config.project, "name": spec.job_id, "space_id": config.space_id}
        arguments |= {"config": spec.training_config.model_dump(mode="json"), "private": True}
        self._send({"init": arguments, "guarded": config.space_id is not None and _uses_public_hub()})
        if config.space_id is None:
            return state_url(self._context, "trackio")
        return f"https://huggingface.co/spaces/{config.space_id}"

    def log_metrics(self, event: MetricsLogged) -> None:
        self._send({"log": training_scalars(event), "step": event.step})

    def log_evaluation(self, event: EvaluationCompleted) -> None:
        self._send({"log": evaluation_scalars(event), "step": event.step})

    def log_samples(self, event: SamplesGenerated) -> None:
        rows = [[sample.prompt, sample.reference, sample.text] for sample in event.samples]
        self._send({"table": f"samples/{event.when}", "columns": ["prompt", "reference", "answer"], "rows": rows, "step": event.step})

    def log_checkpoint(self, folder: Path, step: int) -> None:
        """Checkpoints are in the model store."""

    def log_model(self, folder: Path) -> None:
        """The model is in the model store."""

    def finish(self, *, succeeded: bool) -> None:
        if self._process is not None:
            self._send({"finish": succeeded})
            self._close_process()
            if self._config.space_id is None:
                save_state(self._context, "trackio", self._log_path.parent, sorted(self._log_path.parent.glob("*.db")))

    def _environment(self, folder: Path) -> dict[str, str]:
        """The child's environment: its folder, and a token if the run is in a Space."""
        from huggingface_hub import constants

        environment = {"TRACKIO_DIR": str(folder), "HF_HOME": str(folder / "hf"), "HF_ENDPOINT": constants.ENDPOINT, "HOME": str(folder)}
        environment[EGRESS_VARIABLE] = read_egress_policy().model_dump_json()
        token = self._context.secrets.get("hf_token") if self._config.space_id else None
        return environment | ({"HF_TOKEN": token} if token else {})

    def _send(self, message: dict[str, object]) -> None:
        """Send the child one command and wait until it is done. Raises RuntimeError with the child's message."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            self._close_process()
            raise RuntimeError(self._read_stderr())

    def _close_process(self) -> None:
        """Wait for the child to exit and close its pipes."""
        assert self._process is not None
        with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
            self._process.communicate(timeout=EXIT_TIMEOUT_S)

    def _read_stderr(self) -> str:
        """The last line that the child wrote: the error of a traceback."""
        lines = [line for line in self._log_path.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "its process exited without a message"


def _uses_public_hub() -> bool:
    """Whether Spaces are on the public internet. The operator's own Hub may be at any address."""
    from huggingface_hub import constants

    return constants.HUGGINGFACE_CO_URL_HOME.rstrip("/") == constants.ENDPOINT
