"""Log lines: one a request, each with its request id, for people or as JSON for programs. Bodies are never logged."""

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime

request_id: ContextVar[str] = ContextVar("request_id", default="")

_OWN = set(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "request_id"}


class WithRequestId(logging.Filter):
    """Gives every record the id of the request that it was logged under."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Adds `request_id`; keeps every record."""
        record.request_id = request_id.get()
        return True


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, request_id, and the record's `extra` fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": getattr(record, "request_id", ""),
            **{key: value for key, value in record.__dict__.items() if key not in _OWN},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """Time, level, message, and the request id where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        text = super().format(record)
        own = getattr(record, "request_id", "")
        return f"{text} [{own}]" if own else text


def set_up(log_format: str, level: str) -> None:
    """Send every log line of the process to standard error in one format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(WithRequestId())
    handler.setFormatter(
        JsonFormatter() if log_format == "json" else TextFormatter("%(asctime)s %(levelname)s %(message)s")
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("PIL", "asyncio", "multipart", "python_multipart"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
