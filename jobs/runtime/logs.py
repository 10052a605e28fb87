"""The attempt's log lines: a constant message followed by fields."""

import logging
import sys
import time

_STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


def configure_logging() -> None:
    """Write our own messages to stdout from INFO on, those of libraries from WARNING on."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_LineFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("jobs").setLevel(logging.INFO)


class _LineFormatter(logging.Formatter):
    """`2026-11-21T04:05:06Z INFO attempt claimed attempt=1`."""

    def format(self, record: logging.LogRecord) -> str:
        facts = {name: value for name, value in vars(record).items() if name not in _STANDARD_ATTRIBUTES}
        fields = "".join(f" {name}={_format_value(value)}" for name, value in facts.items())
        line = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {record.levelname} {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _format_value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    text = str(value)
    return repr(text) if any(character.isspace() for character in text) or not text else text
