"""Downloads: where files land, what is kept, and what continues after an interruption."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from typer.testing import CliRunner, Result

from cli.errors import CliError
from cli.http_client import Json
from cli.main import app
from cli.transfer import MAX_TRIES, Downloader
from tests.unit.cli.fake_service import JOB_ID, FakeService
from tests.unit.cli.link_server import LinkServer, serve_links

CONTENT = bytes(range(256)) * 40
GGUF = "gemma-q8_0.gguf"


@pytest.fixture
def links() -> Iterator[LinkServer]:
    with serve_links() as server:
        server.files[GGUF] = CONTENT
        yield server


def answer_links(links: LinkServer, *paths: str, artifact: str = "gguf-q8_0") -> httpx2.Response:
    """The API's answer with links to these files."""
    files = [links.describe(path) for path in paths or (GGUF,)]
    return httpx2.Response(200, json={"artifact": artifact, "is_folder": False, "files": files})


def make_downloader(links: LinkServer, folder: Path) -> Downloader:
    return Downloader(FakeService(answer_links(links)).client, folder, sleep=lambda _: None)


# --- one artifact ---


def test_each_artifact_has_a_folder(links: LinkServer, tmp_path: Path) -> None:
    local = make_downloader(links, tmp_path).download(JOB_ID, None)
    assert local.find(".gguf") == tmp_path / "gguf-q8_0" / GGUF
    assert (tmp_path / "gguf-q8_0" / GGUF).read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "gguf-q8_0").iterdir()] == [GGUF]


def test_same_file_is_kept_without_a_request(links: LinkServer, tmp_path: Path) -> None:
    make_downloader(links, tmp_path).download(JOB_ID, None)
    links.ranges.clear()
    [file] = make_downloader(links, tmp_path).download(JOB_ID, None).files
    assert file.kept
    assert links.ranges == []


def test_other_file_is_never_overwritten_without_the_option(links: LinkServer, tmp_path: Path) -> None:
    target = tmp_path / "gguf-q8_0" / GGUF
    target.parent.mkdir()
    target.write_bytes(CONTENT[::-1])  # of the same size
    with pytest.raises(CliError, match="exists with other content") as excinfo:
        make_downloader(links, tmp_path).download(JOB_ID, None)
    assert "--overwrite" in excinfo.value.hint
    assert target.read_bytes() == CONTENT[::-1]
    make_downloader(links, tmp_path).download(JOB_ID, None, overwrite=True)
    assert target.read_bytes() == CONTENT


def test_broken_connection_continues_where_it_ended(links: LinkServer, tmp_path: Path) -> None:
    links.sent_bytes = 3000
    make_downloader(links, tmp_path).download(JOB_ID, None)
    assert (tmp_path / "gguf-q8_0" / GGUF).read_bytes() == CONTENT
    assert links.ranges == [None, "bytes=3000-", "bytes=6000-", "bytes=9000-"]


def test_interrupted_command_continues_when_it_is_repeated(links: LinkServer, tmp_path: Path) -> None:
    part = tmp_path / "gguf-q8_0" / f"{GGUF}.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT[:5000])
    make_downloader(links, tmp_path).download(JOB_ID, None)
    assert part.with_suffix("").read_bytes() == CONTENT
    assert links.ranges == ["bytes=5000-"]
    assert not part.exists()


@pytest.mark.parametrize("left", [b"of another file", b"x" * (len(CONTENT) + 1), b"x" * len(CONTENT)])
def test_rest_of_another_file_is_downloaded_again(links: LinkServer, tmp_path: Path, left: bytes) -> None:
    part = tmp_path / "gguf-q8_0" / f"{GGUF}.part"
    part.parent.mkdir()
    part.write_bytes(left)
    make_downloader(links, tmp_path).download(JOB_ID, None)
    assert part.with_suffix("").read_bytes() == CONTENT


def test_server_without_ranges_sends_all_again(links: LinkServer, tmp_path: Path) -> None:
    links.supports_ranges = False
    part = tmp_path / "gguf-q8_0" / f"{GGUF}.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT[:10])
    make_downloader(links, tmp_path).download(JOB_ID, None)
    assert part.with_suffix("").read_bytes() == CONTENT


