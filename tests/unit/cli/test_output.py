"""Answers, errors and questions as the command line prints them."""

import json

import httpx2
import pytest
from rich.table import Table

from cli.errors import ApiError, CliError, Problem
from cli.output import confirm, print_answer, print_error
from tests.unit.cli.fake_service import FakeService

OPTIONS = frozenset({"--lr", "--base", "--json"})
ERROR = {
    "code": "malformed",
    "message": "training_config.hyperparameters.learning_rate: input should be less than 1",
    "hint": "",
    "param": "training_config.hyperparameters.learning_rate",
}
SECOND = {"message": "is not a field", "hint": "GET /docs lists the fields", "param": "training_config.hyperparameters.warmup"}


def make_error(**body: object) -> ApiError:
    """The error of a service that refuses a request with this body."""
    service = FakeService(httpx2.Response(422, json={"error": body}))
    with pytest.raises(ApiError) as excinfo:
        service.client.get("/jobs")
    excinfo.value.options = OPTIONS
    return excinfo.value


def test_every_problem_is_printed_with_its_field_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(make_error(**ERROR, errors=[{name: ERROR[name] for name in ("message", "hint", "param")}, SECOND]), as_json=False)
    assert capsys.readouterr().err.splitlines() == [
        "error learning_rate (--lr): input should be less than 1",
        "error warmup: is not a field",
        "  hint: docs/api.md lists the fields",
    ]


def test_error_of_a_service_without_a_list_is_one_problem(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(make_error(**ERROR), as_json=True)
    printed = capsys.readouterr()
    error = json.loads(printed.out)["error"]
    assert (error["code"], len(error["errors"]), printed.err) == ("malformed", 1, "")
    assert error["param"] == "training_config.hyperparameters.learning_rate"


def test_column_of_a_data_error_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(
        make_error(code="invalid_data", message="row 3 has a column that no row format has", hint="drop the column", param="notes"), False
    )
    assert capsys.readouterr().err.startswith("error notes: row 3 has a column")


def test_unknown_job_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(make_error(code="not_found", message="no job 'x'", hint="GET /jobs lists them", param="job_id"), False)
    assert capsys.readouterr().err == "error no job 'x'\n  hint: `tunesmith jobs` lists them\n"


def test_local_errors_can_have_several_problems(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(CliError.of([Problem("is empty", param="rows.jsonl"), Problem("[b]markup[/b]")]), False)
    assert capsys.readouterr().err == "error rows.jsonl: is empty\nerror [b]markup[/b]\n"


def test_nothing_wraps_or_is_colored_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("job", "name")
    table.add_row("[red]" + "a" * 300, "b" * 300)
    print_answer({}, False, table)
    assert f"{'a' * 300} │ {'b' * 300}" in capsys.readouterr().out


def test_json_answer_is_one_compact_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_answer({"a": [1, {"b": None}]}, True, "unused")
    assert capsys.readouterr().out == '{"a":[1,{"b":null}]}\n'


def test_question_without_a_terminal_names_the_option() -> None:
    confirm("Delete it?", yes=True)
    with pytest.raises(CliError) as excinfo:
        confirm("Delete it?", yes=False)
    assert "--yes" in excinfo.value.hint
