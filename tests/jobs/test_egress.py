"""What an attempt connects to when a caller names it: judges, embeddings, MLflow, Trackio."""

import asyncio
import json
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest

from jobs.llm.graders import build_graders, check_graders, close_graders
from jobs.llm.graders.base import FailedGrade, GradingInput
from jobs.llm.graders.checked_transport import MAX_RESPONSE_BYTES, CheckedTransport, LimitedStream
from jobs.llm.graders.endpoint import Endpoint
from jobs.llm.graders.judge import Judge
from jobs.runtime.context import JobContext
from jobs.runtime.egress import check_url, guard_connections, operator_proxy
from jobs.runtime.errors import JobFailed
from jobs.runtime.settings import read_egress_policy
from jobs.runtime.trackers import start_trackers
from schema.egress import EGRESS_VARIABLE, EgressPolicy, EgressRefused, parse_url
from schema.training.llm_graders import ScoreModelGrader
from tests.jobs.conftest import EventRecorder, make_context, make_spec
from tests.jobs.fake_mlflow import FakeMlflow
from tests.jobs.fake_openai import FakeOpenAI

STRICT = EgressPolicy()
LOCAL = EgressPolicy(allow_loopback=True)
PUBLIC_ADDRESS = "93.184.215.14"


@pytest.fixture
def internal_server() -> Iterator[FakeOpenAI]:
    """A server on loopback that no hostile URL may reach."""
    with FakeOpenAI() as running:
        yield running
    assert running.requests == []


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


class RedirectServer:
    """Answers every request with a redirect to a URL."""

    def __init__(self, location: str, status: int) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.send_response(status)
                self.send_header("Location", location)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_PUT = do_POST  # noqa: N815  # the names that http.server calls

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> "RedirectServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class RecordingTransport(httpx2.AsyncBaseTransport):
    """Answers instead of a network, and records where each request would have gone."""

    def __init__(self, unreachable: tuple[str, ...] = (), headers: dict[str, str] | None = None) -> None:
        self.requests: list[httpx2.Request] = []
        self._unreachable = unreachable
        self._headers = headers or {}

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        if request.url.host in self._unreachable:
            raise httpx2.ConnectError("no route", request=request)
        return httpx2.Response(200, headers=self._headers, stream=httpx2.ByteStream(b"{}"))


def rebind(*answers: tuple[str, ...]) -> Any:
    """A resolver whose answer changes from call to call."""
    remaining = list(answers)
    return lambda _host, _port: remaining.pop(0)


def send(transport: CheckedTransport, url: str) -> bytes:
    async def post() -> bytes:
        async with httpx2.AsyncClient(transport=transport) as client:
            return (await client.post(url, json={})).content

    return asyncio.run(post())


# --- judges and embeddings --------------------------------------------------------------------------------------------


def make_judge_context(store: Path, workdir: Path, base_url: str) -> JobContext:
    grader = {"name": "g", "type": "score_model", "base_url": base_url, "model": "m"}
    hyperparameters = {"batch_size": 2, "num_generations": 2, "max_completion_length": 32}
    spec = make_spec(
        store,
        train=[{"prompt": "p"}],
        held_out=[],
        dataset_type="prompt",
        trainer_type="grpo",
        reward_config=[grader],
        hyperparameters=hyperparameters,
    )
    return make_context(spec, workdir, secrets={"g_api_key": "key-canary"})


def test_refused_judge_fails_the_job_with_hint(
    store: Path, tmp_path: Path, internal_server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(EGRESS_VARIABLE)  # an attempt that was launched without a policy has the strictest one
    context = make_judge_context(store, tmp_path, internal_server.url)
    with pytest.raises(JobFailed, match=r"grader 'g': base_url is refused: 127\.0\.0\.1 is a loopback address") as failed:
        build_graders(context.spec.training_config, context)  # type: ignore[arg-type]
    assert failed.value.failure.code == "invalid_config"
    assert "TUNESMITH_EGRESS_ALLOW" in failed.value.failure.hint


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_judge_that_redirects_is_refused(store: Path, tmp_path: Path, internal_server: FakeOpenAI, status: int) -> None:
    with RedirectServer(internal_server.url + "/chat/completions", status) as hostile:
        context = make_judge_context(store, tmp_path, hostile.url + "/v1")
        graders = build_graders(context.spec.training_config, context)  # type: ignore[arg-type]
        with pytest.raises(JobFailed, match=f"answered {status} .*redirect") as failed:
            check_graders(graders, [GradingInput("p", "c")])
        close_graders(graders)
    assert failed.value.failure.code == "invalid_config"


def test_local_profile_does_not_reach_the_service_itself(internal_server: FakeOpenAI) -> None:
    port = int(parse_url(internal_server.url).port)
    policy = EgressPolicy(allow_loopback=True, own_ports=(port,), own_addresses=own_addresses())
    for host in ("127.0.0.1", "127.0.0.2", "127.1", "localhost", "[::1]", "0.0.0.0", "[::]", "[::ffff:127.0.0.1]", *own_names()):
        with pytest.raises(EgressRefused):
            check_url(f"http://{host}:{port}/v1", policy)
        with pytest.raises(httpx2.ConnectError) as refused:
            send(CheckedTransport("http://judge.example", policy), f"http://{host}:{port}/v1/chat/completions")
        assert isinstance(refused.value.__cause__, EgressRefused)


def own_names() -> list[str]:
    """The name of this machine, if it resolves."""
    return [socket.gethostname()] if own_addresses() else []


def own_addresses() -> tuple[str, ...]:
    """The addresses of this machine's host name, as the service takes them from its network interfaces."""
    try:
        return tuple({str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None)})
    except OSError:
        return ()


