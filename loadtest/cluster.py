"""Brings a suite up for a benchmark, through the command line as a user would, and takes it down again."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunningCluster:
    """A suite that is up.

    Attributes:
        url: Of the gateway.
        startup_s: From the command to readiness.
    """

    url: str
    run_dir: Path
    startup_s: float

    def status(self) -> dict[str, object]:
        """What `tandem status --json` says."""
        result = subprocess.run(
            [*_tandem(), "status", "--json", "--run-dir", str(self.run_dir)], capture_output=True, text=True, check=True
        )
        status: dict[str, object] = json.loads(result.stdout)
        return status


def _tandem() -> list[str]:
    return [sys.executable, "-m", "services.cli"]


@contextlib.contextmanager
def cluster(
    *, prefill: int, decode: int, options: tuple[str, ...] = (), fetches_all: bool = False, ucx_tls: str = ""
) -> Iterator[RunningCluster]:
    """`tandem up --detach` on a free port, in a run directory of its own; `tandem down` at the end.

    Args:
        prefill: Workers.
        decode: Workers.
        options: More of `tandem up`.
        fetches_all: Every prompt is computed at a prefill worker, whatever that costs here.
        ucx_tls: As TANDEM_TRANSFER_UCX_TLS; "" = as it is set, or the default.
    """
    chosen = {"TANDEM_GATEWAY_PLACEMENT": "remote" if fetches_all else "", "TANDEM_TRANSFER_UCX_TLS": ucx_tls}
    environment = {**os.environ, **{name: value for name, value in chosen.items() if value}}
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        started_s = time.monotonic()
        arguments = ["up", "--detach", "--port", "0", "--run-dir", folder]
        arguments += ["--prefill", str(prefill), "--decode", str(decode), *options]
        subprocess.run([*_tandem(), *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)
        try:
            state = json.loads((Path(folder) / "state.json").read_text())
            yield RunningCluster(state["url"], Path(folder), time.monotonic() - started_s)
        finally:
            subprocess.run([*_tandem(), "down", "--run-dir", folder], check=True, stdout=subprocess.DEVNULL)
