"""Errors in the words of the API that the client speaks, where its request was translated to another one's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from shared.errors import TandemError


@contextmanager
def in_words_of(names: Mapping[str, str]) -> Iterator[None]:
    """Errors raised inside name the client's own fields.

    Args:
        names: Paths of the client's fields by the paths that they were translated to; longer ones first.
    """
    try:
        yield
    except TandemError as error:
        for translated, said in names.items():
            if error.param == translated or (error.param or "").startswith((f"{translated}.", f"{translated}[")):
                error.param = said + error.param[len(translated) :] if error.param else said
                error.message = error.message.replace(f"'{translated}", f"'{said}", 1)
                break
        raise
