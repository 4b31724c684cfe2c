"""Partitions between processes of one host: a network of our own, whose routing loses what goes to or from a port.

It needs root and a kernel with network namespaces; no netfilter. What connects is refused a route, what is connected
already gets no packet through.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator

_CLONE_NEWNET = 0x40000000
_BEFORE_LOCAL, _LOCAL = "10", "100"
_wanted: Counter[tuple[str, ...]] = Counter()


@contextlib.contextmanager
def own_network() -> Iterator[str]:
    """Takes the calling thread, and what it starts, to a network that has a loopback device only, and back again.

    Yields:
        "", or why there is none: then everything is where it was.
    """
    if os.geteuid() or not shutil.which("ip"):
        yield "a network of its own needs root and iproute2"
        return
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.unshare(_CLONE_NEWNET):
            yield f"a network of its own: {os.strerror(ctypes.get_errno())}"
            return
        try:
            yield _prepared()
        finally:
            libc.setns(home, _CLONE_NEWNET)
    finally:
        os.close(home)


@contextlib.contextmanager
def partition(port: int, *, is_refused: bool) -> Iterator[None]:
    """Loses TCP's packets to and from a port, for all processes of this network.

    Args:
        is_refused: Who connects hears that there is no way; else that the address is of no use.
    """
    how = "unreachable" if is_refused else "blackhole"
    with _rule("dport", port, how), _rule("sport", port, how):
        yield


@contextlib.contextmanager
def _rule(side: str, port: int, how: str) -> Iterator[None]:
    """One routing rule, which the kernel takes once only, while at least one partition wants it."""
    rule = ("pref", _BEFORE_LOCAL, "ipproto", "tcp", side, str(port), how)
    if not _wanted[rule]:
        _ip("rule", "add", *rule)
    _wanted[rule] += 1
    try:
        yield
    finally:
        _wanted[rule] -= 1
        if not _wanted[rule]:
            _ip("rule", "del", *rule)


def _prepared() -> str:
    """Starts the loopback device and lets rules come before that of local addresses; returns why it could not."""
    try:
        _ip("link", "set", "lo", "up")
        _ip("rule", "add", "pref", _LOCAL, "lookup", "local")
        _ip("rule", "del", "pref", "0", "lookup", "local")
        with partition(1, is_refused=True), partition(1, is_refused=False):
            return ""
    except subprocess.CalledProcessError as exc:
        return f"routing rules: {exc.stderr.strip()}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
