"""The commands `watch` and `logs`: what they request, print and exit with, in a pipe and in a terminal."""

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pyte
import pytest

from cli.errors import ApiError
from cli.http_client import Json
from tests.unit.cli.api_json import make_event_json, make_job_json, make_progress_json
from tests.unit.cli.fake_service import CONNECTION_LOST, JOB_ID, FakeReply, FakeService
from tests.unit.cli.test_commands import run_command
from tests.waiting import wait_until

SOURCE = Path(__file__).resolve().parents[3]
DONE = "event: done\ndata: {}\n\n"


def make_stream(*rows: str, end: str = DONE) -> httpx2.Response:
    return httpx2.Response(200, text="".join(rows) + end, headers={"Content-Type": "text/event-stream"})


def write_event(event: Json) -> str:
    return f"id: {event['id']}\nevent: {event['event']['type']}\ndata: {json.dumps(event)}\n\n"


def write_progress(step: int, **changes: object) -> str:
    data = {"phase": "training", "progress": make_progress_json(step, **changes)}
    return f"event: progress\ndata: {json.dumps(data)}\n\n"


def write_log(attempt: int, offset: int, text: str) -> str:
    return f"id: {attempt}:{offset}\nevent: log\ndata: {json.dumps({'attempt': attempt, 'text': text, 'offset': offset})}\n\n"


def reply_with_job(**changes: object) -> httpx2.Response:
    return httpx2.Response(200, json=make_job_json(**changes))


TRAINING = write_event(make_event_json(1, type="status", status="training", attempt=1, reason=""))
COMPLETED = write_event(make_event_json(60, type="status", status="completed", attempt=1, reason="completed"))
JOB = reply_with_job()


# --- watch in a pipe -------------------------------------------------------------------------------------------------


def test_watch_prints_steps_and_ends_with_a_summary() -> None:
    stream = make_stream(TRAINING, write_progress(1, loss=2.5, remaining_s=80.0), COMPLETED)
    done, _ = run_command("watch", JOB_ID, replies=[JOB, JOB, stream, reply_with_job(status="completed")])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines() == [
        "training",
        "step 1/80, epoch 0.10/8, loss 2.500, about 1 min left",
        "completed",
        f"{JOB_ID}  completed  mine",
    ]


def test_watch_fails_unless_the_job_completes() -> None:
    done, _ = run_command("watch", JOB_ID, replies=[JOB, JOB, make_stream(TRAINING), reply_with_job(status="failed")])
    assert done.exit_code == 1


def test_watch_as_json_prints_a_document_per_event() -> None:
    stream = make_stream(TRAINING, write_progress(1), COMPLETED)
    done, _ = run_command("watch", JOB_ID, "--json", replies=[JOB, stream, reply_with_job(status="completed")])
    documents = [json.loads(line) for line in done.output.splitlines()]
    assert [document["event"]["type"] for document in documents] == ["status", "progress", "status"]
    assert documents[1]["event"]["progress"]["step"] == 1


def test_watch_explains_a_pause_and_how_to_continue() -> None:
    paused = reply_with_job(status="paused")
    pause = write_event(make_event_json(2, type="status", status="paused", attempt=1, reason="requested"))
    replies: list[FakeReply] = [JOB, JOB, make_stream(TRAINING, pause, COMPLETED), paused, reply_with_job(status="completed")]
    done, _ = run_command("watch", JOB_ID, replies=replies)
    assert f"waiting for `tunesmith resume {JOB_ID}`; Ctrl-C stops watching, not the job" in done.output


def test_text_of_a_model_cannot_control_the_terminal() -> None:
    sample = {"prompt": "\x1b]0;owned\x07", "text": "abc\u202edef\n  \x9b2J"}
    event = write_event(make_event_json(2, type="samples", when="during", step=1, samples=[sample]))
    done, _ = run_command("watch", JOB_ID, replies=[JOB, JOB, make_stream(event), reply_with_job(status="completed")])
    assert "    ␛]0;owned␇\n" in done.output
    assert "    abc\ufffddef\n      \ufffd2J\n" in done.output


def test_progress_has_no_id_to_continue_after() -> None:
    service = FakeService(JOB, make_stream(TRAINING, write_progress(1), end=""), JOB, make_stream(COMPLETED))
    events = list(service.client.stream_events(JOB_ID))
    assert [event["event"]["type"] for event in events] == ["status", "progress", "status"]
    assert [request.headers["Last-Event-ID"] for request in service.requests if request.url.path.endswith("/events")] == ["0", "2"]


def test_what_does_not_stream_events_is_an_error() -> None:
    page = httpx2.Response(200, text="<html>log in</html>", headers={"Content-Type": "text/html"})
    service = FakeService(JOB, page)
    with pytest.raises(ApiError, match="does not stream events"):
        list(service.client.stream_events(JOB_ID))


# --- logs ------------------------------------------------------------------------------------------------------------


def make_log_page(text: str) -> httpx2.Response:
    return httpx2.Response(200, json={"attempt": 2, "text": text, "next_offset": 20})


