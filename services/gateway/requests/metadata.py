"""`metadata`: labels that clients attach to what is stored."""

from __future__ import annotations

from collections.abc import Mapping

from shared.errors import InvalidRequest

MAX_KEYS, MAX_KEY_CHARS, MAX_VALUE_CHARS = 16, 64, 512
"""As OpenAI's API documents them."""


def check_metadata(metadata: Mapping[str, str] | None) -> None:
    """Passes if the labels are few and short.

    Raises:
        InvalidRequest: They are not; with both numbers.
    """
    metadata = metadata or {}
    if len(metadata) > MAX_KEYS:
        raise InvalidRequest(f"'metadata' has {len(metadata)} keys, at most {MAX_KEYS}", param="metadata")
    for key, value in metadata.items():
        if len(key) > MAX_KEY_CHARS or len(value) > MAX_VALUE_CHARS:
            raise InvalidRequest(
                f"'metadata': a key of {len(key)} and a value of {len(value)} characters, "
                f"at most {MAX_KEY_CHARS} and {MAX_VALUE_CHARS}",
                param="metadata",
            )
