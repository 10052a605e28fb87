"""A tracker shows the curves, and can be slow, or die, without the training noticing."""

import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.context import Secrets
from jobs.trackers import TrackerThread, start_trackers
from schema.events import Metrics, TrackerStarted
from schema.job import EvalMetrics
from tests.jobs.conftest import Record, a_context, a_spec

KEY = "k" * 40


class Moody:
    """A tracker that raises when it is told a number."""

    run_id = "run-1"

    def __init__(self) -> None:
        self.heard = 0

    def start(self) -> str | None:
        return "https://curves.example/1"

    def metrics(self, event: Metrics) -> None:
        self.heard += 1
        raise ConnectionError(f"no route with {KEY}\nmore")

    def evaluated(self, event: Any) -> None: ...

    def checkpoint(self, folder: Path, step: int) -> None: ...

    def model(self, folder: Path) -> None: ...

    def finish(self, *, succeeded: bool) -> None:
        self.succeeded = succeeded


def test_a_tracker_that_raises_is_left_out_with_one_warning_and_no_secret(store: Path, tmp_path: Path) -> None:
    record, tracker = Record(), Moody()
    context = a_context(a_spec(store), tmp_path, record, secrets={"wandb_api_key": KEY})
    thread = TrackerThread("moody", tracker, context)
    thread.start()
    for step in range(5):
        thread.metrics(Metrics(step=step, values={}))
    assert thread.run_id == "run-1"
    thread.finish(succeeded=True, patience_s=5)
    assert tracker.heard == 1
    assert list(record.warnings) == ["tracker_failed"]
    assert "goes on without it" in record.warnings["tracker_failed"]
    assert KEY not in record.warnings["tracker_failed"]
    assert [event.url for event in record.events if isinstance(event, TrackerStarted)] == ["https://curves.example/1"]


def test_a_tracker_that_hangs_is_waited_for_only_so_long(store: Path, tmp_path: Path) -> None:
    class Stuck(Moody):
        def metrics(self, event: Metrics) -> None:
            let_go.wait(20)

    let_go, record = threading.Event(), Record()
    thread = TrackerThread("stuck", Stuck(), a_context(a_spec(store), tmp_path, record))
    thread.metrics(Metrics(step=1, values={}))
    thread.finish(succeeded=True, patience_s=0.1)
    let_go.set()
    assert list(record.warnings) == ["tracker_unfinished"]


def test_secrets_are_not_shown_and_are_taken_out_of_texts() -> None:
    secrets = Secrets({"hf_token": "hf_secret", "empty": ""})
    assert "hf_secret" not in repr(secrets) + str(secrets)
    assert secrets.redact("with hf_secret inside") == "with ********** inside"


def test_without_a_tracker_in_the_config_none_is_started(store: Path, tmp_path: Path) -> None:
    assert start_trackers(a_context(a_spec(store), tmp_path)) == []


def records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: a header of seven bytes, then a LevelDB log in blocks of 32 KiB."""
    content, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (rest := 32768 - place % 32768) < 7:
            place += rest
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def told(workdir: Path) -> list[Any]:
    """What the only W&B run in a folder was told, record by record."""
    from wandb.proto import wandb_internal_pb2

    (path,) = workdir.glob("wandb/offline-run-*/*.wandb")
    return [wandb_internal_pb2.Record.FromString(content) for content in records(path)]


def test_every_attempt_goes_on_with_the_same_run_and_a_pause_is_no_failure_of_it(store: Path, tmp_path: Path) -> None:
    spec = a_spec(store, wandb_config={"mode": "offline", "project": "p"})
    runs, exits, points = [], [], []
    for attempt in (1, 2):
        workdir = tmp_path / str(attempt)
        context = a_context(spec, workdir, attempt=attempt)
        (thread,) = start_trackers(context)
        context.metrics(attempt, {"loss": float(attempt)})
        thread.finish(succeeded=True, patience_s=30)  # a pause, then the end
        runs.append(thread.run_id)
        for record in told(workdir):
            runs += [record.run.run_id] if record.HasField("run") else []
            exits += [record.exit.exit_code] if record.HasField("exit") else []
            points += [item.value_json for item in record.history.item if "train/loss" in (item.key, *item.nested_key)]
    assert set(runs) == {spec.job_id}
    assert exits == [0, 0]
    assert points == ["1", "2"]


def test_w_and_b_offline_holds_the_curves_the_evaluations_and_the_config_but_no_key(store: Path, tmp_path: Path) -> None:
    spec = a_spec(store, wandb_config={"mode": "offline", "project": "p", "log_model": "end"})
    record = Record()
    context = a_context(spec, tmp_path, record, secrets={"wandb_api_key": KEY})
    (thread,) = start_trackers(context)
    for step in range(1, 4):
        context.metrics(step, {"loss": 2.5 / step, "learning_rate": 1e-4}, epoch=0.1)
    context.evaluated("before", 0, EvalMetrics(eval_loss=4.0, perplexity=54.6))
    context.evaluated("after", 3, EvalMetrics(eval_loss=3.0, perplexity=20.1))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"w")
    context.model_saved(tmp_path / "model")
    thread.finish(succeeded=True, patience_s=30)
    assert record.warnings == {}

    history: dict[str, list[str]] = {}
    config: dict[str, str] = {}
    for content in told(tmp_path):
        for item in content.history.item:
            history.setdefault(".".join(item.nested_key) or item.key, []).append(item.value_json)
        for update in content.run.config.update:
            config[update.key] = update.value_json
        if content.HasField("run"):
            assert (content.run.display_name, content.run.project) == (spec.job_name, "p")
    assert history["train/loss"] == ["2.5", "1.25", "0.8333333333333334"]
    assert [float(value) for value in history["base/loss"] + history["eval/loss"]] == [4.0, 3.0]
    assert "tiny/gemma" in config["base_model_id"]
    everything = b"".join(found.read_bytes() for found in (tmp_path / "wandb").rglob("*") if found.is_file())
    assert KEY.encode() not in everything
    assert not list(tmp_path.rglob("*netrc"))
