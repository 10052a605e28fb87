"""The command `train`: what it reads, uploads, chooses and submits."""

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner, Result

from cli.choices import choose_trainer
from cli.errors import CliError, Problem
from cli.http_client import Client, Json
from cli.main import app
from cli.render.dataset import describe_rows
from tests.unit.cli.api_json import make_plan_json
from tests.unit.cli.fake_service import JOB_ID

ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
CAPABILITIES: Json = {
    "trainer_types": {
        "sft": {"dataset_types": ["messages", "prompt_completion", "text"]},
        "dpo": {"dataset_types": ["preference"]},
        "orpo": {"dataset_types": ["preference"]},
        "kto": {"dataset_types": ["unpaired_preference"]},
        "grpo": {"dataset_types": ["prompt"]},
    },
    "export": {"gguf_quantizations": ["f16", "q8_0"]},
    "methods": ["LoRA", "Full"],
    "launchers": {},
}


def make_dataset(**changes: Any) -> Json:
    fields: Json = {
        "processed_dataset_id": "dataset_1",
        "dataset_type": "messages",
        "rows": 30,
        "rows_uploaded": 30,
        "duplicates_dropped": 0,
    }
    return fields | {"splits": {"train": 27, "eval": 3}, "images": 0, "has_tools": False, "has_weights": False} | changes


class TrainingService:
    """A service that answers the requests of one training."""

    def __init__(self, dataset: Json | None = None, problems: list[Problem] | None = None) -> None:
        self.dataset = dataset or make_dataset()
        self.problems = problems or []
        self.requests: list[httpx2.Request] = []
        self.is_deleted = False
        self.has_dry_runs = True

    def create_client(self) -> Client:
        return Client("http://service", transport=httpx2.MockTransport(self._reply), sleep=lambda _: None)

    @property
    def called(self) -> list[str]:
        return [f"{request.method} {request.url.path}" for request in self.requests]

    @property
    def trained(self) -> Json:
        """The request of the job."""
        return json.loads([request for request in self.requests if request.url.path == "/train"][-1].content)

    def _reply(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        request.read()
        match f"{request.method} {request.url.path}":
            case "POST /train":
                return self._reply_to_train(json.loads(request.content), "dry_run" in request.url.params)
            case "POST /datasets":
                return httpx2.Response(201, json=self.dataset)
            case "GET /datasets/dataset_1" if not self.is_deleted:
                return httpx2.Response(200, json=self.dataset)
            case "GET /capabilities":
                return httpx2.Response(200, json=CAPABILITIES)
            case "GET /models/gemma-3-270m":
                return httpx2.Response(200, json={"name": "google/gemma-3-270m"})
            case "GET /models":
                return httpx2.Response(200, json={"models": [{"name": "google/gemma-3-270m"}], "store_url": "gs://models"})
            case _:
                return error_response(404, [Problem("there is no such path")])

    def _reply_to_train(self, body: Json, is_dry_run: bool) -> httpx2.Response:
        problems = list(self.problems)
        if body.get("processed_dataset_id") != "dataset_1":
            problems.insert(0, Problem("no such dataset", param="processed_dataset_id"))
        if problems:
            return error_response(400, problems)
        if is_dry_run and self.has_dry_runs:
            return httpx2.Response(200, json=make_plan_json())
        return httpx2.Response(201, json={"job_id": JOB_ID})


def error_response(status: int, problems: list[Problem]) -> httpx2.Response:
    errors = [{"message": problem.message, "hint": problem.hint, "param": problem.param} for problem in problems]
    return httpx2.Response(status, json={"error": {"code": "not_found", **errors[0], "errors": errors}})


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROW) + "\n")
    return file


def run_train(service: TrainingService, *words: object, environment: dict[str, str] | None = None) -> Result:
    variables = {"HF_TOKEN": None, "WANDB_API_KEY": None} | (environment or {})
    return CliRunner().invoke(app, ["train", *map(str, words)], env=variables, obj=service.create_client)


