"""Structured logs of a service: a constant event name plus fields, one line each, to stderr.

Libraries that log through `logging` (grpc, uvicorn, asyncio) come out of the same handler in the same form.
"""

from __future__ import annotations

import logging
import sys
from typing import Literal, TextIO

import msgspec
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

LogFormat = Literal["console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

# Chatty at "info": a line per HTTP request or per reconnect.
_QUIET_LIBRARIES = ("httpx", "httpcore", "huggingface_hub", "uvicorn", "asyncio")


def configure_logging(
    service: str,
    level: LogLevel = "info",
    fmt: LogFormat = "console",
    *,
    stream: TextIO | None = None,
    **fields: str,
) -> None:
    """Sets up logging for this process; a later call replaces an earlier one.

    Args:
        service: Bound to every line as `service`.
        level: Lines below it are dropped, at the cost of one comparison.
        fmt: "console" for people, "json" (one object a line) for machines.
        stream: Default stderr.
        fields: Bound to every line from every thread, e.g. `worker_id`.
    """
    threshold = logging.getLevelNamesMapping()[level.upper()]
    out = sys.stderr if stream is None else stream
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        _Bind({"service": service, **fields}),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.stdlib.LoggerFactory(),
        # Module-level loggers made before this call must follow it; lines are too rare for the cache to matter.
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(fmt, out)],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(threshold)
    for name in _QUIET_LIBRARIES:
        logging.getLogger(name).setLevel(max(threshold, logging.WARNING))


def _renderers(fmt: LogFormat, out: TextIO) -> list[Processor]:
    if fmt == "json":
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(serializer=_to_json)]
    return [structlog.dev.ConsoleRenderer(colors=out.isatty())]


def _to_json(event: object, **_: object) -> str:
    return msgspec.json.encode(event, enc_hook=repr).decode()


class _Bind:
    """Adds the process's own fields; a field of the line itself wins."""

    def __init__(self, fields: dict[str, str]) -> None:
        self._fields = fields

    def __call__(self, logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
        for key, value in self._fields.items():
            event.setdefault(key, value)
        return event
