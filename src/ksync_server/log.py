"""What is written to standard error: one line per request or event, as JSON or as text.

Lines never hold a secret, a path, a query or content: `fields` is the whole list of what may be said about a
request. A line is one write, so that the lines of several processes do not mix.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec

from ksync_server import settings as configuration
from ksync_server.errors import ConfigError

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {
    "message",
    "asctime",
    "taskName",
    "color_message",
}


def stamp(at: float) -> str:
    """Unix seconds as RFC 3339 in UTC with milliseconds."""
    return f"{_second(int(at))}.{int(at * 1000) % 1000:03d}Z"


@lru_cache(maxsize=2)
def _second(at: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at))


def line(style: str, fields: Mapping[str, Any]) -> bytes:
    """One line in `json` or `text`; line breaks and blanks inside values are escaped in both."""
    if style == "json":
        try:
            return msgspec.json.encode(fields, enc_hook=str) + b"\n"
        except UnicodeEncodeError:  # half a surrogate pair, e.g. from a file name
            return json.dumps(fields, default=str).encode("ascii") + b"\n"
    head = f"{fields.get('at', '')} {fields.get('level', '')} {_word(fields.get('event', ''), blanks=True)}"
    rest = [f"{key}={_word(value)}" for key, value in fields.items() if key not in ("at", "level", "event")]
    return " ".join([head, *rest]).encode("utf-8", "backslashreplace") + b"\n"


def _word(value: Any, *, blanks: bool = False) -> str:
    text = str(value)
    if text.isprintable() and (blanks or (text and not any(mark in text for mark in ' "='))):
        return text
    return json.dumps(text)


class Formatter(logging.Formatter):
    """Records of `logging`, their extra fields included."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self._shape = style

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, without its end."""
        fields: dict[str, Any] = {
            "at": stamp(record.created),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "source": record.name,
        }
        fields |= {key: value for key, value in record.__dict__.items() if key not in _STANDARD}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return line(self._shape, fields).decode()[:-1]


def configure(settings: configuration.Log) -> None:
    """Send every record of this process to standard error.

    Raises:
        ConfigError: an unknown level or format.
    """
    if settings.level not in _LEVELS:
        raise ConfigError(f"log.level: one of {', '.join(_LEVELS)}")
    if settings.format not in ("json", "text"):
        raise ConfigError("log.format: json or text")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter(settings.format))
    logging.basicConfig(level=_LEVELS[settings.level], handlers=[handler], force=True)
    for noisy in ("uvicorn", "uvicorn.error", "asyncio", "alembic", "sqlalchemy"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, _LEVELS[settings.level]))


class AccessLog:
    """One line per request, several times cheaper than a record of `logging`."""

    __slots__ = ("_descriptor", "_shape", "enabled")

    def __init__(self, settings: configuration.Log, descriptor: int = 2) -> None:
        self._shape = settings.format
        self._descriptor = descriptor
        self.enabled = _LEVELS.get(settings.level, 20) <= logging.INFO

    def write(self, fields: Mapping[str, Any]) -> None:
        """Write a line; a log that cannot be written never fails a request."""
        try:
            os.write(self._descriptor, line(self._shape, fields))
        except OSError:
            self.enabled = False
