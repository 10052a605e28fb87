"""What is printed about datasets and dry runs."""

from typing import Any

import pytest

from cli.http_client import Json
from cli.render.dataset import dataset_lines, describe_detected, describe_phase, describe_rows, problem_table, report_lines, token_lines
from cli.render.plan import describe_estimate, render_plan
from cli.render.tables import dataset_table
from tests.unit.cli.api_json import (
    make_dataset_json,
    make_detected_json,
    make_hardware_json,
    make_plan_json,
    make_problem_json,
    make_report_json,
    make_token_lengths_json,
    render_text,
)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "CSV, question -> prompt, answer -> completion"),
        ({"mapping": None, "format": "jsonl", "container": "zstd"}, "JSON Lines, Zstandard"),
        ({"delimiter": "\t", "mapping": None, "encoding": "utf-16"}, "TSV in utf-16"),
        ({"delimiter": ";", "mapping": None, "encoding": "UTF-8"}, "CSV with ';'"),
        (
            {"format": "xlsx", "sheet": "Q", "mapping": {"prompt": "{a}\n{b}", "completion": "c"}},
            'Excel, sheet Q, "{a}\\n{b}" -> prompt, c -> completion',
        ),
        (
            {"format": "arrow", "container": "zip", "mapping": {"messages": "turns", "role_key": "by"}},
            "Arrow in a zip archive, turns -> messages",
        ),
    ],
)
def test_recognized_file_is_one_line(changes: Json, text: str) -> None:
    assert describe_detected(make_detected_json(**changes)) == text


def test_dropped_rows_are_told_by_reason() -> None:
    dataset = make_dataset_json(dropped={"duplicate": 1, "empty": 1200}, splits={"train": 27})
    assert describe_rows(dataset) == (
        "30 rows of prompt completion: 27 to train on, none held out; 1 duplicate dropped; 1,200 rows not valid (empty) dropped"
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "waiting for the job"),
        ({"phase": "ingesting", "progress": {"step": 1000, "total_steps": 2000}}, "ingesting, 1,000 of about 2,000 rows"),
    ],
)
def test_phase_of_a_dataset_in_work(changes: Json, text: str) -> None:
    assert describe_phase(make_dataset_json(status="processing", **changes)) == text


def test_failed_dataset_says_why() -> None:
    text = "\n".join(dataset_lines(make_dataset_json(status="failed", failure={"message": "it ended", "hint": "send it again"})))
    assert "it ended" in text
    assert "send it again" in text


def test_problems_of_whole_rows_have_no_column_for_fields() -> None:
    assert "field" not in render_text(problem_table([make_problem_json(1, field="", part="a.csv")]))
    assert "a.csv row 1" in render_text(problem_table([make_problem_json(1, field="", part="a.csv")]))
    assert "answer" in render_text(problem_table([make_problem_json(1)]))


def test_report_in_words() -> None:
    finding = {"kind": "aws_access_key", "rows": 1, "first_rows": [3], "first_held_out_rows": []}
    near = {"compared_rows": 3, "held_out_rows_with_a_near_duplicate": 1, "examples": [[0, 7]]}
    report = make_report_json(sampled_rows=20, languages={"en": 0.75, "und": 0.25}, secrets=[finding], near_duplicates=near)
    assert list(report_lines(report)) == [
        "languages   en 75%, unknown 25% (of 20 rows that were looked at)",
        "leaks       1 of 3 held-out rows nearly repeat a training row: held-out row and training row 0 and 7",
        "secrets     aws access key in 1 row; training rows 3 (of 20 rows that were looked at)",
    ]


def test_token_lengths_have_a_bar_for_each_bucket() -> None:
    lines = list(token_lines(make_token_lengths_json(histogram=[[32, 1], [64, 1000], [96, 0]], exact=False, note="no template")))
    assert lines[0] == "tokens      1,234 by the tokenizer of google/gemma-3-270m, estimated: no template"
    assert [line.count("█") for line in lines[-3:]] == [1, 32, 0]


def render_changed(**changes: Any) -> str:
    return render_text(*render_plan(make_plan_json(**changes)))


def test_plan_tells_steps_memory_time_and_price() -> None:
    priced = make_hardware_json("cloud-run/l4", usd={"low": 0.004, "high": 0.5}, time_slices={"low": 1.0, "high": 2.0})
    text = render_changed(profiles=[priced, make_hardware_json()], placements=["cloud-run/l4"], cheapest="cloud-run/l4")
    assert "steps     12: 3 epochs of 27 rows, 8 a step" in text
    assert "tokens    about 3,000" in text
    [line] = [line for line in text.splitlines() if line.startswith("cloud-run/l4")]
    for part in ("(chosen, cheapest)", "yes", "2.0 GB", "1.0 GB", "3.0 GB", "–", "1 min 0 s to 3 min 20 s", "$0.0040 to $0.50", "1 to 2"):
        assert part in line


def test_plan_without_prices_has_no_column_for_them() -> None:
    text = render_changed()
    assert "price" not in text
    assert "(chosen)" in text


def test_plan_tells_why_a_job_does_not_fit() -> None:
    text = render_changed(profiles=[make_hardware_json(fit="does_not_fit", reason="it needs 40 GB", memory=None, seconds=None)])
    assert "local/cpu: it needs 40 GB" in text


def test_plan_tells_choices_results_and_warnings() -> None:
    resolved = [{"field": "training_config.hyperparameters.batch_size", "value": 4, "reason": "as many as fit"}]
    resolved += [{"field": "hardware", "value": ["a", "b"], "reason": "cheapest first"}]
    budget = {"max_cost_usd": 2.0, "cost_share": 0.25, "max_gpu_seconds": 100.0, "gpu_seconds_share": 0.5}
    text = render_changed(
        resolved=resolved,
        artifacts=[{"name": "adapter", "kind": "adapter", "size_bytes": 49_300_000}],
        disk={"attempt_bytes": 2_000_000_000, "checkpoints": 3, "checkpoint_bytes": 45_600_000},
        budget=budget,
        warnings=[{"param": "training_config.hyperparameters.learning_rate", "message": "is high", "hint": "try 2e-4"}],
        accelerators=[make_hardware_json("NVIDIA L4, 24 GB")],
    )
    for line in (
        "auto      batch size 4: as many as fit",
        "auto      hardware a or b: cheapest first",
        "artifacts adapter 49.3 MB",
        "disk      2.0 GB while it runs, with 3 checkpoints of 45.6 MB",
        "budget    up to 25% of $2.00",
        "budget    up to 50% of 100 GPU seconds",
        "warning learning rate: is high",
        "  hint: try 2e-4",
    ):
        assert line in text.splitlines()
    assert "NVIDIA L4, 24 GB" in text


def test_estimate_is_one_line() -> None:
    assert describe_estimate(make_plan_json()) == "estimate  1 min 0 s to 3 min 20 s; about 3,000 tokens in 12 steps"
    assert describe_estimate(make_plan_json(placements=["elsewhere/l4"])) == ""


def test_list_tells_the_status_of_datasets_without_rows() -> None:
    text = render_text(dataset_table([make_dataset_json(), make_dataset_json(status="failed", dataset_type="unknown", splits={})]))
    assert ["prompt_completion" in line for line in text.splitlines()] == [False, True, False]
    assert ["failed" in line for line in text.splitlines()] == [False, False, True]
