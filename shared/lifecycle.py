"""The life of a service process: event loop, signals, exit code.

start --> main(stop) --> first SIGTERM or SIGINT sets `stop` --> main drains and returns --> exit 0
              |                                                        |
              |-- ConfigurationError: one line, exit 2                 '-- second SIGINT: cancelled, exit 130
              '-- any other exception: logged with traceback, exit 1
"""

from __future__ import annotations

import asyncio
import faulthandler
import itertools
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import structlog
import uvloop

from shared.errors import ConfigurationError
from shared.log import configure_logging

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_CONFIGURATION = 2
EXIT_INTERRUPTED = 130

_log = structlog.get_logger(__name__)


def run_service(main: Callable[[asyncio.Event], Awaitable[None]], service: str) -> NoReturn:
    """Runs a service to its end and exits the process.

    Logs go to stderr with the defaults until `main` calls `configure_logging` itself.

    Args:
        main: Reads the settings, serves until the event is set, drains, returns. The event is set by the first SIGTERM
            or SIGINT, whenever it comes. A second SIGTERM changes nothing (a supervisor may repeat itself); a second
            SIGINT is a person who does not want to wait, and cancels `main`.
        service: Name for the log and for error lines.

    Raises:
        SystemExit: Always.
    """
    configure_logging(service)
    faulthandler.enable()  # a crash in native code leaves the Python stacks on stderr
    code = _exit_code(main, service)
    sys.stdout.flush()
    sys.stderr.flush()
    if code != EXIT_OK:
        # A thread that does not end must not keep a failed process around: its supervisor waits for the exit.
        os._exit(code)
    sys.exit(code)


def _exit_code(main: Callable[[asyncio.Event], Awaitable[None]], service: str) -> int:
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_supervise(main))
    except (asyncio.CancelledError, KeyboardInterrupt):
        _log.warning("service_interrupted")
        return EXIT_INTERRUPTED
    except Exception as exc:
        configuration_error = _find_configuration_error(exc)
        if configuration_error is None:
            _log.exception("service_failed")
            return EXIT_FAILED
        sys.stderr.write(f"{service}: {configuration_error.message}\n")
        return EXIT_CONFIGURATION
    return EXIT_OK


async def _supervise(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_log_unhandled)
    stop = asyncio.Event()
    task = asyncio.current_task()
    assert task is not None

    interrupts = itertools.count(1)

    def on_signal(number: signal.Signals) -> None:
        if not stop.is_set():
            _log.info("stopping", signal=number.name)
            stop.set()
        if number == signal.SIGINT and next(interrupts) > 1:
            task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    await main(stop)


def _find_configuration_error(exc: BaseException) -> ConfigurationError | None:
    """Task groups wrap what their tasks raise."""
    if isinstance(exc, ConfigurationError):
        return exc
    if isinstance(exc, BaseExceptionGroup):
        return next(filter(None, map(_find_configuration_error, exc.exceptions)), None)
    return None


def _log_unhandled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Of tasks and callbacks that nobody awaits."""
    _log.error("unhandled_error", reason=context.get("message", ""), exc_info=context.get("exception"))