def test_name_that_is_rebound_to_loopback_is_refused(internal_server: FakeOpenAI) -> None:
    port = parse_url(internal_server.url).port
    url = f"https://rebind.example:{port}/v1"
    resolve = rebind((PUBLIC_ADDRESS,), ("127.0.0.1",), (PUBLIC_ADDRESS, "::1"))
    check_url(url, STRICT, resolve)
    transport = CheckedTransport(url, STRICT, resolve=resolve)
    for _ in range(2):
        with pytest.raises(httpx2.ConnectError, match="is a loopback address"):
            send(transport, url)


def test_rebound_judge_fails_with_the_reason(internal_server: FakeOpenAI) -> None:
    config = ScoreModelGrader(name="g", type="score_model", base_url=internal_server.url, model="m")
    judge = Judge(config, Endpoint(internal_server.url, "key-canary", 5, STRICT, max_retries=0), log_decision=lambda *_: None)
    assert judge.grade([GradingInput("p", "c")]) == [
        FailedGrade(f"{internal_server.url} was not called: 127.0.0.1 is a loopback address, which this deployment does not connect to")
    ]
    with pytest.raises(JobFailed, match="was not called"):
        judge.check([GradingInput("p", "c")])
    judge.close()


def test_connection_goes_to_the_checked_address_with_the_name_for_tls() -> None:
    inner = RecordingTransport()
    send(CheckedTransport("https://judge.example", STRICT, resolve=rebind((PUBLIC_ADDRESS,)), inner=inner), "https://Judge.example./v1?a=b")
    (request,) = inner.requests
    assert str(request.url) == f"https://{PUBLIC_ADDRESS}/v1?a=b"
    assert request.extensions["sni_hostname"] == "judge.example"
    assert request.headers["Host"] == "judge.example."


def test_next_address_is_tried_when_one_is_unreachable() -> None:
    inner = RecordingTransport(unreachable=("2606:4700::1111",))
    resolve = rebind(("2606:4700::1111", PUBLIC_ADDRESS))
    assert send(CheckedTransport("https://judge.example", STRICT, resolve=resolve, inner=inner), "https://judge.example/v1") == b"{}"
    assert [request.url.host for request in inner.requests] == ["2606:4700::1111", PUBLIC_ADDRESS]


def test_name_that_is_not_found_is_a_connection_error() -> None:
    def find_nothing(_host: str, _port: int) -> tuple[str, ...]:
        raise socket.gaierror("no such name")

    with pytest.raises(httpx2.ConnectError, match=r"judge\.example is not found"):
        send(CheckedTransport("https://judge.example", STRICT, resolve=find_nothing), "https://judge.example/v1")


def test_slow_name_server_is_a_timeout() -> None:
    released = threading.Event()

    def hang(_host: str, _port: int) -> tuple[str, ...]:
        released.wait(20)
        return ()

    async def post() -> None:
        async with httpx2.AsyncClient(transport=CheckedTransport("https://judge.example", STRICT, resolve=hang), timeout=0.05) as client:
            try:
                await client.post("https://judge.example/v1")
            finally:
                released.set()

    with pytest.raises(httpx2.ConnectTimeout):
        asyncio.run(post())


def test_operator_proxy_resolves_the_name_but_the_target_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://10.0.0.1:3128")
    monkeypatch.setenv("NO_PROXY", "direct.example")
    assert operator_proxy(parse_url("https://judge.example")) == "http://10.0.0.1:3128"
    assert operator_proxy(parse_url("https://direct.example")) is None

    def find_nothing(_host: str, _port: int) -> tuple[str, ...]:
        raise socket.gaierror("only the proxy resolves names")

    inner = RecordingTransport()
    transport = CheckedTransport("https://judge.example", STRICT, resolve=find_nothing, inner=inner)
    send(transport, "https://judge.example/v1")
    assert [str(request.url) for request in inner.requests] == ["https://judge.example/v1"]
    with pytest.raises(httpx2.ConnectError, match="never allowed"):
        send(transport, "https://169.254.169.254/v1")