def test_logs_print_the_last_lines() -> None:
    done, [first, second] = run_command("logs", JOB_ID, "--tail", "2", replies=[make_log_page("a\nb\n"), make_log_page("")])
    assert done.output == "a\nb\n"
    assert dict(first.url.params) == {"tail": "2"}
    assert dict(second.url.params) == {"attempt": "2", "offset": "20"}


def test_logs_as_json_have_a_document_per_part() -> None:
    done, _ = run_command("logs", JOB_ID, "--json", replies=[make_log_page("a\n"), make_log_page("")])
    assert [json.loads(line) for line in done.output.splitlines()] == [{"attempt": 2, "text": "a\n", "next_offset": 20}]


def test_followed_log_continues_where_a_connection_ended() -> None:
    first = make_stream(write_log(1, 2, "a\n"), write_log(1, 4, "b\n"), end="")
    last = make_stream(write_log(2, 2, "c\n"))
    done, requests = run_command("logs", JOB_ID, "-f", "--tail", "5", replies=[first, JOB, CONNECTION_LOST, JOB, last])
    assert done.output == "a\nb\nc\n"
    streams = [request for request in requests if request.url.path.endswith("/logs")]
    assert [request.headers.get("Last-Event-ID") for request in streams] == [None, "1:4", "1:4"]
    assert dict(streams[0].url.params) == {"follow": "true", "tail": "5"}


# --- watch in a terminal ---------------------------------------------------------------------------------------------


class LoopbackService:
    """A service with one job, whose event stream sends the given text and stays open until `finish` is called."""

    def __init__(self, text: str) -> None:
        self.status = "training"
        self.finished = threading.Event()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                if not self.path.endswith("/events"):
                    body = json.dumps(make_job_json(status=service.status)).encode()
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                    return
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                self.wfile.write(text.encode())
                self.wfile.flush()
                service.finished.wait(60)
                self.wfile.write((COMPLETED + DONE).encode())

            def handle(self) -> None:
                try:
                    super().handle()
                except ConnectionError:  # the command was interrupted
                    self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def finish(self) -> None:
        self.status = "completed"
        self.finished.set()


@contextmanager
def run_service(text: str) -> Iterator[LoopbackService]:
    service = LoopbackService(text)
    thread = threading.Thread(target=service.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield service
    finally:
        service.finished.set()
        service.server.shutdown()
        service.server.server_close()
        thread.join()


class TerminalSession:
    """A command in a pseudo-terminal, and what its screen shows."""

    def __init__(self, words: list[str], environment: dict[str, str], columns: int = 80, rows: int = 30) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=1000)
        self._stream = pyte.ByteStream(self.screen)
        self._terminal, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", *words],
            stdin=child,
            stdout=child,
            stderr=child,
            env=environment,
            cwd=SOURCE,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it
        )
        os.close(child)

    def read(self) -> str:
        """What the screen shows after reading what has come since."""
        while select.select([self._terminal], [], [], 0)[0]:
            try:
                output = os.read(self._terminal, 1 << 16)
            except OSError:  # the command has closed its terminal
                break
            self._stream.feed(output)
        return "\n".join(line.rstrip() for line in self.screen.display)

    def type(self, keys: bytes) -> None:
        os.write(self._terminal, keys)

    def wait(self) -> int:
        """The exit code, once the command has ended. A full terminal would stop it, so that it is read meanwhile."""
        wait_until(lambda: self.read() and self.process.poll() is not None)
        self.read()
        return self.process.wait()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)


@contextmanager
def run_in_terminal(service: LoopbackService, *words: str, home: Path) -> Iterator[TerminalSession]:
    environment = {**os.environ, "TERM": "xterm-256color", "TUNESMITH_URL": service.url, "TUNESMITH_HOME": str(home), "LANG": "C.UTF-8"}
    session = TerminalSession([*words], environment)
    try:
        yield session
    finally:
        session.close()


def shows(session: TerminalSession, text: str) -> Callable[[], bool]:
    return lambda: text in session.read()


STEPS = "".join(write_progress(step, loss=3.0 / step, remaining_s=120.0) for step in range(1, 41))


def test_terminal_shows_a_panel_and_at_the_end_a_summary(tmp_path: Path) -> None:
    with run_service(TRAINING + STEPS) as service, run_in_terminal(service, "watch", JOB_ID, home=tmp_path) as session:
        wait_until(shows(session, "step 40/80"), description=session.read)
        panel = session.read()
        assert "about 2 min left" in panel
        assert "training loss by step" in panel
        service.finish()
        assert session.wait() == 0
        screen = session.read()
    assert "step 40/80" not in screen  # the panel is gone, its chart stays
    assert "training loss by step" in screen
    assert f"{JOB_ID}  completed  mine" in screen


def test_interrupted_watch_says_that_the_job_goes_on(tmp_path: Path) -> None:
    with run_service(TRAINING + STEPS) as service, run_in_terminal(service, "watch", JOB_ID, home=tmp_path) as session:
        wait_until(shows(session, "step 40/80"), description=session.read)
        session.type(b"\x03")
        assert session.wait() == 130
        screen = session.read()
    assert "the job goes on; tunesmith watch …89ab | pause …89ab | cancel …89ab" in screen
    assert "Traceback" not in screen
