"""Trackers log a job's metrics; their delays and errors do not affect the training."""

import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from jobs.runtime.context import JobContext, Secrets
from jobs.runtime.trackers import TRACKERS, TrackerThread, start_trackers
from jobs.runtime.trackers.mlflow_tracker import MlflowTracker
from jobs.runtime.trackers.state import UPLOAD_INTERVAL_S
from jobs.runtime.trackers.tensorboard_tracker import TensorboardTracker
from jobs.runtime.trackers.wandb_tracker import WandbTracker
from schema.events import EvaluationCompleted, MetricsLogged, SamplesGenerated, TrackerStarted
from schema.job import EvalMetrics, Sample
from schema.training.trackers import MlflowConfig
from tests.jobs.conftest import EventRecorder, make_context, make_spec
from tests.jobs.fake_mlflow import FakeMlflow

KEY = "k" * 40
SAMPLED = SamplesGenerated(when="after", step=3, samples=(Sample(prompt="what is", text="an answer"),))


class FailingTracker:
    """A tracker that raises when metrics are logged."""

    run_id = "run-1"

    def __init__(self) -> None:
        self.calls = 0

    def start(self) -> str | None:
        return "https://curves.example/1"

    def log_metrics(self, event: MetricsLogged) -> None:
        self.calls += 1
        raise ConnectionError(f"no route with {KEY}\nmore")

    def log_evaluation(self, event: Any) -> None: ...

    def log_samples(self, event: Any) -> None: ...

    def log_checkpoint(self, folder: Path, step: int) -> None: ...

    def log_model(self, folder: Path) -> None: ...

    def finish(self, *, succeeded: bool) -> None:
        self.succeeded = succeeded


def test_failing_tracker_is_dropped_with_one_redacted_warning(tmp_path: Path) -> None:
    record, tracker = EventRecorder(), FailingTracker()
    context = make_context(make_spec(tmp_path / "objects"), tmp_path, record, secrets={"wandb_api_key": KEY})
    thread = TrackerThread("failing", tracker, context)
    thread.start()
    for step in range(5):
        thread.log_metrics(MetricsLogged(step=step, values={}))
    assert thread.run_id == "run-1"
    thread.finish(succeeded=True, timeout_s=5)
    assert tracker.calls == 1
    assert list(record.warnings) == ["tracker_failed"]
    assert "continues without it" in record.warnings["tracker_failed"]
    assert KEY not in record.warnings["tracker_failed"]
    assert [event.url for event in record.events if isinstance(event, TrackerStarted)] == ["https://curves.example/1"]


def test_hanging_tracker_is_waited_for_with_timeout(tmp_path: Path) -> None:
    class HangingTracker(FailingTracker):
        def log_metrics(self, event: MetricsLogged) -> None:
            released.wait(20)

    released, record = threading.Event(), EventRecorder()
    thread = TrackerThread("hanging", HangingTracker(), make_context(make_spec(tmp_path / "objects"), tmp_path, record))
    thread.log_metrics(MetricsLogged(step=1, values={}))
    thread.finish(succeeded=True, timeout_s=0.1)
    released.set()
    assert list(record.warnings) == ["tracker_unfinished"]


def test_secrets_are_hidden_and_redacted() -> None:
    secrets = Secrets({"hf_token": "hf_secret", "empty": ""})
    assert "hf_secret" not in repr(secrets) + str(secrets)
    assert secrets.redact("with hf_secret inside") == "with ********** inside"


def test_no_tracker_is_started_without_config(tmp_path: Path) -> None:
    assert start_trackers(make_context(make_spec(tmp_path / "objects"), tmp_path)) == []


