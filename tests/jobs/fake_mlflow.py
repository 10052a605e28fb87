"""A fake MLflow tracking server: the part of its REST API that a run needs, with a bearer token."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Self
from urllib.parse import parse_qs, urlsplit


class FakeMlflow:
    """The server in a thread; a context manager. `artifact_root` is the artifact URI that it reports."""

    def __init__(self, token: str = "", artifact_root: str = "mlflow-artifacts:/1") -> None:
        self.token, self.artifact_root = token, artifact_root
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.artifacts: dict[str, bytes] = {}
        self.failures_left = 0  # the number of requests that get a 503 first
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """The steps and values of one metric."""
        return [(int(point["step"]), point["value"]) for point in self.runs[run_id]["metrics"] if point["key"] == metric]

    def answer(self, endpoint: str, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and body of the response; `endpoint` is the end of the path."""
        match endpoint:
            case "experiments/get-by-name":
                name = request["experiment_name"]
                if name not in self.experiments:
                    return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": f"no experiment {name}"}
                return 200, {"experiment": {"experiment_id": self.experiments[name], "name": name}}
            case "experiments/create":
                self.experiments[request["name"]] = str(len(self.experiments) + 1)
                return 200, {"experiment_id": self.experiments[request["name"]]}
            case "runs/create":
                run_id = f"run{len(self.runs) + 1}"
                tags = {tag["key"]: tag["value"] for tag in request["tags"]}
                self.runs[run_id] = {"name": request["run_name"], "tags": tags, "params": {}, "metrics": [], "status": "RUNNING"}
                return 200, {"run": self._run_info(run_id)}
            case "runs/search":
                tag_value = request["filter"].rpartition(" = ")[2].strip("'")
                return 200, {"runs": [self._run_info(run_id) for run_id, run in self.runs.items() if tag_value in run["tags"].values()]}
            case "runs/update":
                self.runs[request["run_id"]]["status"] = request["status"]
                return 200, {"run_info": self._run_info(request["run_id"])["info"]}
            case "runs/set-tag":
                self.runs[request["run_id"]]["tags"][request["key"]] = request["value"]
                return 200, {}
            case "runs/log-batch":
                run = self.runs[request["run_id"]]
                run["metrics"] += request.get("metrics", [])
                run["params"] |= {param["key"]: param["value"] for param in request.get("params", [])}
                return (400, {"error_code": "INVALID_PARAMETER_VALUE"}) if len(request.get("params", [])) > 100 else (200, {})
        return 404, {"error_code": "ENDPOINT_NOT_FOUND", "message": endpoint}

    def _run_info(self, run_id: str) -> dict[str, Any]:
        run = self.runs[run_id]
        info = {"run_id": run_id, "run_uuid": run_id, "experiment_id": "1", "status": run["status"], "lifecycle_stage": "active"}
        info |= {"start_time": 1, "run_name": run["name"], "artifact_uri": f"{self.artifact_root}/{run_id}/artifacts"}
        return {"info": info, "data": {"tags": [{"key": key, "value": value} for key, value in run["tags"].items()]}}


class _Handler(BaseHTTPRequestHandler):
    owner: ClassVar[FakeMlflow]

    def do_POST(self) -> None:
        url, owner = urlsplit(self.path), self.owner
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if owner.failures_left > 0:
            owner.failures_left -= 1
            self._send(503, {})
        elif owner.token and self.headers["Authorization"] != f"Bearer {owner.token}":
            self._send(401, {"error_code": "UNAUTHENTICATED", "message": "the token is not valid"})
        elif self.command == "PUT":
            owner.artifacts[url.path.removeprefix("/api/2.0/mlflow-artifacts/artifacts/")] = body
            self._send(200, {})
        else:
            request = json.loads(body or b"{}") | {name: values[-1] for name, values in parse_qs(url.query).items()}
            self._send(*owner.answer(url.path.removeprefix("/api/2.0/mlflow/"), request))

    do_GET = do_PUT = do_POST  # noqa: N815  # the names that http.server calls

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass
