"""The attempt's log lines: a constant message followed by fields."""

import logging
import sys
import time

_STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


def format_line(level: str, message: str, facts: dict[str, object]) -> str:
    """`2026-11-21T04:05:06Z INFO attempt started attempt=1`."""
    fields = "".join(f" {name}={_format_value(value)}" for name, value in facts.items())
    return f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {level} {message}{fields}"


class _LineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        facts = {name: value for name, value in vars(record).items() if name not in _STANDARD_ATTRIBUTES}
        text = format_line(record.levelname, record.getMessage(), facts)
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def configure_logging() -> None:
    """Write our own messages to stdout from INFO on, those of libraries from WARNING on."""
    out = logging.StreamHandler(sys.stdout)
    out.setFormatter(_LineFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[out], force=True)
    logging.getLogger("jobs").setLevel(logging.INFO)


def _format_value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    text = str(value)
    return repr(text) if any(character.isspace() for character in text) or not text else text
