"""Traces and metrics, as a collector on this machine receives them."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.unit.api_harness import ROWS, run_test_service, submit_job, upload

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
Attributes = dict[str, str]


class Collector:
    """Keeps what is sent to it, by path."""

    def __init__(self) -> None:
        received: list[tuple[str, bytes]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                received.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Print nothing."""

        self.received = received
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def list_spans(self) -> list[tuple[str, str, Attributes]]:
        """The name, the trace id and the attributes of each span."""
        requests = [ExportTraceServiceRequest.FromString(body) for path, body in self.received if path == "/v1/traces"]
        spans = [span for request in requests for part in request.resource_spans for scope in part.scope_spans for span in scope.spans]
        return [(span.name, span.trace_id.hex(), {pair.key: str(pair.value) for pair in span.attributes}) for span in spans]

    def list_metrics(self) -> dict[str, list[Attributes]]:
        """The attributes of the points of each metric."""
        requests = [ExportMetricsServiceRequest.FromString(body) for path, body in self.received if path == "/v1/metrics"]
        metrics = [
            metric for request in requests for part in request.resource_metrics for scope in part.scope_metrics for metric in scope.metrics
        ]
        return {
            metric.name: [
                {pair.key: pair.value.string_value for pair in point.attributes}
                for point in (*metric.gauge.data_points, *metric.histogram.data_points, *metric.sum.data_points)
            ]
            for metric in metrics
        }


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


def test_collector_receives_requests_and_jobs_without_secrets(
    tmp_path: Path, collector: Collector, capsys: pytest.CaptureFixture[str]
) -> None:
    with run_test_service(tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, reconcile_interval_s=0) as client:
        submit_job(client, upload(client, ROWS).json()["processed_dataset_id"])
        client.get("/jobs?cursor=secret-query", headers={"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"})
        client.get("/files/secret-link")
        client.get("/health")
    spans = collector.list_spans()
    assert {"POST /datasets", "POST /train", "GET /jobs", "GET /files/{token}"} == {name for name, _, _ in spans}
    assert "secret" not in str(spans)
    assert [trace_id for name, trace_id, _ in spans if name == "GET /jobs"] == [TRACE_ID]
    logged = capsys.readouterr().err
    assert all(f"trace_id={trace_id}" in logged for _, trace_id, _ in spans)
    metrics = collector.list_metrics()
    assert {"http.server.request.duration", "tunesmith.jobs"} <= set(metrics)
    assert metrics["tunesmith.jobs"] == [{"status": "queued", "launcher": "local"}]
    assert all(b"service.name\x12\x0b\n\ttunesmith" in body for _, body in collector.received)


def test_service_runs_and_stops_without_its_collector(tmp_path: Path) -> None:
    with run_test_service(tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9") as client:
        assert client.get("/jobs").status_code == 200
