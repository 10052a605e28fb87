"""A server with OpenAI's API over real HTTP, for the real client; a test sets its answers."""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

# Maps a request to the content of the completion, or to an HTTP error status.
Answer = Callable[[dict[str, Any]], str | int]


def answer_score_ten(_: dict[str, Any]) -> str | int:
    return '{"score": 10}'


@dataclass
class FakeOpenAI:
    """Answers POST /v1/chat/completions and /v1/embeddings. A test can change every field at any time."""

    answer: Answer = answer_score_ten
    key: str | None = None  # the only accepted API key; None accepts every key
    embed: Callable[[str], list[float]] = lambda text: [float(text.count(letter)) for letter in "abcdefgh"]
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    max_concurrent: int = 0  # the largest number of requests in progress at the same time
    _active: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Self:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, answer = fake.respond(self.path, self.headers["Authorization"].removeprefix("Bearer "), body)
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("retry-after-ms", "1")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                """Ignore clients that disconnect before the response."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def respond(self, path: str, key: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with self._lock:
            self.requests.append(body)
            self.keys.append(key)
            self._active += 1
            self.max_concurrent = max(self.max_concurrent, self._active)
        try:
            if self.key is not None and key != self.key:
                return 401, {"error": {"message": f"the key {key} is wrong"}}
            return self._embeddings(body) if path.endswith("/embeddings") else self._chat(body)
        finally:
            with self._lock:
                self._active -= 1

    def _chat(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        answer = self.answer(body)
        if isinstance(answer, int):
            return answer, {"error": {"message": f"no: {body['messages'][-1]['content']}"}}
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}
        return 200, {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice]}

    def _embeddings(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        data = [{"object": "embedding", "index": n, "embedding": self.embed(text)} for n, text in enumerate(body["input"])]
        return 200, {"object": "list", "model": body["model"], "data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}}


def get_judge_prompt(body: dict[str, Any]) -> str:
    """The prompt that was sent to the judge."""
    return str(body["messages"][-1]["content"])
