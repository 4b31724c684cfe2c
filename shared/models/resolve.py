"""From what a user calls a model to a local directory. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

from shared.errors import ConfigurationError
from shared.models.safetensors_files import checkpoint_files

BUNDLED_MODEL = "pydoc-mini"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TOKENIZER_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
_WEIGHT_FILES = ["*.safetensors"]


def resolve_model(name: str, *, with_weights: bool = True) -> Path:
    """The directory of a model: bundled, local, or downloaded from the Hugging Face hub into its cache.

    Blocks while downloading; huggingface_hub draws its progress bars on stderr if that is a terminal.

    Args:
        name: "pydoc-mini", a directory, or a hub id such as "Qwen/Qwen3-0.6B".
        with_weights: False for a gateway, which needs the configuration and the tokenizer only.

    Raises:
        ConfigurationError: Neither a directory nor a hub id, not a checkpoint, or not to be had from the hub.
    """
    path = Path(name).expanduser()
    if name == BUNDLED_MODEL and not path.is_dir():
        path = Path(__file__).parents[1] / "assets" / BUNDLED_MODEL
    if path.is_dir():
        directory = path.resolve()
    elif _HUB_ID.fullmatch(name):
        directory = _download(name, with_weights=with_weights)
    else:
        raise ConfigurationError(f"model {name!r}: no such directory")
    if not (directory / "config.json").is_file():
        raise ConfigurationError(f"model {name!r}: no config.json in {directory}: not a Hugging Face checkpoint")
    if with_weights:
        checkpoint_files(directory)
    return directory


def _download(name: str, *, with_weights: bool) -> Path:
    # Imported here: a local model needs no hub client, and importing it costs a third of a second.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = _TOKENIZER_FILES + (_WEIGHT_FILES if with_weights else [])
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as exc:
        reason = str(exc).strip().partition("\n")[0] or type(exc).__name__
        raise ConfigurationError(
            f"model {name!r}: no such directory, and the Hugging Face hub does not give it: {reason}"
        ) from exc
