"""Byte counts as people write them."""

from __future__ import annotations

import re

from shared.errors import ConfigurationError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_FORM = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Reads "512MiB", "2 GB", "1.5g" or a plain number of bytes.

    Raises:
        ConfigurationError: Anything else.
    """
    form = _FORM.fullmatch(text)
    if form is None:
        raise ConfigurationError(f"{text!r} is not an amount of memory; write it like 512MiB, 2GiB or 1000000000")
    return int(float(form[1]) * _UNITS[(form[2] or "").lower()])


def format_bytes(count: float) -> str:
    """With a binary unit, three digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
