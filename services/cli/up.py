"""`tandem up`: in the foreground, or as a supervisor of its own that `tandem down` stops."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time

import msgspec
from rich.console import Console
from rich.markup import escape

from services.cli.cluster import ClusterSpec
from services.cli.display import Display, print_ready
from services.cli.process import last_lines, python_module, with_our_packages
from services.cli.running import run_cluster
from services.cli.state_file import ClusterState, read_state
from services.cli.supervisor import StartFailed
from shared.errors import ConfigurationError

_POLL_S = 0.1


def up_in_foreground(spec: ClusterSpec, console: Console) -> None:
    """Runs the cluster until Ctrl-C.

    Raises:
        ConfigurationError: It cannot start.
    """
    has_announced = False
    with Display(console) as display:

        def observe(state: ClusterState) -> None:
            nonlocal has_announced
            if state.phase == "stopping":
                display.end_live()
            display.show(state)
            if state.phase == "ready" and not has_announced:
                has_announced = True
                display.end_live()
                print_ready(console, state, is_detached=False)

        asyncio.run(run_cluster(spec, observe))
    if has_announced:
        console.print("stopped: no process is left", highlight=False)


def up_detached(spec: ClusterSpec, console: Console) -> None:
    """Starts a supervisor in a session of its own and returns when the cluster is ready.

    Raises:
        ConfigurationError: It did not come up; its report was printed.
    """
    errors_path = spec.log_dir / "supervisor-errors.log"
    with (spec.log_dir / "supervisor.log").open("wb") as log, errors_path.open("wb") as errors:
        supervisor = subprocess.Popen(
            [*python_module("services.cli.detached"), msgspec.json.encode(spec, enc_hook=str).decode()],
            env=with_our_packages(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=errors,
            start_new_session=True,
        )
    try:
        state = _follow(supervisor, spec, console)
    except KeyboardInterrupt:
        supervisor.send_signal(signal.SIGTERM)
        supervisor.wait()
        raise
    if state is None:
        console.print("\n".join(last_lines(errors_path, 40)), markup=False, highlight=False, soft_wrap=True)
        raise ConfigurationError("the cluster did not start; everything was stopped again")
    print_ready(console, state, is_detached=True)


def _follow(supervisor: subprocess.Popen[bytes], spec: ClusterSpec, console: Console) -> ClusterState | None:
    """Shows progress until the cluster is ready, or None when its supervisor ended."""
    with Display(console) as display:
        while supervisor.poll() is None:
            state = read_state(spec.run_dir)
            if state is not None and state.supervisor_pid == supervisor.pid:
                display.show(state)
                if state.phase == "ready":
                    return state
            time.sleep(_POLL_S)
    return None


def report_failure(error: ConfigurationError, console: Console) -> None:
    """Says what went wrong, with the end of the log of the process at fault."""
    if isinstance(error, StartFailed) and error.log_lines:
        console.print(f"\nthe end of {error.log_path}:", style="dim", soft_wrap=True, highlight=False)
        console.print("\n".join(f"  {line}" for line in error.log_lines), markup=False, highlight=False, soft_wrap=True)
    console.print(f"[bold red]error:[/] {escape(error.message)}", soft_wrap=True, highlight=False)


def run_detached(spec_json: str) -> None:
    """The supervisor's side of `up_detached`."""
    spec = msgspec.json.decode(spec_json, type=ClusterSpec, dec_hook=lambda cls, raw: cls(raw))  # paths
    try:
        with Display(Console(width=200)) as display:
            asyncio.run(run_cluster(spec, display.show))
    except ConfigurationError as exc:
        report_failure(exc, Console(stderr=True, width=200))
        sys.exit(1)
