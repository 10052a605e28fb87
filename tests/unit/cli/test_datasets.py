"""The commands of `tunesmith datasets`: what they send and what they print."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from typer.testing import CliRunner, Result

from cli import upload
from cli.errors import CliError
from cli.http_client import Client, Json
from cli.main import app
from cli.row_options import build_reading
from tests.unit.cli.api_json import make_check_json, make_dataset_json, make_problem_json, make_token_lengths_json

Answer = Json | Callable[[], Json]


class DatasetService:
    """A service that answers the requests about datasets, each with the next of its answers; the last one is repeated."""

    def __init__(self, **answers: list[tuple[int, Answer]]) -> None:
        """`answers` by the last part of the path."""
        self.answers = answers
        self.requests: list[httpx2.Request] = []

    def create_client(self) -> Client:
        return Client("http://service", transport=httpx2.MockTransport(self._reply), sleep=lambda _: None)

    @property
    def called(self) -> list[str]:
        return [f"{request.method} {request.url.path}" for request in self.requests]

    def _reply(self, request: httpx2.Request) -> httpx2.Response:
        request.read()
        self.requests.append(request)
        replies = self.answers[request.url.path.rpartition("/")[2]]
        status, answer = replies.pop(0) if len(replies) > 1 else replies[0]
        return httpx2.Response(status, json=answer if isinstance(answer, dict) else answer())


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
    path = tmp_path / "faq.csv"
    path.write_text("question,answer\nWhy?,Because.\n")
    return path


def run_datasets(service: DatasetService, *words: object) -> Result:
    return CliRunner().invoke(app, ["datasets", *map(str, words)], env={"HF_TOKEN": None}, obj=service.create_client)


def read_form(request: httpx2.Request) -> dict[str, str]:
    """The text fields of a form, and the name of its file."""
    if request.headers["Content-Type"].startswith("application/x-www-form-urlencoded"):
        return dict(httpx2.QueryParams(request.content.decode()))
    boundary = request.headers["Content-Type"].partition("boundary=")[2].encode()
    fields: dict[str, str] = {}
    for part in request.content.split(b"--" + boundary)[1:-1]:
        head, _, body = part.partition(b"\r\n\r\n")
        name = head.partition(b'name="')[2].partition(b'"')[0].decode()
        fields[name] = head.partition(b'filename="')[2].partition(b'"')[0].decode() or body.removesuffix(b"\r\n").decode()
    return fields


def test_options_of_a_file_are_sent_as_form_fields(file: Path) -> None:
    service = DatasetService(datasets=[(201, make_dataset_json())])
    words = [
        "--map",
        "prompt={question} ({id})",
        "--map",
        "completion=answer",
        "--encoding",
        "cp1252",
        "--delimiter",
        "\\t",
        "--drop-invalid",
    ]
    done = run_datasets(service, "upload", file, *words)
    assert (done.exit_code, done.stdout) == (0, "dataset_1\n"), done.output
    assert read_form(service.requests[0]) == {
        "file": "faq.csv",
        "eval_fraction": "0.1",
        "encoding": "cp1252",
        "delimiter": "\t",
        "mapping": '{"prompt": "{question} ({id})", "completion": "answer"}',
        "on_invalid": "drop",
    }
    assert "faq.csv: CSV, question -> prompt, answer -> completion; 30 rows of prompt completion" in done.stderr


@pytest.mark.parametrize("mapping", ["{promt", "[1]"])
def test_mapping_that_is_no_object_is_refused_here(mapping: str) -> None:
    nothing = dict.fromkeys(("pairs", "file_format", "encoding", "delimiter", "sheet", "text_unit"))
    with pytest.raises(CliError) as excinfo:
        build_reading(mapping=mapping, drop_invalid=False, **nothing)  # type: ignore[arg-type]
    assert excinfo.value.param == "mapping"


def test_map_options_change_fields_of_the_mapping() -> None:
    nothing = dict.fromkeys(("file_format", "encoding", "delimiter", "sheet", "text_unit"))
    text = '{"prompt": "a", "role_key": "from"}'
    reading = build_reading(mapping=text, pairs=["prompt=b", "keep=c,d"], drop_invalid=False, **nothing)  # type: ignore[arg-type]
    assert json.loads(reading["mapping"]) == {"prompt": "b", "role_key": "from", "keep": ["c", "d"]}


def test_large_file_is_sent_to_a_link(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "LINK_FROM_BYTES", 10)
    link = {"incoming": "incoming/uploads/x/faq.csv", "url": "/datasets/uploads/token", "headers": {"X-Needed": "1"}, "expires_at": "x"}
    service = DatasetService(uploads=[(201, link)], token=[(200, {})], datasets=[(201, make_dataset_json())])
    done = run_datasets(service, "upload", file)
    assert done.exit_code == 0, done.output
    assert service.called == ["POST /datasets/uploads", "PUT /datasets/uploads/token", "POST /datasets"]
    announced, sent, made = service.requests
    assert json.loads(announced.content) == {"filename": "faq.csv", "size_bytes": len(file.read_bytes())}
    assert (sent.content, sent.headers["X-Needed"]) == (file.read_bytes(), "1")
    assert sent.headers["Content-Length"] == str(len(file.read_bytes()))
    assert read_form(made) == {"incoming": link["incoming"], "eval_fraction": "0.1", "name": "faq.csv"}


def test_large_file_goes_in_the_request_where_there_are_no_links(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "LINK_FROM_BYTES", 10)
    missing = {"error": {"code": "not_found", "message": "there is no such path", "hint": ""}}
    service = DatasetService(uploads=[(404, missing)], datasets=[(201, make_dataset_json())])
    assert run_datasets(service, "upload", file).exit_code == 0
    assert service.called == ["POST /datasets/uploads", "POST /datasets"]


def test_saved_dataset_is_archived_the_same_way_each_time(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    (folder / "train").mkdir(parents=True)
    (folder / ".cache").mkdir()
    for name in ("dataset_dict.json", "train/data.arrow", ".cache/lock"):
        (folder / name).write_text(name)
    service = DatasetService(datasets=[(201, make_dataset_json())])
    for _ in range(2):
        assert run_datasets(service, "upload", folder).exit_code == 0
    sent = [request.content for request in service.requests]
    archives = [content[content.index(b"PK") : content.rindex(b"\r\n--")] for content in sent]
    assert archives[0].partition(b"\r\n--")[0] == archives[1].partition(b"\r\n--")[0]
    with zipfile.ZipFile(io.BytesIO(archives[0])) as archive:
        assert archive.namelist() == ["dataset_dict.json", "train/data.arrow"]


def test_source_elsewhere_is_followed_until_it_is_ready(file: Path) -> None:
    working = make_dataset_json(status="processing", phase="ingesting", progress={"step": 5, "total_steps": 10})
    service = DatasetService(datasets=[(202, working)], dataset_1=[(200, working), (200, make_dataset_json())])
    done = CliRunner().invoke(app, ["datasets", "upload", "hf://a/b"], env={"HF_TOKEN": "hf_x"}, obj=service.create_client)
    assert (done.exit_code, done.stdout) == (0, "dataset_1\n"), done.output
    assert read_form(service.requests[0]) == {"source": "hf://a/b", "eval_fraction": "0.1", "hf_token": "hf_x"}
    assert service.called == ["POST /datasets", "GET /datasets/dataset_1", "GET /datasets/dataset_1"]


def test_source_that_fails_says_why_and_names_the_rows(file: Path) -> None:
    failure = {"message": "2 rows are not valid", "hint": "correct them"}
    failed = make_dataset_json(status="failed", failure=failure, problems=[make_problem_json(7)])
    service = DatasetService(datasets=[(202, make_dataset_json(status="processing"))], dataset_1=[(200, failed)])
    done = run_datasets(service, "upload", "s3://bucket/rows.csv")
    assert isinstance(done.exception, CliError)
    assert (done.exception.message, done.exception.hint) == ("2 rows are not valid", "correct them")
    assert "row 7" in done.stderr


def test_interrupt_says_how_to_look_again(file: Path) -> None:
    def interrupt() -> Json:
        raise KeyboardInterrupt

    service = DatasetService(datasets=[(202, make_dataset_json(status="processing"))], dataset_1=[(200, interrupt)])
    done = run_datasets(service, "upload", "gs://bucket/rows.csv")
    assert done.exit_code == 130
    assert "`tunesmith datasets show dataset_1` says how far it is" in done.stderr


def test_rows_that_are_not_valid_are_a_table(file: Path) -> None:
    errors = [
        {"message": f"row {line}: answer is empty", "hint": "drop them" if line == 2 else "", "param": "answer"} for line in range(2, 52)
    ]
    refusal = {"error": {"code": "invalid_data", **errors[0], "errors": errors}}
    done = run_datasets(DatasetService(datasets=[(400, refusal)]), "upload", file)
    assert isinstance(done.exception, CliError)
    assert (done.exception.message, done.exception.hint) == ("rows are not valid; nothing was kept", "drop them")
    assert "answer is empty" in done.stderr
    assert "and 30 more" in done.stderr
    quiet = run_datasets(DatasetService(datasets=[(400, refusal)]), "upload", file, "--json")
    assert isinstance(quiet.exception, CliError)
    assert len(quiet.exception.problems) == 50
    assert quiet.stderr == ""


def test_check_exits_with_1_and_names_every_problem(file: Path) -> None:
    problems = [make_problem_json(line) for line in range(2, 32)]
    found = make_check_json(problems=problems, problem_count=30, problem_counts={"empty": 30}, valid_rows=0, splits={})
    service = DatasetService(check=[(200, found)])
    done = run_datasets(service, "check", file)
    assert done.exit_code == 1
    assert "0 of 30 rows are valid" in done.stdout
    assert "row 21" in done.stdout
    assert "row 22" not in done.stdout
    assert "not valid   30 (30 empty)" in done.stdout
    assert "row 31" in run_datasets(service, "check", file, "--limit", 30).stdout
    as_json = run_datasets(service, "check", file, "--json")
    assert (as_json.exit_code, json.loads(as_json.stdout)) == (1, found)


def test_check_of_valid_rows_exits_with_0(file: Path) -> None:
    service = DatasetService(check=[(200, make_check_json())])
    done = run_datasets(service, "check", file)
    assert done.exit_code == 0, done.output
    assert "would make  27 rows to train on, 3 held out" in done.stdout
    assert read_form(service.requests[0]) == {"file": "faq.csv", "eval_fraction": "0.1"}


def test_check_tells_what_is_wrong_with_all_rows_together(file: Path) -> None:
    refused = {"message": "all labels are alike", "hint": 'choose with a mapping: {"prompt": "a", "completion": "b"}', "param": "label"}
    done = run_datasets(DatasetService(check=[(200, make_check_json(refused=refused))]), "check", file)
    assert done.exit_code == 1
    assert "all labels are alike" in done.stdout
    assert """--mapping '{"prompt": "a", "completion": "b"}'""" in done.stdout.replace("\n", " ")


def test_rows_are_shown_with_their_numbers(file: Path) -> None:
    page = {"split": "eval", "offset": 5, "rows": [{"text": "a"}, {"text": "b"}], "total_rows": 20, "next_offset": 7}
    service = DatasetService(rows=[(200, page)])
    done = run_datasets(service, "rows", "dataset_1", "--split", "eval", "--offset", 5, "--limit", 2)
    assert dict(service.requests[0].url.params) == {"split": "eval", "offset": "5", "limit": "2"}
    assert done.stdout.startswith("5\n{")
    assert "rows 5 to 6 of 20 (eval); more: --offset 7" in done.stderr


def test_tokens_are_counted_with_a_base(file: Path) -> None:
    service = DatasetService(token_lengths=[(200, make_token_lengths_json(max_seq_length=64, truncated_rows=2))])
    done = run_datasets(service, "tokens", "dataset_1", "--base", "google/gemma-3-270m", "--max-length", 64)
    assert json.loads(service.requests[0].content) == {"base_model_id": "google/gemma-3-270m", "max_seq_length": 64}
    assert "2 of 30 rows are longer than 64 tokens" in done.stdout


def test_show_prints_the_report_and_the_rows(file: Path) -> None:
    dataset = make_dataset_json(preview={"train": [{"text": "a"}]}, warnings=["few rows"])
    done = run_datasets(DatasetService(dataset_1=[(200, dataset)]), "show", "dataset_1")
    for text in ("ready", "recognized  CSV, question -> prompt", "few rows", '"text": "a"'):
        assert text in done.stdout


def test_hint_has_the_options_of_the_command_of_a_group(file: Path) -> None:
    error = {"code": "invalid_data", "message": "row 2: empty", "hint": 'on_invalid "drop" keeps the others', "param": "mapping"}
    done = run_datasets(DatasetService(datasets=[(400, {"error": error})]), "upload", file)
    assert isinstance(done.exception, CliError)
    assert {"--drop-invalid", "--mapping"} <= done.exception.options