def test_rows_become_a_job(rows: Path) -> None:
    service = TrainingService()
    done = run_train(service, rows, "--base", "gemma-3-270m", "--epochs", 2, "--lr", "1e-4", "--rank", 8, "--detach")
    assert (done.exit_code, done.stdout.strip()) == (0, JOB_ID), done.output
    assert service.called == ["GET /models/gemma-3-270m", "POST /train", "POST /datasets", "GET /capabilities", "POST /train"]
    assert service.trained == {
        "processed_dataset_id": "dataset_1",
        "job_name": "rows",
        "training_config": {
            "base_model_id": "google/gemma-3-270m",
            "trainer_type": "sft",
            "hyperparameters": {"epochs": 2, "learning_rate": 1e-4, "lora_rank": 8},
            "export_config": {"include_gguf": True, "gguf_quantization": "q8_0"},
        },
    }
    assert "30 rows of messages: 27 to train on, 3 held out" in done.stderr


def test_what_is_doubtful_about_the_rows_is_told(rows: Path) -> None:
    done = run_train(TrainingService(make_dataset(warnings=["there are only 30 rows"])), rows, "--base", "a/b", "--detach")
    assert "warning there are only 30 rows" in done.stderr


def test_same_rows_are_not_uploaded_again(rows: Path) -> None:
    service = TrainingService()
    for _ in range(2):
        run_train(service, rows, "--base", "a/b", "--detach")
    assert service.called.count("POST /datasets") == 1
    service.is_deleted = True
    run_train(service, rows, "--base", "a/b", "--detach")
    assert service.called.count("POST /datasets") == 2
    rows.write_text(json.dumps(ROW) + "\n\n")
    run_train(service, rows, "--base", "a/b", "--detach")
    assert service.called.count("POST /datasets") == 3


def test_everything_wrong_is_told_before_rows_are_uploaded(rows: Path) -> None:
    wrong = [Problem("is negative", param="training_config.hyperparameters.learning_rate"), Problem("is unknown", param="hardware")]
    service = TrainingService(problems=wrong)
    done = run_train(service, rows, "--base", "a/b", "--lr", "-1", "--detach")
    assert isinstance(done.exception, CliError)
    assert list(done.exception.problems) == wrong
    assert "POST /datasets" not in service.called


def test_fields_of_another_trainer_are_no_error_before_the_rows_tell_the_trainer(rows: Path) -> None:
    service = TrainingService(problems=[Problem("is not a field of sft", param="training_config.hyperparameters.beta")])
    run_train(service, rows, "--base", "a/b", "--set", "hyperparameters.beta=0.1", "--detach")
    assert "POST /datasets" in service.called


def test_missing_base_lists_what_is_there(rows: Path) -> None:
    done = run_train(TrainingService(), rows, "--detach")
    assert isinstance(done.exception, CliError)
    assert (done.exception.param, "google/gemma-3-270m" in done.exception.hint) == ("base_model_id", True)


def test_json_prints_one_document(rows: Path) -> None:
    done = run_train(TrainingService(), rows, "--base", "a/b", "--json")
    assert (done.stdout, done.stderr) == (json.dumps({"job_id": JOB_ID}, separators=(",", ":")) + "\n", "")


def test_dataset_id_is_an_argument(rows: Path) -> None:
    service = TrainingService(make_dataset(dataset_type="preference"))
    done = run_train(service, "dataset_1", "--base", "a/b", "--detach")
    assert service.trained["training_config"]["trainer_type"] == "dpo"
    assert "trainer dpo, for rows of preference; --trainer orpo would use them too" in done.stderr


def test_images_are_trained_as_vision_without_gguf(rows: Path) -> None:
    service = TrainingService(make_dataset(images=3))
    run_train(service, rows, "--base", "a/b", "--detach")
    config = service.trained["training_config"]
    assert (config["modality"], "export_config" in config) == ("vision", False)


