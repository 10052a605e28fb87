"""Traces and metrics for a collector, by OTLP over HTTP. Imported only if the deployment names one: the SDK takes memory and start time.

FastAPI makes the spans and the metrics of requests; this module gives them a destination, and adds the number of jobs.
"""

from collections import Counter
from collections.abc import Iterable

from fastapi.telemetry import TelemetryConfig
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from schema.version import VERSION
from service.core.errors import Unavailable
from service.core.ports import JobStore
from service.tracing import QUIET_PATHS, SECRET_PATH_PREFIX

MAX_COUNTED_JOBS = 1000  # of the queued and of the active ones: counting reads them
EXPORT_TIMEOUT_S = 2.0  # of one message; a collector that does not answer must not delay the end of the service


class Telemetry:
    """The providers of traces and metrics. Nothing runs before `start`.

    OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES and OTEL_EXPORTER_OTLP_HEADERS have their usual meaning.
    """

    def __init__(self, endpoint: str) -> None:
        resource = Resource.create({"service.version": VERSION} | ({} if _names_service() else {"service.name": "tunesmith"}))
        self._endpoint = endpoint.rstrip("/")
        self._traces = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._metrics = MeterProvider(resource=resource, shutdown_on_exit=False)
        self._reader: PeriodicExportingMetricReader | None = None
        self._traces.add_span_processor(_Redaction())

    @property
    def config(self) -> TelemetryConfig:
        """What FastAPI needs to know. Health checks are left out."""
        return TelemetryConfig(
            tracer_provider=self._traces,
            meter_provider=self._metrics,
            logs=False,
            operation_spans=False,
            auto_configure=False,
            exclude=lambda scope: scope.get("path") in QUIET_PATHS,
        )

    def start(self, store: JobStore) -> None:
        """Begin to send: spans every few seconds, metrics every minute."""
        spans = OTLPSpanExporter(f"{self._endpoint}/v1/traces", timeout=EXPORT_TIMEOUT_S)
        self._traces.add_span_processor(BatchSpanProcessor(spans))
        self._reader = PeriodicExportingMetricReader(OTLPMetricExporter(f"{self._endpoint}/v1/metrics", timeout=EXPORT_TIMEOUT_S))
        self._metrics.add_metric_reader(self._reader)

        def observe_jobs(_options: CallbackOptions) -> Iterable[Observation]:
            return _count_jobs(store)

        meter = self._metrics.get_meter("tunesmith", VERSION)
        meter.create_observable_gauge("tunesmith.jobs", [observe_jobs], "{job}", "Jobs that are not final, by status and launcher.")

    def stop(self) -> None:
        """Send what is left, and stop."""
        self._traces.shutdown()
        if self._reader is not None:
            # The provider's own shutdown leaves out readers that were added later.
            self._reader.shutdown(EXPORT_TIMEOUT_S * 1000)  # pyright: ignore[reportUnknownMemberType]  # its **kwargs have no type


class _Redaction(SpanProcessor):
    """Removes from a span what nobody should find at the collector: queries, and signed links."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:  # noqa: ARG002
        attributes = span.attributes or {}
        if "url.query" in attributes:
            span.set_attribute("url.query", "REDACTED")
        if str(attributes.get("url.path", "")).startswith(SECRET_PATH_PREFIX):
            span.set_attribute("url.path", f"{SECRET_PATH_PREFIX}REDACTED")


def _names_service() -> bool:
    return not str(Resource.create().attributes.get("service.name", "")).startswith("unknown_service")


def _count_jobs(store: JobStore) -> Iterable[Observation]:
    try:
        jobs = [*store.list_queued_jobs(None, MAX_COUNTED_JOBS), *store.list_active_jobs(None, MAX_COUNTED_JOBS)]
    except Unavailable:  # the next minute counts again
        return
    counts = Counter((job.status.value, launcher) for job in jobs for launcher in job.launchers[:1])
    for (status, launcher), count in counts.items():
        yield Observation(count, {"status": status, "launcher": launcher})
