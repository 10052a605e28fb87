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


def make_detected_json(**changes: Any) -> Json:
    nothing = ("container", "encoding", "delimiter", "sheet")
    fields: Json = {"format": "csv", "parts": 1, "shape": "question_answer", "dataset_type": "prompt_completion", "reason": ""}
    fields |= {"mapping": {"prompt": "question", "completion": "answer", "roles": {}, "keep": []}, "columns": [], "unused_columns": []}
    return dict.fromkeys(nothing) | fields | changes


def make_dataset_json(**changes: Any) -> Json:
    fields: Json = {"processed_dataset_id": "dataset_1", "name": "faq.csv", "status": "ready", "dataset_type": "prompt_completion"}
    fields |= {"source": "faq.csv", "rows": 30, "rows_uploaded": 30, "duplicates_dropped": 0, "dropped": {}, "size_bytes": 2400}
    fields |= {"splits": {"train": 27, "eval": 3}, "images": 0, "has_tools": False, "has_weights": False, "warnings": []}
    fields |= {"detected": make_detected_json(), "report": None, "phase": None, "progress": None, "failure": None, "problems": []}
    return fields | {"preview": {}, "created_at": START.isoformat(), "job_id": None} | changes


def make_problem_json(line: int, **changes: Any) -> Json:
    return {"part": "", "line": line, "unit": "row", "field": "answer", "reason": "is empty", "code": "empty"} | changes


def make_check_json(**changes: Any) -> Json:
    fields: Json = {
        "refused": None,
        "detected": make_detected_json(),
        "rows_read": 30,
        "valid_rows": 30,
        "problem_count": 0,
        "report": None,
    }
    fields |= {"problem_counts": {}, "problems": [], "stopped_early": False, "splits": {"train": 27, "eval": 3}, "samples": []}
    return fields | changes


def make_report_json(**changes: Any) -> Json:
    fields: Json = {"rows_read": 30, "rows_kept": 30, "dropped": {}, "problems": [], "sampled_rows": 30, "near_duplicates": None}
    return fields | {"languages": {}, "personal_data": [], "secrets": [], "token_lengths": None, "warnings": []} | changes


def make_token_lengths_json(**changes: Any) -> Json:
    fields: Json = {"base_model_id": "google/gemma-3-270m", "exact": True, "note": "", "rows": 30, "total_tokens": 1234, "mean": 41.1}
    fields |= {"percentiles": {"50": 40, "100": 90}, "histogram": [[32, 10], [64, 20]]}
    return fields | {"max_seq_length": None, "truncated_rows": None} | changes


def make_hardware_json(hardware: str = "local/cpu", **changes: Any) -> Json:
    memory = {"peak_bytes": 2_000_000_000, "evaluation_bytes": 1_000_000_000, "export_bytes": 3_000_000_000, "available_bytes": None}
    fields: Json = {
        "hardware": hardware,
        "fit": "fits",
        "supported": True,
        "reason": "",
        "memory": memory,
        "time_slices": None,
        "usd": None,
    }
    return fields | {"seconds": {"low": 60.0, "high": 200.0}} | changes


def make_plan_json(**changes: Any) -> Json:
    fields: Json = {"training_config": {"trainer_type": "sft", "method": "LoRA"}, "resolved": [], "placements": ["local/cpu"]}
    fields |= {"base": {"base_model_id": "google/gemma-3-270m", "parameters": 268_000_000, "stored": True}}
    fields |= {"steps": {"rows": 27, "examples": 27, "examples_per_step": 8, "total_steps": 12, "epochs": 3.0, "exact": True}}
    fields |= {"tokens": {"total": 3000, "longest": None, "truncated_rows": None, "exact": False, "note": "estimated"}}
    fields |= {"profiles": [make_hardware_json()], "accelerators": [], "cheapest": "local/cpu", "artifacts": [], "disk": None}
    budget = dict.fromkeys(("max_cost_usd", "cost_share", "max_gpu_seconds", "gpu_seconds_share"))
    return fields | {"budget": budget, "warnings": []} | changes
