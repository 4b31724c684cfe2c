"""Lists in pages, as OpenAI's API has them: so many after a given one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from shared.errors import InvalidRequest

T = TypeVar("T")


def page(items: Sequence[T], ids: Sequence[str], limit: int, after: str) -> tuple[list[T], bool]:
    """The items after one, and whether there are more.

    Raises:
        InvalidRequest: `after` is none of the ids.
    """
    if after and after not in ids:
        raise InvalidRequest(f"there is no {after[:64]!r} in the list", param="after")
    begin = ids.index(after) + 1 if after else 0
    return list(items[begin : begin + limit]), begin + limit < len(items)
