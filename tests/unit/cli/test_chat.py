"""What `chat` talks to: which artifact of a job, which base, and what it says of those that cannot talk."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner, Result

from cli.artifacts import choose_talker
from cli.errors import CliError
from cli.http_client import Json
from cli.main import app
from tests.unit.cli.fake_service import JOB_ID, FakeReply, FakeService
from tests.unit.cli.link_server import LinkServer, serve_links

BASE = "google/gemma-3-270m"
NOT_FOUND = httpx2.Response(404, json={"error": {"code": "not_found", "message": "unknown", "hint": ""}})
NO_JOBS = httpx2.Response(200, json={"jobs": [], "next_cursor": None})
BASE_ROW = httpx2.Response(200, json={"name": BASE, "available": True})
MODELS = httpx2.Response(200, json={"models": [], "store_url": "file:///store"})


def make_artifact(name: str, *, flagged: bool = False) -> Json:
    kind = "lora_gguf" if name == "lora-gguf" else name.partition("-")[0]
    return {"name": name, "kind": kind, "fidelity": {"closer_to_base": flagged}}


def make_job(*names: str, flagged: tuple[str, ...] = (), **changes: Any) -> Json:
    artifacts = [make_artifact(name, flagged=name in flagged) for name in names]
    job = {"job_id": JOB_ID, "job_name": "tides", "trainer_type": "sft", "status": "completed", "base_model_id": BASE}
    return job | {"earlier_model": None, "gate_passed": None, "artifacts": artifacts} | changes


# --- the choice ---


@pytest.mark.parametrize(
    ("names", "flagged", "chosen", "note"),
    [
        (("adapter", "gguf-q8_0", "gguf-f16"), (), "gguf-q8_0", ""),
        (("adapter", "gguf-q2_k", "gguf-q8_0"), ("gguf-q2_k",), "gguf-q8_0", "gguf-q8_0 was chosen: gguf-q2_k is closer to the base"),
        (("adapter", "merged", "gguf-q2_k"), ("gguf-q2_k",), "merged", "merged was chosen: gguf-q2_k is closer"),
        (("gguf-q2_k", "gguf-q3_k_m", "onnx"), ("gguf-q2_k", "gguf-q3_k_m"), "gguf-q2_k", "warning: gguf-q2_k is closer to the base"),
        (("onnx", "lora-gguf", "gguf-mmproj", "adapter"), (), "adapter", ""),
    ],
)
def test_best_artifact_that_can_talk_is_chosen(names: tuple[str, ...], flagged: tuple[str, ...], chosen: str, note: str) -> None:
    choice = choose_talker(make_job(*names, flagged=flagged), None)
    assert choice.artifact["name"] == chosen
    assert "".join(choice.notes).startswith(note)
    assert bool(choice.notes) == bool(note)


@pytest.mark.parametrize(
    ("name", "problem", "advice"),
    [
        ("onnx", "for scoring", "use adapter"),
        ("lora-gguf", "llama.cpp applies it", "use adapter"),
        ("gguf-mmproj", "vision part", "tunesmith export"),
        ("gguf-usage", "holds no model", "tunesmith export"),
        ("nope", "has no artifact 'nope'; it has: adapter, onnx", ""),
    ],
)
def test_artifact_that_cannot_talk_says_why(name: str, problem: str, advice: str) -> None:
    job = make_job("adapter", "onnx", "lora-gguf", "gguf-mmproj", "gguf-usage")
    with pytest.raises(CliError) as excinfo:
        choose_talker(job, name)
    assert problem in excinfo.value.message
    assert advice in excinfo.value.hint


def test_reward_model_cannot_talk() -> None:
    with pytest.raises(CliError, match="rates answers and writes none") as excinfo:
        choose_talker(make_job("adapter", trainer_type="reward"), None)
    assert "grader" in excinfo.value.hint


def test_adapter_of_an_earlier_model_needs_that_model() -> None:
    earlier = {"job_id": "training_e", "in_adapter": False}
    with pytest.raises(CliError, match="applies to the model of job training_e"):
        choose_talker(make_job("adapter", earlier_model=earlier), "adapter")
    assert choose_talker(make_job("adapter", earlier_model=earlier | {"in_adapter": True}), None).artifact["name"] == "adapter"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"status": "training"}, "no model yet: the job is training"),
        ({"gate_passed": False}, "did not pass its gate"),
        ({}, "has no artifacts"),
    ],
)
def test_job_without_artifacts_says_why(changes: Json, problem: str) -> None:
    with pytest.raises(CliError, match=problem):
        choose_talker(make_job(**changes), None)


# --- the command ---


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home whose trainer's environment has a Python that only reports its arguments and exits with 7."""
    python = tmp_path / "venvs/llm/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f'#!{sys.executable}\nimport json, sys\nopen({str(tmp_path / "called")!r}, "w").write(json.dumps(sys.argv[1:]))\nsys.exit(7)\n'
    )
    python.chmod(0o700)
    return tmp_path