def test_compressed_response_is_refused() -> None:
    inner = RecordingTransport(headers={"Content-Encoding": "gzip"})
    with pytest.raises(httpx2.RemoteProtocolError, match="compressed"):
        send(CheckedTransport("https://8.8.8.8", STRICT, inner=inner), "https://8.8.8.8/v1")
    assert inner.requests[0].headers["Accept-Encoding"] == "identity"


def test_response_has_a_maximum_size() -> None:
    class Endless(httpx2.AsyncByteStream):
        sent = 0

        async def __aiter__(self) -> AsyncIterator[bytes]:
            while True:
                self.sent += 1 << 20
                yield bytes(1 << 20)

    async def read(stream: LimitedStream) -> None:
        async for _ in stream:
            pass

    endless = Endless()
    with pytest.raises(httpx2.RemoteProtocolError, match="larger than 32 MB"):
        asyncio.run(read(LimitedStream(endless)))
    assert endless.sent == MAX_RESPONSE_BYTES + (1 << 20)


def test_invalid_policy_fails_the_attempt() -> None:
    assert read_egress_policy({}) == STRICT
    assert read_egress_policy({EGRESS_VARIABLE: LOCAL.model_dump_json()}) == LOCAL
    for invalid in ("{", '{"allow": ["a b"]}'):
        with pytest.raises(JobFailed, match=EGRESS_VARIABLE):
            read_egress_policy({EGRESS_VARIABLE: invalid})


# --- trackers -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A listening socket; nothing may connect to it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_guarded_thread_cannot_connect_to_a_rebound_name(listener: socket.socket) -> None:
    host, port = listener.getsockname()
    target = parse_url(f"https://mlflow.example:{port}")
    with guard_connections(target, STRICT):
        for address in ((host, port), ("localhost", port)):
            with pytest.raises(EgressRefused):
                socket.create_connection(address)
        with pytest.raises(EgressRefused):
            socket.create_connection(("169.254.169.254", 80))  # as after a redirect
    with guard_connections(parse_url(f"http://{host}:{port}"), EgressPolicy(allow_loopback=True, own_ports=(port,))):
        with pytest.raises(EgressRefused):
            socket.create_connection((host, port))


def test_guard_ends_with_its_block_and_leaves_other_threads_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with guard_connections(parse_url("https://mlflow.example"), STRICT):
            thread = threading.Thread(target=lambda: socket.create_connection(server.getsockname()).close())
            thread.start()
            thread.join()
            server.settimeout(5)
            server.accept()[0].close()
        socket.create_connection(server.getsockname()).close()
        server.accept()[0].close()


def run_mlflow(objects: Path, workdir: Path, uri: str) -> dict[str, str]:
    """The warnings of a run that is tracked at that URI."""
    record = EventRecorder()
    context = make_context(make_spec(objects, mlflow_config={"tracking_uri": uri}), workdir, record, secrets={"mlflow_token": "canary"})
    for thread in start_trackers(context):
        thread.finish(succeeded=True, timeout_s=30)
    return record.warnings


def test_refused_mlflow_server_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EGRESS_VARIABLE, STRICT.model_dump_json())
    with FakeMlflow() as server:
        warnings = run_mlflow(tmp_path / "objects", tmp_path / "work", server.url)
    assert list(warnings) == ["tracker_failed"]
    assert "the training continues without it" in warnings["tracker_failed"]
    assert "127.0.0.1 is a loopback address" in warnings["tracker_failed"]
    assert server.experiments == {}


def test_mlflow_redirect_is_refused(tmp_path: Path) -> None:
    with FakeMlflow() as server, RedirectServer(server.url + "/api/2.0/mlflow/experiments/get-by-name?experiment_name=x", 307) as hostile:
        server.experiments["x"] = "1"
        warnings = run_mlflow(tmp_path / "objects", tmp_path / "work", hostile.url)
    assert "307" in warnings["tracker_failed"]
    assert server.runs == {}


@pytest.mark.parametrize("guarded", [True, False])
def test_trackio_process_is_guarded_in_a_space_of_the_public_hub(tmp_path: Path, *, guarded: bool) -> None:
    (tmp_path / "trackio.py").write_text(
        "import socket, threading\n"
        "def connect(port, answers):\n"
        "    try:\n"
        "        socket.create_connection(('127.0.0.1', port)).close()\n"
        "        answers.append('connected')\n"
        "    except ValueError as error:\n"
        "        answers.append(str(error))\n"
        "def init(port, **_):\n"
        "    answers = []\n"
        "    thread = threading.Thread(target=connect, args=(port, answers))\n"
        "    thread.start()\n"
        "    thread.join()\n"
        "    print(answers)\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = subprocess.run(
            [sys.executable, "-m", "jobs.runtime.trackers.trackio_process"],
            input=json.dumps({"init": {"port": server.getsockname()[1]}, "guarded": guarded}) + "\n",
            env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}", EGRESS_VARIABLE: STRICT.model_dump_json()},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    assert done.stdout == "done\n"
    assert ("is a loopback address" if guarded else "connected") in done.stderr
