"""Responses and events of the API, with a default for every field."""

import io
from datetime import UTC, datetime, timedelta
from typing import Any

from rich.console import Console, RenderableType

from cli.http_client import Json
from tests.unit.cli.fake_service import JOB_ID

WIDTH = 200
START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def make_attempt_json(number: int, **changes: Any) -> Json:
    fields: Json = {
        "number": number,
        "claimed_at": "x",
        "ended_at": None,
        "outcome": None,
        "resumed_step": None,
        "last_checkpoint_step": None,
        "pending_reason": None,
    }
    return fields | changes


def make_cost_json(**changes: Any) -> Json:
    fields: Json = dict.fromkeys(("usd", "usd_per_hour", "max_gpu_seconds", "max_cost_usd"))
    return {"gpu_seconds": 0.0, "source": "", "as_of": ""} | fields | changes


def make_job_json(**changes: Any) -> Json:
    nothing = ("failure", "progress", "checkpoint", "export_of", "cloned_from", "metrics", "base_metrics", "gate", "gate_passed")
    nothing += ("pending_reason", "pause_reason", "project_id", "phase", "started_at", "finished_at", "earlier_model", "created_by")
    fields: Json = {"job_id": JOB_ID, "status": "training", "job_name": "mine", "attempts": [], "artifacts": [], "tracker_urls": {}}
    fields |= {"base_model_id": "google/gemma-3-270m", "trainer_type": "sft", "method": "LoRA", "launcher": "local", "hardware": "cpu"}
    fields |= {"processed_dataset_id": "dataset_a", "created_at": START.isoformat(), "cost": make_cost_json(), "metadata": {}}
    return fields | dict.fromkeys(nothing) | changes


def make_job_row_json(number: int = 1, **changes: Any) -> Json:
    nothing = ("phase", "progress", "eval_loss", "base_eval_loss", "cost_usd", "project_id")
    fields: Json = {"job_id": f"training_a_{number:012x}", "job_name": f"job-{number}", "status": "queued"}
    fields |= {"base_model_id": "google/gemma-3-270m", "trainer_type": "sft", "created_at": START.isoformat()}
    return fields | dict.fromkeys(nothing) | changes


def make_progress_json(step: int = 1, **changes: Any) -> Json:
    fields: Json = {"step": step, "total_steps": 80, "epoch": step / 10, "total_epochs": 8.0, "eta_s": None}
    return fields | {"remaining_s": None, "loss": None} | changes


def make_metrics_json(**changes: Any) -> Json:
    return {"eval_loss": None, "perplexity": None, "accuracy": None, "values": {}} | changes


def make_artifact_json(name: str = "adapter", **changes: Any) -> Json:
    kind = name.partition("-")[0]
    return {"name": name, "kind": kind, "size_bytes": 12_000_000, "uri": f"file:///{name}", "fidelity": None, "hub": None} | changes


def make_event_json(second: int = 0, **body: Any) -> Json:
    """An event, some seconds after the start."""
    return {"id": second + 1, "at": (START + timedelta(seconds=second)).isoformat(), "event": body}


def make_console(width: int = WIDTH, *, is_terminal: bool = False, height: int = 40) -> Console:
    return Console(file=io.StringIO(), width=width, height=height, force_terminal=is_terminal, color_system=None, legacy_windows=False)


def read_console(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def render_text(*renderables: RenderableType, width: int = WIDTH, is_terminal: bool = False) -> str:
    console = make_console(width, is_terminal=is_terminal)
    for renderable in renderables:
        console.print(renderable)
    return read_console(console)
