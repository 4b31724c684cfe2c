"""Ties a process to its supervisor, then becomes it: `python launcher.py SUPERVISOR_PID COMMAND...`.

The kernel sends SIGTERM to this process when its supervisor ends, even by SIGKILL, and the order survives `exec`. It is
asked for here, in the child, because the alternative, Python code between fork and exec (`preexec_fn`), may deadlock in
a process with threads. SIGTERM rather than SIGKILL: the services then drain and remove their shared memory themselves.
Runs with `-I -S` and imports nothing of ours, to cost a few milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def main(arguments: list[str]) -> None:
    """Replaces this process by the command."""
    supervisor_pid, command = int(arguments[0]), arguments[1:]
    if sys.platform == "linux" and ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        sys.exit("launcher: prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != supervisor_pid:
        sys.exit("launcher: the supervisor is gone")  # it ended before the order was in force
    try:
        os.execvp(command[0], command)
    except OSError as exc:
        sys.exit(f"launcher: cannot run {command[0]}: {exc.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