@pytest.fixture
def links() -> Iterator[LinkServer]:
    with serve_links() as server:
        yield server


def run_chat(home: Path, *words: str, replies: list[FakeReply]) -> tuple[Result, dict[str, str | bool], list[str]]:
    """Run the command; returns what it printed, the options of the chat that it started, and the paths that it asked for."""
    service = FakeService(*replies)
    variables = {"TUNESMITH_HOME": str(home), "TUNESMITH_LOCAL_VENVS": str(home / "venvs")}
    done = CliRunner().invoke(app, ["chat", *words], env=variables, obj=lambda: service.client)
    called = json.loads((home / "called").read_text()) if (home / "called").is_file() else []
    options: dict[str, str | bool] = {}
    for number, word in enumerate(called):
        if word.startswith("--"):
            option, has_value, value = word.partition("=")
            following = called[number + 1] if number + 1 < len(called) else "--"
            options[option] = value if has_value else following if not following.startswith("--") else True
    return done, options, [request.url.path for request in service.requests]


def answer_links(links: LinkServer, artifact: str, **files: bytes) -> httpx2.Response:
    links.files |= {name.replace("__", "."): content for name, content in files.items()}
    described = [links.describe(name.replace("__", ".")) for name in files]
    return httpx2.Response(200, json={"artifact": artifact, "is_folder": True, "files": described})


def test_chat_starts_with_the_downloaded_model(home: Path, links: LinkServer) -> None:
    replies: list[FakeReply] = [
        httpx2.Response(200, json=make_job("gguf-q8_0")),
        answer_links(links, "gguf-q8_0", m__gguf=b"GGUF", m__Modelfile=b""),
    ]
    done, options, paths = run_chat(home, JOB_ID, "--system", "Be brief.", "--prompt", "-hi", "--temperature", "0", replies=replies)
    gguf = home / "downloads" / JOB_ID / "gguf-q8_0/m.gguf"
    assert done.exit_code == 7, done.output
    assert gguf.read_bytes() == b"GGUF"
    assert paths == [f"/jobs/{JOB_ID}", f"/jobs/download/{JOB_ID}"]
    assert options == {
        "--model": str(gguf),
        "--title": "gguf-q8_0 of tides …89ab",
        "--downloads": str(home / "downloads/models"),
        "--history": str(home / "chat_history"),
        "--max-tokens": "256",
        "--temperature": "0.0",
        "--system": "Be brief.",
        "--prompt": "-hi",
    }


