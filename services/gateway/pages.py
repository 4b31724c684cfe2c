"""Lists in pages, as OpenAI's and Anthropic's APIs have them: so many after a given one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from shared.errors import InvalidRequest

T = TypeVar("T")


def page(
    items: Sequence[T],
    ids: Sequence[str],
    limit: int,
    after: str,
    *,
    param: str = "after",
    unknown: str = "there is no {} in the list",
) -> tuple[list[T], bool]:
    """The items after one, and whether there are more.

    Args:
        items: All of them.
        ids: Of the items.
        limit: So many at most.
        after: An id; "" = from the beginning.
        param: The field that says `after`.
        unknown: Error message where none of the ids is `after`, which is put in.

    Raises:
        InvalidRequest: `after` is none of the ids.
    """
    if after and after not in ids:
        raise InvalidRequest(unknown.format(repr(after[:64])), param=param)
    begin = ids.index(after) + 1 if after else 0
    return list(items[begin : begin + limit]), begin + limit < len(items)
