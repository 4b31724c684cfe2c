"""The command that runs a file of checks where Triton's (repaired, stricter) interpreter stands in for a GPU."""

from __future__ import annotations

from pathlib import Path

from tests.kernels.triton.forks import Command

_PLUGINS = ["pytest_asyncio.plugin", "pytest_timeout", "tests.kernels.triton.check_plugin", "no:cacheprovider"]
"""Those that the checks need: loading those that only other tests need takes longer than some of them."""


def interpreted(checks: Path) -> Command:
    """pytest over one file of checks, for `forks.run`."""
    options = ["-q", *(f"-p{plugin}" for plugin in _PLUGINS), "-otimeout=300", "-opython_files=check_*.py"]
    settings = {"TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return Command("pytest", [*options, str(checks)], settings)