def test_expired_link_is_renewed(links: LinkServer, tmp_path: Path) -> None:
    links.status = 403
    service = FakeService(answer_links(links))
    Downloader(service.client, tmp_path, sleep=lambda _: None).download(JOB_ID, None)
    assert [request.url.params.get("artifact") for request in service.requests] == [None, "gguf-q8_0"]
    assert (tmp_path / "gguf-q8_0" / GGUF).read_bytes() == CONTENT


def test_dead_link_says_how_to_continue(links: LinkServer, tmp_path: Path) -> None:
    links.sent_bytes = 0
    with pytest.raises(CliError, match=f"ended at 0 of {len(CONTENT)} bytes") as excinfo:
        make_downloader(links, tmp_path).download(JOB_ID, None)
    assert "continues" in excinfo.value.hint
    assert len(links.ranges) == MAX_TRIES


def test_damaged_file_is_not_kept(links: LinkServer, tmp_path: Path) -> None:
    service = FakeService(answer_links(links))
    links.files[GGUF] = CONTENT[::-1]
    with pytest.raises(CliError, match="SHA-256"):
        Downloader(service.client, tmp_path, sleep=lambda _: None).download(JOB_ID, None)
    assert list((tmp_path / "gguf-q8_0").iterdir()) == []


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", ""])
def test_service_cannot_name_a_file_outside_the_folder(tmp_path: Path, path: str) -> None:
    file = {"path": path, "size_bytes": 1, "sha256": "0", "url": "http://127.0.0.1:1/"}
    service = FakeService(httpx2.Response(200, json={"artifact": "merged", "is_folder": True, "files": [file]}))
    with pytest.raises(CliError, match="outside the folder"):
        Downloader(service.client, tmp_path).download(JOB_ID, None)


# --- the command ---


def make_job(*artifacts: Json) -> httpx2.Response:
    job = {"job_id": JOB_ID, "trainer_type": "sft", "status": "completed", "base_model_id": "google/gemma-3-270m"}
    return httpx2.Response(200, json=job | {"artifacts": artifacts})


def run_download(*words: str, replies: list[httpx2.Response]) -> Result:
    service = FakeService(*replies)
    return CliRunner().invoke(app, ["download", JOB_ID, *words], obj=lambda: service.client)


def test_command_prints_paths_and_what_to_do_next(links: LinkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    links.files["gemma-q8_0.Modelfile"] = b"FROM ./gemma-q8_0.gguf"
    erased = {"name": "gguf-q2_k", "kind": "gguf", "fidelity": {"closer_to_base": True}}
    done = run_download(
        replies=[make_job(erased, {"name": "gguf-q8_0", "kind": "gguf"}), answer_links(links, GGUF, "gemma-q8_0.Modelfile")]
    )
    folder = "tunesmith-0123456789ab/gguf-q8_0"
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [f"{folder}/{GGUF}", f"{folder}/gemma-q8_0.Modelfile"]
    assert done.stderr.splitlines() == [
        "gguf-q8_0 was chosen: gguf-q2_k is closer to the base than to the trained model",
        f"next: tunesmith chat {JOB_ID} --artifact gguf-q8_0",
        f"      ollama create gemma-3-270m-q8_0 -f {folder}/gemma-q8_0.Modelfile",
        f"      llama-cli -m {folder}/{GGUF}",
    ]


def test_command_downloads_all_artifacts_as_one_document(links: LinkServer, tmp_path: Path) -> None:
    links.files["adapter_model.safetensors"] = b"weights"
    replies = [
        make_job({"name": "gguf-q8_0", "kind": "gguf"}, {"name": "adapter", "kind": "adapter"}),
        answer_links(links),
        answer_links(links, "adapter_model.safetensors", artifact="adapter"),
    ]
    done = run_download("--artifact", "all", "--to", str(tmp_path), "--json", replies=replies)
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert [artifact["artifact"] for artifact in answer["artifacts"]] == ["gguf-q8_0", "adapter"]
    [file] = answer["artifacts"][1]["files"]
    assert (file["path"], file["size_bytes"], file["kept"]) == (str(tmp_path / "adapter/adapter_model.safetensors"), 7, False)
