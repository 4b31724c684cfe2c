"""Which files hold a checkpoint's weights. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

from shared.errors import ConfigurationError


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in name order: those of its index if there is one, else all.

    Raises:
        ConfigurationError: None, or one that the index names is missing, or the index is no index.
    """
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.exists():
        files = [directory / name for name in _indexed_names(index)]
    else:
        files = [single] if single.exists() else sorted(directory.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ConfigurationError(f"{directory}: {index.name} names files that are missing: {', '.join(missing)}")
    if not files:
        raise ConfigurationError(f"no *.safetensors in {directory}; other weight formats are not supported")
    return files


def _indexed_names(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ConfigurationError(f"{index}: not an index of safetensors files") from exc
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise ConfigurationError(f"{index}: names a file outside its directory: {outside[0]}")
    return names
