"""The JSON file of a comparison: measured in pieces, each of which keeps what the others wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Report = dict[str, Any]


def read(path: Path) -> Report:
    """What was measured so far; {} if nothing was."""
    report: Report = json.loads(path.read_text()) if path.exists() else {}
    return report


def add(path: Path, measured: Report) -> None:
    """Writes what was measured into the file, down to the single measurement; all else there stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_merged(read(path), measured), indent=2) + "\n")


def _merged(before: Report, after: Report) -> Report:
    result = dict(before)
    for key, value in after.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result