def test_options_override_a_request_file_and_set_overrides_both(rows: Path, tmp_path: Path) -> None:
    file = tmp_path / "request.yaml"
    file.write_text(
        "learning_rate: 3\nhyperparameters: {learning_rate: 1e-4, epochs: 2, max_seq_length: 64}\nexport_config: {format: merged}"
    )
    words = ["--dataset", "dataset_1", "--base", "a/b", "--epochs", 5, "--gguf", "q4_k_m", "--no-imatrix", "--merged-dtype", "fp16"]
    words += ["--set", "project_id=p", "--set", "training_config.learning_rate=null", "--set", "hyperparameters.max_seq_length=1e2"]
    words += ["--metadata", "team=search", "--hf-public", "--to-hub", "ada/x"]
    service = TrainingService()
    assert run_train(service, file, *words).exit_code == 0
    assert service.trained == {
        "processed_dataset_id": "dataset_1",
        "project_id": "p",
        "metadata": {"team": "search"},
        "training_config": {
            "learning_rate": None,
            "base_model_id": "a/b",
            "hyperparameters": {"learning_rate": 1e-4, "epochs": 5, "max_seq_length": 100.0},
            "export_config": {
                "format": "merged",
                "include_gguf": True,
                "gguf_quantization": ["q4_k_m"],
                "gguf_imatrix": False,
                "merged_dtype": "fp16",
                "destination": "hfhub",
                "hf_repo_id": "ada/x",
                "hf_private": False,
            },
        },
    }


@pytest.mark.parametrize(
    ("words", "config"),
    [
        ([], None),
        (["--wandb-project", "tides"], {"api_key": "k", "project": "tides"}),
        (["--set", "wandb_config.mode=offline"], {"mode": "offline"}),
        (["--wandb-api-key", "typed"], {"api_key": "typed"}),
    ],
)
def test_wandb_key_of_the_environment_is_used_if_wandb_is_asked_for(rows: Path, words: list[str], config: Json | None) -> None:
    service = TrainingService()
    run_train(service, "dataset_1", "--base", "a/b", *words, environment={"WANDB_API_KEY": "k"})
    assert service.trained["training_config"].get("wandb_config") == config


def test_empty_file_is_refused_here(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(b"")
    service = TrainingService()
    done = run_train(service, file, "--base", "a/b")
    assert isinstance(done.exception, CliError)
    assert (done.exception.message, done.exception.param, service.called) == ("is empty", str(file), [])


@pytest.mark.parametrize(
    ("content", "is_request"),
    [
        ('{"base_model_id": "a/b"}', True),
        (json.dumps(ROW), False),
        ('{"text": "a"}\n{"text": "b"}', False),
        ('[{"question": "a", "answer": "b"}]', False),
        ('{"conversations": []}', False),
    ],
)
def test_json_file_is_a_request_or_rows(rows: Path, tmp_path: Path, content: str, is_request: bool) -> None:
    file = tmp_path / "given.json"
    file.write_text(content)
    service = TrainingService()
    run_train(service, file, "--base", "a/b", "--set", "processed_dataset_id=dataset_1" if is_request else "project_id=p", "--detach")
    assert ("POST /datasets" not in service.called) == is_request
    assert service.trained["processed_dataset_id"] == "dataset_1"


@pytest.mark.parametrize(
    ("name", "reason"), [("rows.jsn", "did you mean"), ("nothing.jsonl", ""), (".", "--base")], ids=["misspelled", "missing", "folder"]
)
def test_source_that_is_no_file_is_refused(rows: Path, name: str, reason: str) -> None:
    done = run_train(TrainingService(), rows.parent / name, "--base", "a/b")
    assert isinstance(done.exception, CliError)
    assert reason in done.exception.hint


def test_folder_as_base_is_imported_first(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "my model").mkdir()
    python = tmp_path / "venvs/llm/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\necho "$@" >> {arguments}\necho \'{{"model": {{"name": "local/my-model"}}}}\'\n'.format(arguments=tmp_path / "arguments")
    )
    python.chmod(0o755)
    service = TrainingService()
    environment = {"TUNESMITH_LOCAL_VENVS": str(tmp_path / "venvs")}
    done = run_train(service, rows, "--base", tmp_path / "my model", "--detach", environment=environment)
    assert done.exit_code == 0, done.output
    assert "import local/my-model --folder" in (tmp_path / "arguments").read_text()
    assert service.trained["training_config"]["base_model_id"] == "local/my-model"


def test_missing_folder_as_base_is_an_error(rows: Path) -> None:
    done = run_train(TrainingService(), rows, "--base", "./nothing", "--detach")
    assert isinstance(done.exception, CliError)
    assert "there is no folder" in done.exception.message


