"""The pipeline as a whole: every problem is found, what is dropped is counted, a check leaves nothing, hostile files end with a message."""

import json
import os
import re
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, get_args

import pytest

from jobs.ingest.pipeline import MIN_WORKER_BYTES, ingest
from jobs.ingest.rows import values
from schema.ingestion import (
    INDEX_INTERVAL_ROWS,
    MAX_FOUND_PROBLEMS,
    MAX_REPORTED_PROBLEMS,
    IngestLimits,
    IngestOptions,
    IngestOutcome,
    IngestProgress,
    IngestTask,
    InputFile,
)
from tests.ingest.dataset_harness import CHOSEN_ANSWER, LABELED_ROWS, QUESTION, make_image_part, make_vision_row, to_jsonl

SOURCE = Path(__file__).parents[2]
TOOL_ROW = {"messages": [QUESTION, CHOSEN_ANSWER], "tools": [{"type": "function", "function": {"name": "look_up"}}]}
PLAIN_ROW = {"messages": [QUESTION, CHOSEN_ANSWER]}


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Ingests content in this process."""

    def run_ingestion(content: bytes, *, check_only: bool = False, limits: IngestLimits | None = None, **options: Any) -> IngestOutcome:
        return ingest(make_task(tmp_path, content, check_only=check_only, limits=limits, **options))

    return run_ingestion


def make_task(folder: Path, content: bytes, *, check_only: bool = False, limits: IngestLimits | None = None, **options: Any) -> IngestTask:
    (folder / "output").mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_bytes(content)
    return IngestTask(
        files=(InputFile(path=str(folder / "rows.jsonl"), name="rows.jsonl"),),
        options=IngestOptions(**options),
        limits=limits or IngestLimits(),
        check_only=check_only,
        output=str(folder / "output"),
    )


def run_child(task: IngestTask) -> IngestOutcome:
    """Ingests in a process of its own, as the service does."""
    task_file = Path(task.output, "task.json")
    task_file.write_text(task.model_dump_json())
    environment = {"PYTHONPATH": str(SOURCE), "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-m", "jobs.ingest", task_file], cwd=SOURCE, env=environment, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr.decode()
    return IngestOutcome.load(Path(task.output, "outcome.json").read_bytes())


def make_text_rows(count: int, text: str = "row") -> list[object]:
    return [{"text": f"{text} {number}"} for number in range(count)]


# --- problems --------------------------------------------------------------------------------------------------------


def test_every_code_is_documented() -> None:
    for code in get_args(values.ProblemCode):
        assert re.search(rf"^    (\w+, )?{code}\b", str(values.__doc__), re.MULTILINE), code


@pytest.mark.parametrize(
    ("line", "code", "reason"),
    [
        (b'[{"text": "a"}]', "not_object", "write each row on a line of its own, without the list"),
        (b'{"text": "a"}{"text": "b"}', "not_json", "another value begins in the same line; write each row on a line of its own"),
        (b'{"text": "a"},', "not_json", "a comma follows the object"),
        (b'{"text": "a",}', "not_json", "there is nothing between ',' and '}'; remove the comma"),
        (b'{"messages": [1,]}', "not_json", "there is nothing between ',' and ']'; remove the comma"),
        (b'{"text": "a"}}', "not_json", "there is a '}' too many; remove it"),
        (b"{'text': 'a'}", "not_json", 'double quotes, not in "\'"; in Python, json.dumps(row) writes them so'),
        ("{“text”: “a”}".encode(), "not_json", "double quotes, not in '\\u201c'"),
        (b'{"text": None}', "not_json", "None is not JSON; write true, false or null"),
        (b'{"text": NaN}', "not_json", "NaN is not JSON; write a number, or drop the row"),
        (b'{text: "a"}', "not_json", "a name in double quotes must come here, not 'text: \"a\"}'"),
        (b'{"text" "a"}', "not_json", "Expecting ':' delimiter"),
        (b'{"text": "C:\\dir"}', "not_json", "write a backslash itself as \\\\"),
        (b'{"text": "a', "not_json", "a string begins here that does not end in this line"),
        (b'{"text": "a\tb"}', "not_json", "write a line break as \\n, a tab as \\t"),
        (b"{", "not_json", "the line ends before its object does"),
        (b"// rows", "not_json", "JSON has no comments"),
        (b"id,text", "not_json", "the line begins 'id,text'; each line is one JSON object, {...}; a table is sent with format=csv"),
        (b'{"text": "caf\xe9"}', "not_utf8", "not UTF-8 at byte 14, which is 0xE9; save the file as UTF-8"),
        (b'{"text": "a", "text": "b"}', "repeated_name", "appears twice"),
        (b'{"text": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "nested_too_deeply", "nested too deeply"),
        (b'{"message": []}', "unknown_form", "has the columns 'message'; did you mean 'messages'?"),
        (b'{"Prompt": "a", "completion": "b"}', "missing_field", "did you mean 'Prompt'?"),
        (b'{"promt": "a", "completion": "b"}', "missing_field", "did you mean 'promt'?"),
        (b'{"text": ""}', "empty", "is empty"),
        (b'{"text": 4}', "wrong_type", "is a number"),
        (b'{"messages": [{"role": "User", "content": "a"}]}', "unknown_role", "did you mean 'user'?"),
        (b'{"messages": [{"role": "user", "contents": "a"}]}', "unused_field", "did you mean 'content'?"),
        (b'{"messages": [{"Role": "user", "content": "a"}]}', "missing_field", "did you mean 'Role'?"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "role_order", "it must be 'user'"),
    ],
)
def test_problem_says_what_would_work(run: Any, line: bytes, code: str, reason: str) -> None:
    outcome = run(to_jsonl([PLAIN_ROW]) + line + b"\n")
    assert [(problem.line, problem.code) for problem in outcome.problems] == [(2, code)]
    assert reason in outcome.problems[0].reason
    assert outcome.problems[0].reason.isprintable()


@pytest.mark.parametrize(("text", "code"), [("é", "not_utf8"), ("a", "not_json")])
def test_line_of_utf_16_is_recognized(text: str, code: str) -> None:  # a whole file is refused before it is read
    with pytest.raises(values.InvalidValue, match="looks like UTF-16; save") as excinfo:
        values.parse(f'{{"text": "{text}"}}'.encode("utf-16-le"), "a row")
    assert excinfo.value.code == code


def test_all_problems_are_found_and_the_first_are_told(run: Any) -> None:
    count = MAX_REPORTED_PROBLEMS + 500
    outcome = run(b'{"text": ""}\n' * count + b"{\n" + to_jsonl(make_text_rows(3)))
    assert (outcome.rows, outcome.rows_read, outcome.problem_count) == (None, count + 4, count + 1)
    assert outcome.problem_counts == {"empty": count, "not_json": 1}
    assert len(outcome.problems) == MAX_REPORTED_PROBLEMS
    assert not outcome.stopped_early


def test_reading_stops_after_very_many_problems(run: Any) -> None:
    content = b"{}\n" * (MAX_FOUND_PROBLEMS + 100)
    outcome = run(content)
    assert (outcome.stopped_early, outcome.rows_read, outcome.problem_count) == (True, MAX_FOUND_PROBLEMS, MAX_FOUND_PROBLEMS)


def test_invalid_rows_are_dropped_and_counted(run: Any, tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": ""}, {"prompt": "a", "completion": "b"}, {"text": "a"}, {"text": "b"}]
    outcome = run(to_jsonl(rows) + b"{", on_invalid="drop", eval_fraction=0)
    assert (tmp_path / "output/train.jsonl").read_bytes() == b'{"text":"a"}\n{"text":"b"}\n'
    assert (outcome.report.rows_read, outcome.report.rows_kept) == (6, 2)
    assert outcome.report.dropped == {"empty": 1, "mixed_forms": 1, "not_json": 1, "duplicate": 1}
    assert [problem.line for problem in outcome.report.problems] == [2, 3, 6]


def test_nothing_is_kept_when_every_row_is_dropped(run: Any, tmp_path: Path) -> None:
    outcome = run(b'{"text": ""}\n', on_invalid="drop")
    assert (outcome.rows, outcome.refused, outcome.problem_count) == (None, None, 1)
    assert not list((tmp_path / "output").iterdir())


def test_rows_after_a_dropped_one_with_tools_are_kept(run: Any) -> None:
    outcome = run(to_jsonl([make_vision_row(make_image_part()), TOOL_ROW, PLAIN_ROW]), on_invalid="drop", eval_fraction=0)
    assert outcome.problem_counts == {"images_and_tools": 1}
    assert "line 1 has images and line 2 has tools" in outcome.problems[0].reason
    assert (outcome.rows.splits["train"].rows, outcome.rows.has_tools, outcome.rows.images) == (2, False, 1)


def test_rows_within_the_pixel_limit_are_kept(run: Any) -> None:
    rows = [make_vision_row(make_image_part(), {"type": "text", "text": f"{number}"}) for number in range(3)]
    outcome = run(to_jsonl([*rows, PLAIN_ROW]), limits=IngestLimits(max_pixels=100), on_invalid="drop", eval_fraction=0)  # 48 each
    assert [(problem.line, problem.code) for problem in outcome.problems] == [(3, "too_many")]
    assert outcome.rows.splits["train"].rows == 3


def test_equal_labels_of_the_rows_that_remain_are_refused(run: Any, tmp_path: Path) -> None:
    outcome = run(to_jsonl([LABELED_ROWS[0], {**LABELED_ROWS[1], "label": "no"}]), on_invalid="drop")
    assert "label is the same in all rows: 1 rows are true and 0 are false" in outcome.refused.message
    assert (outcome.rows, outcome.problem_counts) == (None, {"wrong_type": 1})
    assert not list((tmp_path / "output").iterdir())


# --- a check ---------------------------------------------------------------------------------------------------------


def test_check_tells_what_an_ingestion_would_and_leaves_nothing(run: Any, tmp_path: Path) -> None:
    content = to_jsonl([*make_text_rows(40), {"text": "row 0"}])
    checked = run(content, check_only=True)
    assert not list((tmp_path / "output").iterdir())
    kept = run(content)
    assert checked == kept
    assert kept.rows.splits["eval"].rows == 4
    assert kept.report.dropped == {"duplicate": 1}


def test_check_tells_problems_and_what_the_valid_rows_would_become(run: Any, tmp_path: Path) -> None:
    outcome = run(to_jsonl(make_text_rows(20)) + b"{", check_only=True)
    assert (outcome.problem_count, outcome.report.rows_kept) == (1, 20)
    assert not list((tmp_path / "output").iterdir())


@pytest.mark.parametrize(("rows", "message"), [([], "there are no rows"), ([LABELED_ROWS[0]] * 2, "label is the same")])
def test_check_tells_what_is_wrong_with_all_rows_together(run: Any, rows: list[object], message: str) -> None:
    assert message in run(to_jsonl(rows), check_only=True).refused.message


# --- what is written -------------------------------------------------------------------------------------------------


def test_index_has_the_position_of_every_256th_row(run: Any, tmp_path: Path) -> None:
    outcome = run(to_jsonl(make_text_rows(1100)), eval_fraction=0.25)
    for name, split in outcome.rows.splits.items():
        content = (tmp_path / "output" / split.file).read_bytes()
        index = (tmp_path / "output" / split.index_file).read_bytes()
        positions = struct.unpack(f"<{len(index) // 8}Q", index)
        lines = content.splitlines(keepends=True)
        expected = [len(b"".join(lines[:row])) for row in range(0, len(lines), INDEX_INTERVAL_ROWS)]
        assert (name, list(positions)) == (name, expected)


def test_samples_are_the_first_rows_as_stored_without_the_bytes_of_images(run: Any) -> None:
    rows = [make_vision_row(make_image_part(), {"type": "text", "text": f" {number}\n"}) for number in range(4)]
    samples = run(to_jsonl(rows)).samples
    assert [sample["messages"][0]["content"][1]["text"] for sample in samples] == [" 0\n", " 1\n", " 2\n"]
    image = samples[0]["messages"][0]["content"][0]["image"]
    assert re.fullmatch(r"data:image/png;base64,… \(\d+ bytes\)", image)


def test_progress_names_phases_and_bytes(tmp_path: Path) -> None:
    reports: list[IngestProgress] = []
    content = to_jsonl(make_text_rows(20_000))
    ingest(make_task(tmp_path, content), reports.append)
    assert [(report.phase, report.rows) for report in reports[:3]] == [("reading", 20_000), ("splitting", 20_000), ("reporting", 20_000)]
    assert {report.total_bytes for report in reports[:3]} == {len(content)}
    assert 0 < reports[0].bytes_read <= reports[1].bytes_read == len(content)


# --- large and hostile files -----------------------------------------------------------------------------------------


def test_workers_find_the_same_as_one_process(tmp_path: Path) -> None:
    rows = [{"text": f"row {number % 3000} " + "x" * 10_000} for number in range(3500)]
    lines = to_jsonl(rows).splitlines(keepends=True)
    lines[100], lines[2000], lines[3499] = b"{\n", b"\n", b'{"prompt": "a", "completion": "b"}\n'
    task = make_task(tmp_path, b"".join(lines), on_invalid="drop")
    assert Path(task.files[0].path).stat().st_size >= MIN_WORKER_BYTES
    concurrent = run_child(task)
    assert concurrent == ingest_beside_a_thread(task)
    assert concurrent.problem_counts == {"not_json": 1, "mixed_forms": 1}
    assert concurrent.rows.duplicates_dropped == 498  # of row 100, which is not valid, there is one


def ingest_beside_a_thread(task: IngestTask) -> IngestOutcome:
    """Ingests in this process, which then has too many threads to start workers."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        return ingest(task)
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("rows_before", [0, 300], ids=["in the sample", "in a worker"])
def test_file_that_takes_too_much_memory_is_refused(tmp_path: Path, rows_before: int) -> None:
    content = to_jsonl(make_text_rows(rows_before)) + b'{"text": [' + b"0," * (16 << 20) + b"0]}\n"
    limits = IngestLimits(max_memory_bytes=300 << 20, max_row_bytes=100 << 20)
    outcome = run_child(make_task(tmp_path, content, limits=limits))
    assert outcome.refused is not None
    assert outcome.refused.message == "reading it takes more than the 300 MiB of memory that one file may use"


