"""Says what `tandem status --json` says, without a process for every look: tests that wait look often.

A process of its own, because a look is gRPC on an event loop, and one process cannot well have two of those at once:
`python -m tests.e2e.looking` answers every line, a run directory, with one of JSON, until its input ends.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec

from services.cli.status import cluster_status


class Looker:
    """The process, as its user sees it; it ends with its user."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", __name__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._is_free = threading.Lock()

    def look(self, run_dir: Path) -> dict[str, Any]:
        """The cluster in that directory as it is now."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._is_free:
            self._process.stdin.write(f"{run_dir}\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
        assert answer is not None, f"no cluster in {run_dir}"
        return dict(answer)


def looker() -> Looker:
    """One for all suites of the network that the calling thread is in."""
    return _looker_in(os.readlink("/proc/thread-self/ns/net"))


@functools.cache
def _looker_in(network: str) -> Looker:
    return Looker()


def main() -> None:
    """Answers until the input ends."""
    for line in sys.stdin:
        status = asyncio.run(cluster_status(Path(line.rstrip("\n"))))
        print(msgspec.json.encode(status).decode(), flush=True)


if __name__ == "__main__":
    main()