@pytest.mark.parametrize(
    ("dataset_type", "config", "reason"),
    [("prompt", {}, "with graders"), ("images", {}, "no trainer here")],
)
def test_trainer_that_is_not_obvious_is_an_error(dataset_type: str, config: Json, reason: str) -> None:
    with pytest.raises(CliError, match=reason):
        choose_trainer(dataset_type, config, CAPABILITIES)


def test_graders_make_prompts_trainable() -> None:
    assert choose_trainer("prompt", {"reward_config": [{}]}, CAPABILITIES).name == "grpo"


def test_dropped_duplicates_are_told() -> None:
    one = make_dataset(rows=1, rows_uploaded=50, duplicates_dropped=49, splits={"train": 1})
    assert describe_rows(one) == "1 row of messages: 1 to train on, none held out; 49 duplicates dropped"


@pytest.mark.parametrize("words", [["dataset_1"], ["dataset_1", "--no-watch"], ["dataset_1", "--detach"]])
def test_job_that_is_not_watched_is_not_described(rows: Path, words: list[str]) -> None:
    service = TrainingService()
    done = run_train(service, *words, "--base", "a/b")
    assert done.stdout == f"{JOB_ID}\n"
    assert f"GET /jobs/{JOB_ID}" not in service.called


def test_dry_run_prints_the_plan_and_starts_nothing(rows: Path) -> None:
    service = TrainingService()
    words = ["--batch-size", "auto", "--max-length", "auto", "--hardware", "auto", "--dry-run"]
    done = run_train(service, rows, "--base", "a/b", *words)
    assert (done.exit_code, "steps     12: 3 epochs of 27 rows" in done.stdout) == (0, True), done.output
    trainings = [request for request in service.requests if request.url.path == "/train"]
    assert all("dry_run" in request.url.params for request in trainings)
    assert service.called[-2:] == ["POST /datasets/dataset_1/token_lengths", "POST /train"]  # a plan is made without a count too
    assert service.trained["hardware"] == "auto"
    assert service.trained["training_config"]["hyperparameters"] == {"batch_size": "auto", "max_seq_length": "auto"}
    as_json = run_train(service, "dataset_1", "--base", "a/b", "--dry-run", "--json")
    assert json.loads(as_json.stdout) == make_plan_json()


def test_dry_run_of_an_earlier_service_names_the_job_that_it_started(rows: Path) -> None:
    service = TrainingService()
    service.has_dry_runs = False
    done = run_train(service, "dataset_1", "--base", "a/b", "--dry-run")
    assert isinstance(done.exception, CliError)
    assert done.exception.hint == f"`tunesmith cancel {JOB_ID}` stops it"


@pytest.mark.parametrize("has_dry_runs", [True, False])
def test_person_sees_an_estimate_before_one_job_starts(rows: Path, has_dry_runs: bool) -> None:
    service = TrainingService()
    service.has_dry_runs = has_dry_runs
    done = run_train(service, "dataset_1", "--base", "a/b", "--watch")
    assert ("estimate  1 min 0 s to 3 min 20 s" in done.stderr) == has_dry_runs
    started = [request for request in service.requests if request.url.path == "/train" and not (has_dry_runs and request.url.params)]
    assert len(started) == 1
    assert done.stdout.startswith(JOB_ID)


def test_count_is_a_number_or_auto(rows: Path) -> None:
    done = run_train(TrainingService(), "dataset_1", "--base", "a/b", "--batch-size", "many")
    assert isinstance(done.exception, CliError)
    assert done.exception.param == "training_config.hyperparameters.batch_size"


def test_options_of_a_file_need_a_file(rows: Path) -> None:
    done = run_train(TrainingService(), "dataset_1", "--base", "a/b", "--map", "prompt=question")
    assert isinstance(done.exception, CliError)
    assert "there is none" in done.exception.message


def test_other_options_make_another_dataset(rows: Path) -> None:
    service = TrainingService()
    for words in ([], ["--drop-invalid"]):
        run_train(service, rows, "--base", "a/b", "--detach", *words)
    assert service.called.count("POST /datasets") == 2