def test_endless_line_is_a_problem_of_its_row(tmp_path: Path) -> None:
    content = to_jsonl(make_text_rows(1, "x" * (1 << 19)))  # beyond what is looked at to recognize the format
    task = make_task(tmp_path, content, limits=IngestLimits(max_memory_bytes=500 << 20), on_invalid="drop", eval_fraction=0)
    with Path(task.files[0].path).open("ab") as file:
        file.truncate(600 << 20)  # NUL characters, of which the disk holds none
        file.write(b'\n{"text": "a"}\n')
    outcome = run_child(task)
    assert outcome.problem_counts == {"too_long": 1}
    assert outcome.rows is not None
    assert outcome.rows.splits["train"].rows == 2


def test_row_of_very_many_columns_is_described_shortly(run: Any) -> None:
    row = {f"column {number} {'x' * 50}": "a" for number in range(10_000)}
    outcome = run(to_jsonl([{"text": "a"}, row, {"\ud800" + "y" * 900: "b"}]))
    assert [problem.code for problem in outcome.problems] == ["missing_field", "missing_field"]
    assert all(len(problem.reason) < 2000 for problem in outcome.problems)
    assert len(outcome.model_dump_json()) < 200_000
    assert json.loads(outcome.model_dump_json())["detected"]["columns"][0] == "text"
