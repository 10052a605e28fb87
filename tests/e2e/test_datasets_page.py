"""The commands of docs/datasets.md work, with servers on loopback in place of the buckets, the Hub and the web."""

import csv
import gzip
import http.server
import io
import json
import re
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import boto3
import httpx2
import pytest

from infra.loopback.cloud_storage import run_cloud_storage
from infra.loopback.hub import LoopbackHub, Token
from infra.loopback.s3 import run_s3
from tests.e2e.conftest import BASE, SOURCE, Json, Service, new_service, wait_until

PAGE = (SOURCE / "docs/datasets.md").read_text()
ROWS = [{"topic": "Bread", "question": f"How long is loaf {n} baked?", "answer": f"Loaf {n} needs {20 + n} minutes."} for n in range(60)]
CHATS = [{"messages": [{"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": f"Hello {n}"}]} for n in range(30)]
S3_LOGIN = {"access_key_id": "an-id", "secret_access_key": "a-secret", "region": "us-east-1"}
HUB_TOKEN = "hf_reader"


def to_csv() -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(ROWS[0]))
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue().encode()


def to_jsonl(rows: list[Json]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def to_parquet(folder: Path) -> bytes:
    """A Parquet file of the CSV, written in the environment that has the library."""
    code = "import sys, pyarrow.csv, pyarrow.parquet as p; p.write_table(pyarrow.csv.read_csv(sys.argv[1]), sys.argv[2])"
    (folder / "table.csv").write_bytes(to_csv())
    subprocess.run([SOURCE / ".venvs/data/bin/python", "-c", code, folder / "table.csv", folder / "table.parquet"], check=True)
    return (folder / "table.parquet").read_bytes()


class Website:
    """One file over https, with a certificate of its own."""

    def __init__(self, folder: Path, content: bytes) -> None:
        self.certificate, key = folder / "certificate.pem", folder / "key.pem"
        request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(self.certificate)]
        subprocess.run([*request, *names], check=True, capture_output=True)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # the name that http.server calls
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"https://localhost:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture(scope="module")
def replacements(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What the page's examples name, by the servers that stand in for it; and the variables with which clients find them."""
    folder = tmp_path_factory.mktemp("sources")
    with ExitStack() as stack:
        storage = stack.enter_context(run_cloud_storage(buckets=["my-bucket"]))
        for name, rows in (("a.jsonl", CHATS[:15]), ("b.jsonl", CHATS[15:])):
            upload = f"{storage}/upload/storage/v1/b/my-bucket/o"
            httpx2.post(upload, params={"uploadType": "media", "name": f"chats/{name}"}, content=to_jsonl(rows)).raise_for_status()
        s3_url = stack.enter_context(run_s3(buckets=["my-bucket"]))
        client = boto3.client(
            "s3", endpoint_url=s3_url, region_name="us-east-1", aws_access_key_id="an-id", aws_secret_access_key="a-secret"
        )
        client.put_object(Bucket="my-bucket", Key="faq.parquet", Body=to_parquet(folder))
        client.close()
        hub = stack.enter_context(LoopbackHub())
        hub.tokens[HUB_TOKEN] = Token("reader")
        hub.add_repository("my-org/faq", {"data/train.csv": to_csv()})
        website = Website(folder, gzip.compress(to_csv()))
        stack.callback(website.close)
        yield {
            "https://files.example.com": website.url,
            "STORAGE_EMULATOR_HOST": storage,
            "HF_ENDPOINT": hub.url,
            "SSL_CERT_FILE": str(website.certificate),
            "S3_CREDENTIALS": json.dumps({**S3_LOGIN, "endpoint_url": s3_url}),
        }


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_gemma: Path, replacements: dict[str, str]) -> Iterator[Service]:
    service = new_service(tmp_path_factory.mktemp("datasets") / "home", tiny_gemma)
    service.environment |= {name: value for name, value in replacements.items() if name.isupper()}
    del service.environment["HF_HUB_OFFLINE"]
    service.start()
    yield service
    service.stop()
    service.http.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the examples run: the files that they name."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "faq.csv").write_bytes(to_csv())
    (folder / "chats.jsonl").write_bytes(to_jsonl(CHATS))
    (folder / "broken.jsonl").write_bytes(to_jsonl(CHATS) + b'{"messages": []}\n{"messages"\n')
    return folder