@pytest.mark.parametrize(("artifact", "words"), [("adapter", ()), ("gguf-q8_0", ("--compare",))])
def test_adapter_and_comparison_get_the_base(home: Path, links: LinkServer, artifact: str, words: tuple[str, ...]) -> None:
    replies: list[FakeReply] = [httpx2.Response(200, json=make_job(artifact)), answer_links(links, artifact, m__x=b"1"), BASE_ROW, MODELS]
    done, options, _ = run_chat(home, JOB_ID, *words, replies=replies)
    assert done.exit_code == 7, done.output
    assert options["--model"] == str(home / "downloads" / JOB_ID / artifact)
    assert options["--base"] == f"file:///store/pretrained_weights/huggingface/{BASE}"
    assert ("--compare" in options) == bool(words)


def test_base_of_a_job_is_asked_with_the_template_of_its_model(home: Path, links: LinkServer) -> None:
    replies: list[FakeReply] = [
        httpx2.Response(200, json=make_job("gguf-q8_0", "adapter")),
        BASE_ROW,
        MODELS,
        answer_links(links, "adapter", adapter_model__safetensors=b"large", chat_template__jinja=b"{{ messages }}"),
    ]
    done, options, paths = run_chat(home, JOB_ID, "--base", replies=replies)
    folder = home / "downloads" / JOB_ID / "adapter"
    assert done.exit_code == 7, done.output
    assert paths[1] == f"/models/{BASE}"
    assert options["--model"] == f"file:///store/pretrained_weights/huggingface/{BASE}"
    assert options["--template-of"] == str(folder)
    assert [path.name for path in folder.iterdir()] == ["chat_template.jinja"]


def test_comparison_says_what_the_training_started_from(home: Path, links: LinkServer) -> None:
    job = make_job("gguf-q8_0", earlier_model={"job_id": "training_e", "in_adapter": True})
    replies: list[FakeReply] = [httpx2.Response(200, json=job), answer_links(links, "gguf-q8_0", m__gguf=b"1"), BASE_ROW, MODELS]
    done, _, _ = run_chat(home, JOB_ID, "--compare", replies=replies)
    assert done.stderr == f"{BASE} is the original base; the job started from the model of training_e\n"


@pytest.mark.parametrize(("name", "replies"), [(BASE, []), ("gemma-3-270m", [NO_JOBS, NO_JOBS, BASE_ROW])])
def test_base_model_is_found_by_its_name(home: Path, name: str, replies: list[FakeReply]) -> None:
    done, options, _ = run_chat(home, name, replies=[*replies, BASE_ROW, MODELS])
    assert done.exit_code == 7, done.output
    assert (options["--model"], options["--title"]) == (f"file:///store/pretrained_weights/huggingface/{BASE}", BASE)
    assert "--template-of" not in options


@pytest.mark.parametrize(
    ("words", "replies", "problem", "hint"),
    [
        ([JOB_ID, "-p", ""], [], "--prompt is empty", "leave --prompt out"),
        ([JOB_ID, "--system", " "], [], "--system is empty", "leave --system out"),
        ([JOB_ID, "--base", "--compare"], [], "--compare asks", "one of the two"),
        ([BASE, "--compare"], [], "is a base model", "leave them out"),
        (["nothing"], [NO_JOBS, NO_JOBS, NOT_FOUND], "there is no job and no base model 'nothing'", "tunesmith models list"),
        (
            [BASE],
            [httpx2.Response(200, json={"name": BASE, "available": False})],
            "not in the model store",
            f"tunesmith models pull {BASE}",
        ),
    ],
)
def test_nothing_starts_with_a_wrong_word(home: Path, words: list[str], replies: list[FakeReply], problem: str, hint: str) -> None:
    done, options, _ = run_chat(home, *words, replies=replies)
    assert isinstance(done.exception, CliError)
    assert problem in done.exception.message
    assert hint in done.exception.hint
    assert options == {}


def test_missing_environment_is_one_error(tmp_path: Path) -> None:
    done, _, _ = run_chat(tmp_path, BASE, replies=[BASE_ROW, MODELS])
    assert isinstance(done.exception, CliError)
    assert "make setup" in done.exception.hint
