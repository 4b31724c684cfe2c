"""Where a cluster keeps its sockets, logs and state, and who may use it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shared.errors import ConfigurationError

# The longest name put into it is "prefill-NNN.transfer.sock"; sun_path holds 108 bytes with its terminating zero.
_SOCKET_NAME_BYTES = len("/prefill-999-0123abcd.transfer.sock")
_MAX_BYTES = 107 - _SOCKET_NAME_BYTES


def default_run_dir() -> Path:
    """`~/.tandem/run`; else, without a usable home or with too long a one, `$XDG_RUNTIME_DIR/tandem` or in /tmp.

    The home comes first because a detached cluster outlives a logout and $XDG_RUNTIME_DIR does not, and because logs
    belong on a disk.
    """
    candidates = []
    with contextlib.suppress(RuntimeError):
        candidates.append(Path.home() / ".tandem" / "run")
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        candidates.append(Path(runtime) / "tandem")
    for candidate in candidates:
        if _fits(candidate) and _is_writable(candidate):
            return candidate
    return Path(tempfile.gettempdir()) / f"tandem-{os.getuid()}"


def prepare_run_dir(run_dir: Path) -> Path:
    """Makes the directory, for this user alone, and returns its absolute path.

    Raises:
        ConfigurationError: It cannot be made, is somebody else's, or is too long for the Unix sockets in it.
    """
    absolute = run_dir.expanduser().absolute()
    if not _fits(absolute):
        raise ConfigurationError(
            f"run directory of {len(os.fsencode(absolute))} bytes exceeds {_MAX_BYTES}, the most that leaves room for "
            f"the names of Unix sockets: {absolute}; choose a shorter one with --run-dir"
        )
    try:
        absolute.mkdir(parents=True, exist_ok=True, mode=0o700)
        (absolute / "logs").mkdir(exist_ok=True)
        owner = absolute.stat().st_uid
    except OSError as exc:
        raise ConfigurationError(f"run directory {absolute}: {exc.strerror or exc}") from exc
    if owner != os.getuid():
        raise ConfigurationError(f"run directory {absolute} belongs to another user; choose one with --run-dir")
    return absolute


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Holds the directory for one supervisor. The lock goes with the process, however that ends.

    Raises:
        ConfigurationError: Another supervisor has it.
    """
    with (run_dir / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"a cluster already runs in {run_dir}: `tandem down` stops it, or give another --run-dir"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def supervisor_pid(run_dir: Path) -> int | None:
    """Of the supervisor that lives there; None without one."""
    try:
        with (run_dir / "lock").open("r") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(lock.read() or 0) or None
    except FileNotFoundError:
        pass
    return None


def rotate_logs(log_dir: Path) -> None:
    """Keeps the previous cluster's logs once, under `.1`."""
    for log in log_dir.glob("*.log"):
        if not log.name.startswith("supervisor"):
            log.replace(log.with_name(log.name + ".1"))


def _fits(path: Path) -> bool:
    return len(os.fsencode(path.absolute())) <= _MAX_BYTES


def _is_writable(path: Path) -> bool:
    nearest = path
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    return os.access(nearest, os.W_OK | os.X_OK)