def read_wandb_records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: a header of seven bytes, then a LevelDB log in blocks of 32 KiB."""
    content, offset, parts = path.read_bytes(), 7, b""
    while offset + 7 <= len(content):
        if (rest := 32768 - offset % 32768) < 7:
            offset += rest
            continue
        _, length, kind = struct.unpack("<IHB", content[offset : offset + 7])
        parts += content[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def read_wandb_run(workdir: Path) -> list[Any]:
    """The records of the only W&B run in a folder."""
    from wandb.proto import wandb_internal_pb2

    (path,) = workdir.glob("wandb/offline-run-*/*.wandb")
    return [wandb_internal_pb2.Record.FromString(content) for content in read_wandb_records(path)]


def test_attempts_share_one_wandb_run_and_pause_is_not_failure(tmp_path: Path) -> None:
    spec = make_spec(tmp_path / "objects", wandb_config={"mode": "offline", "project": "p"})
    runs, exits, points = [], [], []
    for attempt in (1, 2):
        workdir = tmp_path / str(attempt)
        context = make_context(spec, workdir, attempt=attempt)
        (thread,) = start_trackers(context)
        context.log_metrics(attempt, {"loss": float(attempt)})
        thread.finish(succeeded=True, timeout_s=30)  # a pause, then the end
        runs.append(thread.run_id)
        for record in read_wandb_run(workdir):
            runs += [record.run.run_id] if record.HasField("run") else []
            exits += [record.exit.exit_code] if record.HasField("exit") else []
            points += [item.value_json for item in record.history.item if "train/loss" in (item.key, *item.nested_key)]
    assert set(runs) == {spec.job_id}
    assert exits == [0, 0]
    assert points == ["1", "2"]


def test_offline_wandb_has_metrics_and_config_but_no_key(tmp_path: Path) -> None:
    spec = make_spec(tmp_path / "objects", wandb_config={"mode": "offline", "project": "p", "log_model": "end"})
    record = EventRecorder()
    context = make_context(spec, tmp_path, record, secrets={"wandb_api_key": KEY})
    (thread,) = start_trackers(context)
    for step in range(1, 4):
        context.log_metrics(step, {"loss": 2.5 / step, "learning_rate": 1e-4}, epoch=0.1)
    context.log_evaluation("before", 0, EvalMetrics(eval_loss=4.0, perplexity=54.6))
    context.log_evaluation("after", 3, EvalMetrics(eval_loss=3.0, content_perplexity=8.5, values={"exact_match": 0.5, "bleu": None}))
    context.log_samples(SAMPLED)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"w")
    context.notify_model_saved(tmp_path / "model")
    thread.finish(succeeded=True, timeout_s=30)
    assert record.warnings == {}

    history: dict[str, list[str]] = {}
    config: dict[str, str] = {}
    for content in read_wandb_run(tmp_path):
        for item in content.history.item:
            history.setdefault(".".join(item.nested_key) or item.key, []).append(item.value_json)
        for update in content.run.config.update:
            config[update.key] = update.value_json
        if content.HasField("run"):
            assert (content.run.display_name, content.run.project) == (spec.job_name, "p")
    assert history["train/loss"] == ["2.5", "1.25", "0.8333333333333334"]
    assert [float(value) for value in history["base/loss"] + history["eval/loss"]] == [4.0, 3.0]
    assert history["eval/exact_match"] == ["0.5"]
    assert history["eval/content_perplexity"] == ["8.5"]
    assert "eval/bleu" not in history
    (table,) = (tmp_path / "wandb").rglob("*.table.json")
    assert json.loads(table.read_text())["data"] == [[3, "what is", None, "an answer"]]
    assert "tiny/gemma" in config["base_model_id"]
    written = b"".join(path.read_bytes() for path in (tmp_path / "wandb").rglob("*") if path.is_file())
    assert KEY.encode() not in written
    assert not list(tmp_path.rglob("*netrc"))


def test_offline_wandb_run_is_kept_in_the_model_store(tmp_path: Path) -> None:
    objects = tmp_path / "objects"
    spec, record = make_spec(objects, wandb_config={"mode": "offline", "project": "p"}), EventRecorder()
    context = make_context(spec, tmp_path / "work", record)
    run_with_trackers(context, {1: 2.5})
    shutil.rmtree(tmp_path / "work")
    folder = objects / "trackers" / spec.job_id / "wandb"
    assert record.warnings == {}
    assert [event.url for event in record.events if isinstance(event, TrackerStarted)] == [f"file://{folder}"]
    assert context.state.trackers == {"wandb": f"file://{folder}"}
    assert context.state.wandb_url is None  # no page of the run exists
    (path,) = folder.glob("attempt-1/offline-run-*/*.wandb")
    assert b"train/loss" in path.read_bytes()
    (table,) = path.parent.rglob("*.table.json")  # which `wandb sync` sends with the run
    assert json.loads(table.read_text())["data"] == [[3, "what is", None, "an answer"]]


def test_offline_wandb_run_is_stored_during_training(tmp_path: Path) -> None:
    now = 0.0
    context = make_context(make_spec(tmp_path / "objects", wandb_config={"mode": "offline", "project": "p"}), tmp_path / "work")
    tracker = WandbTracker(context, monotonic=lambda: now)
    tracker.start()
    folder = tmp_path / "objects" / "trackers" / context.spec.job_id
    tracker.log_metrics(MetricsLogged(step=1, values={"loss": 2.0}))
    assert not folder.exists()
    now = UPLOAD_INTERVAL_S
    tracker.log_metrics(MetricsLogged(step=2, values={"loss": 1.0}))
    assert list(folder.glob("wandb/attempt-1/offline-run-*/*.wandb"))
    tracker.finish(succeeded=False)


def run_with_trackers(context: JobContext, losses: dict[int, float], *, succeeded: bool = True) -> list[TrackerThread]:
    """Log what a training logs, from its first evaluation to its end."""
    threads = start_trackers(context)
    context.log_evaluation("before", 0, EvalMetrics(eval_loss=4.0, perplexity=54.6))
    for step, loss in losses.items():
        context.log_metrics(step, {"loss": loss, "gpu_power_w": None}, epoch=0.1)
    context.log_evaluation("after", max(losses), EvalMetrics(eval_loss=3.0, values={"exact_match": 0.5}))
    context.log_samples(SAMPLED)
    for thread in threads:
        thread.finish(succeeded=succeeded, timeout_s=30)
    return threads


# --- MLflow -----------------------------------------------------------------------------------------------------------


def make_mlflow_spec(objects: Path, server: FakeMlflow) -> Any:
    return make_spec(objects, mlflow_config={"tracking_uri": server.url + "/", "experiment_name": "tests"})


def test_mlflow_run_has_metrics_config_and_samples(tmp_path: Path) -> None:
    with FakeMlflow(token=KEY) as server:
        spec, record = make_mlflow_spec(tmp_path / "objects", server), EventRecorder()
        (thread,) = run_with_trackers(make_context(spec, tmp_path / "work", record, secrets={"mlflow_token": KEY}), {1: 2.5, 2: 2.0})
    run = server.runs["run1"]
    assert record.warnings == {}
    assert thread.run_id == "run1"
    assert [event.url for event in record.events if isinstance(event, TrackerStarted)] == [f"{server.url}/#/experiments/1/runs/run1"]
    assert (run["name"], run["status"], run["tags"]["tunesmith.job_id"]) == (spec.job_name, "FINISHED", spec.job_id)
    assert run["params"]["hyperparameters.lora_rank"] == "4"
    assert run["params"]["base_model_id"] == "tiny/gemma"
    assert server.history("run1", "train/loss") == [(1, 2.5), (2, 2.0)]
    assert server.history("run1", "base/loss") == [(0, 4.0)]
    assert server.history("run1", "eval/exact_match") == [(2, 0.5)]
    assert server.history("run1", "train/gpu_power_w") == []
    table = json.loads(server.artifacts["1/run1/artifacts/samples/after-3.json"])
    assert table == {"columns": ["step", "prompt", "reference", "answer"], "data": [[3, "what is", None, "an answer"]]}
    assert json.loads(run["tags"]["mlflow.loggedArtifacts"]) == [{"path": "samples/after-3.json", "type": "table"}]


def test_next_attempt_continues_mlflow_run_and_failure_is_shown(tmp_path: Path) -> None:
    with FakeMlflow() as server:
        spec = make_mlflow_spec(tmp_path / "objects", server)
        run_with_trackers(make_context(spec, tmp_path / "one"), {1: 2.5})
        run_with_trackers(make_context(spec, tmp_path / "two", attempt=2), {2: 2.0}, succeeded=False)
    assert list(server.runs) == ["run1"]
    assert server.history("run1", "train/loss") == [(1, 2.5), (2, 2.0)]
    assert server.runs["run1"]["status"] == "FAILED"


def test_mlflow_token_is_only_sent_in_requests(tmp_path: Path) -> None:
    with FakeMlflow(token=KEY) as server:
        record = EventRecorder()
        context = make_context(
            make_mlflow_spec(tmp_path / "objects", server), tmp_path / "work", record, secrets={"mlflow_token": "x" + KEY}
        )
        run_with_trackers(context, {1: 2.5})
    assert list(record.warnings) == ["tracker_failed"]  # a wrong token is a warning
    assert "the token is not valid" in record.warnings["tracker_failed"]
    assert KEY not in str(dict(os.environ)) + context.spec.model_dump_json() + str(record.warnings)


def test_mlflow_errors_are_retried_and_outage_gives_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    with FakeMlflow() as server:
        server.failures_left, record = 2, EventRecorder()
        spec = make_mlflow_spec(tmp_path / "objects", server)
        run_with_trackers(make_context(spec, tmp_path / "one", record), {1: 2.5})
        assert record.warnings == {}
        context = make_context(spec, tmp_path / "two", record)
        threads = start_trackers(context)
        context.log_metrics(2, {"loss": 2.0})
        threads[0]._pool.submit(lambda: None).result(30)  # wait until the run has started
    context.log_metrics(3, {"loss": 1.0})
    threads[0].finish(succeeded=True, timeout_s=30)
    assert list(record.warnings) == ["tracker_failed"]
    assert server.history("run1", "train/loss") == [(1, 2.5), (2, 2.0)]


def test_samples_are_skipped_for_server_only_artifact_store(tmp_path: Path) -> None:
    with FakeMlflow(artifact_root="s3://bucket/1") as server:
        record = EventRecorder()
        run_with_trackers(make_context(make_mlflow_spec(tmp_path / "objects", server), tmp_path / "work", record), {1: 2.5})
    assert record.warnings == {}
    assert server.artifacts == {}
    assert "mlflow.loggedArtifacts" not in server.runs["run1"]["tags"]


def test_credentials_in_mlflow_uri_are_rejected() -> None:
    with pytest.raises(ValidationError):
        MlflowConfig.model_validate({"tracking_uri": "https://me:secret@mlflow.example.com"})
    assert MlflowConfig.model_validate({"tracking_uri": "https://mlflow.example.com:8443/team@home"})


# --- TensorBoard --------------------------------------------------------------------------------------------------------


def read_event_files(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """Every value in the event files of a folder, by tag: TFRecords, each a length, its checksum, an Event, and its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    values_by_tag: dict[str, list[tuple[int, Any]]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content, offset = path.read_bytes(), 0
        while offset < len(content):
            (length,) = struct.unpack("<Q", content[offset : offset + 8])
            event = Event.FromString(content[offset + 12 : offset + 12 + length])
            offset += 16 + length
            for value in event.summary.value:
                text = b"".join(value.tensor.string_val).decode()
                values_by_tag.setdefault(value.tag, []).append((event.step, text or round(value.simple_value, 6)))
    return values_by_tag


def test_tensorboard_files_are_stored_per_attempt(tmp_path: Path) -> None:
    objects = tmp_path / "objects"
    spec, record = make_spec(objects, tensorboard_config={}), EventRecorder()
    for attempt in (1, 2):
        run_with_trackers(make_context(spec, tmp_path / str(attempt), record, attempt=attempt), {attempt: 2.5 / attempt})
    folder = objects / "trackers" / spec.job_id / "tensorboard"
    first, second = read_event_files(folder / "attempt-1"), read_event_files(folder / "attempt-2")
    assert record.warnings == {}
    assert [event.url for event in record.events if isinstance(event, TrackerStarted)] == [f"file://{folder}"] * 2
    assert (first["train/loss"], second["train/loss"]) == ([(1, 2.5)], [(2, 1.25)])
    assert first["base/loss"] == [(0, 4.0)]
    assert first["eval/exact_match"] == [(1, 0.5)]
    assert "train/gpu_power_w" not in first
    assert "an answer" in first["samples-after/0/text_summary"][0][1]
    assert '"lora_rank": 4' in first["training_config/text_summary"][0][1]


def test_tensorboard_files_are_uploaded_during_training(tmp_path: Path) -> None:
    now = 0.0
    context = make_context(make_spec(tmp_path / "objects", tensorboard_config={}), tmp_path / "work")
    tracker = TensorboardTracker(context, monotonic=lambda: now)
    tracker.start()
    folder = tmp_path / "objects" / "trackers" / context.spec.job_id / "tensorboard/attempt-1"
    assert "train/loss" not in read_event_files(folder)
    tracker.log_metrics(MetricsLogged(step=1, values={"loss": 2.0}))
    assert "train/loss" not in read_event_files(folder)
    now = UPLOAD_INTERVAL_S
    tracker.log_metrics(MetricsLogged(step=2, values={"loss": 1.0}))
    assert read_event_files(folder)["train/loss"] == [(1, 2.0), (2, 1.0)]
    tracker.finish(succeeded=False)


def test_failed_tensorboard_upload_gives_warning(tmp_path: Path) -> None:
    record = EventRecorder()
    context = make_context(make_spec(tmp_path / "objects", tensorboard_config={}), tmp_path / "work", record)
    (tmp_path / "objects" / "trackers").write_text("not a folder")
    run_with_trackers(context, {1: 2.5})
    assert list(record.warnings) == ["tracker_failed"]
    assert "files of tensorboard could not be stored" in record.warnings["tracker_failed"]


# --- Trackio ------------------------------------------------------------------------------------------------------------

# Replaces the library: records its calls in calls.jsonl, and fails for a loss of 666.
FAKE_TRACKIO = """
import json, os, pathlib
calls = pathlib.Path(os.environ["TRACKIO_DIR"], "calls.jsonl")
def record(**call):
    calls.with_suffix(".db").write_text("curves")
    calls.open("a").write(json.dumps(call, default=str) + "\\n")
def init(**arguments):
    print("noise on stdout")
    record(init=arguments, token=os.environ.get("HF_TOKEN"), service_token=os.environ.get("JOB_TOKEN"))
def log(values, step):
    if values.get("train/loss") == 666:
        raise ConnectionError("the Space is gone")
    record(log=values, step=step)
def finish():
    record(finish=True)
class Table:
    def __init__(self, dataframe):
        self.rows = dataframe.values.tolist()
    def __str__(self):
        return str(self.rows)
"""


@pytest.fixture
def fake_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts a fake module trackio first on the path. The value is the file in which it records its calls."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "trackio.py").write_text(FAKE_TRACKIO)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    return tmp_path / "work" / "trackio" / "calls.jsonl"


def test_trackio_process_gets_all_events_and_own_environment(fake_trackio: Path, tmp_path: Path) -> None:
    record = EventRecorder()
    spec = make_spec(tmp_path / "objects", trackio_config={"space_id": "ada/curves", "project": "p"})
    (thread,) = run_with_trackers(make_context(spec, tmp_path / "work", record, secrets={"hf_token": KEY}), {1: 2.5})
    begin, *calls = [json.loads(line) for line in fake_trackio.read_text().splitlines()]
    assert record.warnings == {}
    assert thread.run_id == spec.job_id
    assert (begin["init"]["project"], begin["init"]["name"], begin["init"]["resume"]) == ("p", spec.job_id, "allow")
    assert begin["init"]["private"] is True
    assert (begin["token"], begin["service_token"]) == (KEY, None)
    assert KEY not in str(dict(os.environ))
    assert {"log": {"train/loss": 2.5, "train/epoch": 0.1}, "step": 1} in calls
    assert {"log": {"samples/after": "[['what is', None, 'an answer']]"}, "step": 3} in calls
    assert calls[-1] == {"finish": True}
    assert [event.url for event in record.events if isinstance(event, TrackerStarted)] == ["https://huggingface.co/spaces/ada/curves"]


def test_trackio_failure_stops_tracker_with_its_message(fake_trackio: Path, tmp_path: Path) -> None:
    record = EventRecorder()
    spec = make_spec(tmp_path / "objects", trackio_config={})
    run_with_trackers(make_context(spec, tmp_path / "work", record, secrets={"hf_token": KEY}), {1: 2.5, 2: 666, 3: 2.0})
    begin, *calls = [json.loads(line) for line in fake_trackio.read_text().splitlines()]
    assert list(record.warnings) == ["tracker_failed"]
    assert "the Space is gone" in record.warnings["tracker_failed"]
    assert not (tmp_path / "objects" / "trackers").exists()
    assert begin["token"] is None  # the run stays on this machine, so no token is needed
    assert [call["step"] for call in calls] == [0, 1]


@pytest.mark.skipif(find_spec("trackio") is not None, reason="trackio is installed")
def test_missing_trackio_gives_install_hint(tmp_path: Path) -> None:
    record = EventRecorder()
    run_with_trackers(make_context(make_spec(tmp_path / "objects", trackio_config={}), tmp_path / "work", record), {1: 2.5})
    assert "pip install trackio==" in record.warnings["tracker_failed"]


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is an extra; pip install trackio==0.43.0")
def test_real_trackio_stores_run_in_job_folder(tmp_path: Path) -> None:
    spec = make_spec(tmp_path / "objects", trackio_config={"project": "p"})
    for attempt in (1, 2):
        record = EventRecorder()
        run_with_trackers(make_context(spec, tmp_path / "work", record, attempt=attempt), {attempt: 2.5 / attempt})
        assert record.warnings == {}
    read = f"import json; from trackio.sqlite_storage import SQLiteStorage as S; print(json.dumps(S.get_logs('p', '{spec.job_id}')))"
    folder = tmp_path / "objects/trackers" / spec.job_id / "trackio/attempt-2"
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "TRACKIO_DIR": str(folder), "HOME": str(tmp_path)}
    rows = json.loads(subprocess.check_output([sys.executable, "-c", read], env=environment, text=True))
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == [(1, 2.5), (2, 1.25)]
    assert [row["samples/after"]["_value"][0]["answer"] for row in rows if "samples/after" in row] == ["an answer"] * 2


