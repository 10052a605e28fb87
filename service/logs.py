"""Log lines: a constant message with fields; JSON for a log collector, text for a person.

A line that is written while a request is handled, in any thread, has the request's id and the id of its trace.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal

from service.tracing import current_trace

# Attributes of every LogRecord. All others were given as `extra`.
STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


def configure_logging(style: Literal["text", "json"]) -> None:
    """Send every log line of this process to stderr, in one style."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if style == "json" else _TextFormatter())
    handler.addFilter(_add_trace)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("uvicorn.access").disabled = True  # service/api/middleware/request_context.py logs requests, without their query


def _add_trace(record: logging.LogRecord) -> bool:
    """A filter that keeps every record: filters run in the thread that logs."""
    trace = current_trace()
    if trace is not None:
        record.request_id, record.trace_id = trace.request_id, trace.trace_id
    return True


def _extra_fields(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in STANDARD_ATTRIBUTES}


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).strftime("%H:%M:%S")
        fields = " ".join(f"{name}={value}" for name, value in _extra_fields(record).items())
        line = f"{at} {record.levelname.lower():7} {record.getMessage()} {fields}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _JsonFormatter(logging.Formatter):
    """Fields as Cloud Logging names them: severity, message, time."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "severity": record.levelname,
            "message": record.getMessage(),
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "logger": record.name,
            **_extra_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