def commands(heading: str) -> list[str]:
    """The curl commands below a heading of the page."""
    section = re.split(r"^#+ ", PAGE, flags=re.MULTILINE)
    [text] = [part for part in section if part.startswith(f"{heading}\n")]
    return [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines() if line.startswith("curl")]


def run(service: Service, folder: Path, command: str, replacements: dict[str, str], **variables: str) -> Json:
    """Run a command as a user's shell would; returns the JSON that it printed."""
    for name in ("https://files.example.com",):
        command = command.replace(name, replacements[name])
    environment = {
        **service.environment,
        "TUNESMITH_URL": str(service.http.base_url).rstrip("/"),
        "AUTH": service.http.headers["Authorization"].join(["Authorization: ", ""]),
        "S3_CREDENTIALS": replacements["S3_CREDENTIALS"],
        "GOOGLE_TOKEN": "ya29.a-token",
        "HF_TOKEN": HUB_TOKEN,
        **variables,
    }
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout) if done.stdout.strip() else {}


def wait_until_ready(service: Service, dataset: Json) -> Json:
    path = f"/datasets/{dataset['processed_dataset_id']}"
    wait_until(lambda: service.http.get(path).json()["status"] != "processing")
    found = service.http.get(path).json()
    assert found["status"] == "ready", found
    return found


def test_file_is_recognized_mapped_and_checked(site: Service, folder: Path, replacements: dict[str, str]) -> None:
    [upload] = commands("Datasets")
    dataset = run(site, folder, upload, replacements)
    assert (dataset["rows"], dataset["detected"]["format"], dataset["detected"]["shape"]) == (60, "csv", "question_answer")
    assert dataset["detected"]["unused_columns"] == ["topic"]
    [with_mapping] = commands("A mapping of your own")
    mapped = run(site, folder, with_mapping, replacements)
    [page] = commands("Pages of rows")
    rows = run(site, folder, page, replacements, DATASET=mapped["processed_dataset_id"])
    assert (rows["total_rows"], len(rows["rows"])) == (54, 14)
    assert all(row["prompt"].startswith("Bread\n\nHow long") for row in rows["rows"])
    check, keep = commands("Check first")
    checked = run(site, folder, check, replacements)
    assert (checked["rows_read"], checked["valid_rows"], checked["problem_count"]) == (60, 60, 0)
    kept = run(site, folder, keep, replacements)
    assert (kept["rows"], sum(kept["dropped"].values())) == (30, 2)


def test_large_file_goes_through_a_link(site: Service, folder: Path, replacements: dict[str, str]) -> None:
    announce, send, make = commands("Large files")
    size = (folder / "chats.jsonl").stat().st_size
    link = run(site, folder, announce.replace("SIZE", str(size)), replacements)
    assert link["url"].startswith("/")
    run(site, folder, send, replacements, UPLOAD_URL=f"{str(site.http.base_url).rstrip('/')}{link['url']}")
    assert run(site, folder, make, replacements, INCOMING=link["incoming"])["rows"] == 30


@pytest.mark.parametrize(("number", "rows"), [(0, 30), (1, 60), (2, 60), (3, 60)], ids=["gs", "s3", "hf", "https"])
def test_source_elsewhere_becomes_a_dataset(site: Service, folder: Path, replacements: dict[str, str], number: int, rows: int) -> None:
    dataset = run(site, folder, commands("Files elsewhere")[number], replacements)
    assert dataset["status"] == "processing"
    assert wait_until_ready(site, dataset)["rows"] == rows


def test_tokens_are_counted_with_the_tokenizer_of_a_base(site: Service, folder: Path, replacements: dict[str, str]) -> None:
    dataset = run(site, folder, commands("Datasets")[0], replacements)
    [count] = commands("Tokens")
    lengths = run(site, folder, count.replace("BASE", BASE), replacements, DATASET=dataset["processed_dataset_id"])
    assert (lengths["rows"], lengths["truncated_rows"]) == (60, 0)
    assert lengths["total_tokens"] > 60 * 5