# --- together ---------------------------------------------------------------------------------------------------------


def test_failing_tracker_does_not_affect_others(tmp_path: Path) -> None:
    with FakeMlflow(token=KEY) as server:
        record, objects = EventRecorder(), tmp_path / "objects"
        spec = make_spec(objects, mlflow_config={"tracking_uri": server.url}, tensorboard_config={}, wandb_config={"mode": "offline"})
        context = make_context(spec, tmp_path / "work", record)
        threads = run_with_trackers(context, {1: 2.5})
    assert [thread.name for thread in threads] == ["wandb", "mlflow", "tensorboard"]
    assert list(record.warnings) == ["tracker_failed"]
    assert record.warnings["tracker_failed"].startswith("mlflow stopped")
    assert read_event_files(objects / "trackers" / spec.job_id / "tensorboard/attempt-1")["train/loss"] == [(1, 2.5)]
    assert len(read_wandb_run(tmp_path / "work")) > 3


def test_tracker_libraries_are_imported_lazily() -> None:
    modules = ", ".join(target.partition(":")[0] for target in TRACKERS.values())
    code = f"import sys, {modules}; print([name for name in ('wandb', 'mlflow', 'tensorboardX', 'trackio') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], env={"PYTHONPATH": "."}, text=True).strip() == "[]"


def test_mlflow_skips_missing_evaluation_values(tmp_path: Path) -> None:
    with FakeMlflow() as server:
        tracker = MlflowTracker(make_context(make_mlflow_spec(tmp_path / "objects", server), tmp_path / "work"))
        tracker.start()
        tracker.log_evaluation(
            EvaluationCompleted(when="during", step=5, metrics=EvalMetrics(eval_loss=None, accuracy=0.4, notes={"eval_loss": "NaN"}))
        )
    assert [point["key"] for point in server.runs["run1"]["metrics"]] == ["eval/accuracy"]
