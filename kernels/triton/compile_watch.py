"""Tells when a kernel is compiled: a server compiles everything before it serves, and says so if it did not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton


def on_compile(notify: Callable[[str], None] | None) -> None:
    """Calls `notify` with a kernel's name for each one compiled in this process from now on; None ends it."""

    def hook(*, repr: str, already_compiled: bool, **_: Any) -> None:
        if notify is not None and not already_compiled:
            notify(repr)

    triton.knobs.runtime.jit_post_compile_hook = hook if notify is not None else None
