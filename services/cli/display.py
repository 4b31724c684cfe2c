"""How `tandem up` shows what it does: a live table on a terminal, a line per change elsewhere."""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from services.cli.run_directory import default_run_dir
from services.cli.state_file import ClusterState, ProcessEntry

_STYLES = {"ready": "green", "failed": "bold red", "restarting": "yellow", "stopped": "dim", "waiting": "dim"}


@dataclass(slots=True)
class _Seen:
    """What was last shown of a process."""

    state: str
    detail: str
    since_s: float
    took_s: float = 0.0


class Display:
    """Follows one cluster; feed it states. A context manager, because a terminal must be given back."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._seen: dict[str, _Seen] = {}
        self._entries: list[ProcessEntry] = []
        self._live = Live(get_renderable=self._table, console=console, refresh_per_second=8, transient=False)
        self._is_live = False

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live.start()
            self._is_live = True
        return self

    def __exit__(self, *_: object) -> None:
        self.end_live()

    def end_live(self) -> None:
        """Leaves the table as it stands; from here on changes are lines."""
        if self._is_live:
            self._is_live = False
            self._live.stop()

    def adopt(self, state: ClusterState) -> None:
        """Takes a state for known: only what changes from here on is shown."""
        self._entries = state.processes
        now_s = time.monotonic()
        self._seen = {p.name: _Seen(p.state, p.detail, now_s) for p in state.processes}

    def show(self, state: ClusterState) -> None:
        """Takes notice of a state."""
        self._entries = state.processes
        for process in state.processes:
            seen = self._seen.setdefault(process.name, _Seen("", "", time.monotonic()))
            if seen.state != process.state:
                self._moved(process, seen)
            seen.detail = process.detail

    def _moved(self, process: ProcessEntry, seen: _Seen) -> None:
        now_s = time.monotonic()
        if process.state == "starting":
            seen.since_s = now_s
        seen.state, seen.took_s = process.state, now_s - seen.since_s
        if self._is_live or process.state == "waiting":
            return
        took = f" after {seen.took_s:.1f} s" if process.state == "ready" else ""
        detail = f": {process.detail}" if process.detail else ""
        style = _STYLES.get(process.state, "default")
        self._console.print(f"  {process.name:<20} [{style}]{process.state}[/]{took}{escape(detail)}", highlight=False)

    def _table(self) -> Table:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for process in self._entries:
            seen = self._seen[process.name]
            is_busy = process.state in ("starting", "restarting", "stopping")
            elapsed_s = time.monotonic() - seen.since_s if is_busy else seen.took_s
            style = _STYLES.get(process.state, "cyan")
            table.add_row(
                Spinner("dots") if is_busy else Text("●" if process.state == "ready" else "○", style=style),
                process.name,
                Text(process.state, style=style),
                Text(f"{elapsed_s:5.1f} s" if elapsed_s else ""),
                Text(process.detail, style="dim"),
            )
        return table


def curl_line(url: str, model: str) -> str:
    """A request to paste into a shell."""
    body = {"model": model, "messages": [{"role": "user", "content": "What does json.dumps do?"}], "stream": True}
    return f"curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'"


def print_ready(console: Console, state: ClusterState, *, is_detached: bool) -> None:
    """The last lines of a successful start."""
    tandem, run_dir = _own_command(), Path(state.run_dir)
    option = "" if run_dir == default_run_dir() else f" --run-dir {run_dir}"
    console.print(f"\n[bold green]ready[/] after {state.startup_s:.1f} s: [bold]{state.url}[/]\n", highlight=False)
    # One line however narrow the terminal: it is for pasting.
    console.print(f"  {curl_line(state.url, state.model)}\n", soft_wrap=True, markup=False, highlight=False)
    console.print(f"  logs  {state.log_dir}", soft_wrap=True, highlight=False)
    console.print(f"  chat  {tandem} chat{option}", soft_wrap=True, highlight=False)
    console.print(f"  stop  {f'{tandem} down{option}' if is_detached else 'Ctrl-C'}", soft_wrap=True, highlight=False)


def _own_command() -> str:
    """How to call this program again: `make up` runs it from a virtual environment that is not on PATH."""
    if shutil.which("tandem"):
        return "tandem"
    script = Path(sys.executable).with_name("tandem")
    if not script.exists():
        return "python -m services.cli"
    return str(script.relative_to(Path.cwd())) if script.is_relative_to(Path.cwd()) else str(script)
