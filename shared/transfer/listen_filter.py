"""Who reaches UCX's listening sockets: decided by the kernel, before UCX reads a byte.

ucxx's listener takes a port and no address: it binds every interface, and UCX neither authenticates nor survives every
malformed connect message. So a filter is attached to its sockets (classic BPF, socket(7) SO_ATTACH_FILTER): packets to
an address that was not chosen, or from one that was not admitted, are dropped. Whoever connects from elsewhere sees a
port that never answers. Most kernels let every process filter its own sockets; hardened ones want CAP_NET_ADMIN for it.

UCX listens on IPv4 only, and so does the filter look at IPv4 only.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Collection, Iterator, Sequence

MAX_SOURCES = 1024
"""Admitted sources; the one that was admitted longest ago makes room."""

_SO_ATTACH_FILTER = 26
_SIOCGIFADDR = 0x8915
_INSTRUCTION = struct.Struct("HBBI")
# <linux/bpf_common.h>: load a word of the packet, jump if equal, return a constant.
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_NETWORK_HEADER = 0xFFF00000  # SKF_NET_OFF: offsets from here on count from the IP header
_IP_SOURCE, _IP_DESTINATION = 12, 16
_ALL = 0xFFFFFFFF

Instruction = tuple[int, int, int, int]

_ACCEPT: Instruction = (_RETURN, 0, 0, _ALL)


def interface_addresses() -> dict[str, str]:
    """IPv4 address of every interface that has one."""
    found: dict[str, str] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # no address
                reply = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                found[name] = socket.inet_ntoa(reply[20:24])
    return found


def listening_sockets() -> dict[int, int]:
    """Inode to descriptor of this process's listening IPv4 sockets; the descriptors stay their owner's."""
    found: dict[int, int] = {}
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError, ValueError):
            target = os.readlink(f"/proc/self/fd/{entry}")
            if target.startswith("socket:["):
                with _borrowed(int(entry)) as sock:
                    is_ours = sock.family == socket.AF_INET and sock.type == socket.SOCK_STREAM
                    if is_ours and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                        found[int(target[8:-1])] = int(entry)
    return found


def may_filter() -> bool:
    """Whether the kernel lets this process attach filters."""
    with socket.socket() as scratch:
        try:
            _attach(scratch, [_ACCEPT])
        except PermissionError:
            return False
    return True


class ListenFilter:
    """The filter of some listening sockets. Owned by one thread at a time.

    Args:
        destinations: Own addresses that may be connected to; none = all.
        admits_all: Every source may connect; else those that were admitted.
    """

    def __init__(self, destinations: Collection[str], *, admits_all: bool) -> None:
        self._destinations = sorted(set(destinations))
        self._admits_all = admits_all
        self._sources: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._inodes: set[int] = set()
        self._is_attached = False

    @property
    def admits_all(self) -> bool:
        """No source is refused."""
        return self._admits_all

    def attach(self, inodes: Collection[int]) -> None:
        """Filters these listening sockets from now on."""
        self._inodes.update(inodes)
        self._apply()

    def admit(self, source: str) -> None:
        """Lets an IPv4 address connect; anything else lifts the restriction, since UCX's address is then unknown."""
        if self._admits_all:
            return
        if source in self._sources:
            self._sources.move_to_end(source)
            return
        if not _is_ipv4(source):
            self._admits_all = True
        else:
            self._sources[source] = None
            if len(self._sources) > MAX_SOURCES:
                self._sources.popitem(last=False)
        self._apply()

    def program(self) -> list[Instruction]:
        """What is attached."""
        instructions: list[Instruction] = []
        if self._destinations:
            instructions += [(_LOAD, 0, 0, _NETWORK_HEADER + _IP_DESTINATION), *_unless_one_of(self._destinations)]
        if not self._admits_all:
            instructions += [(_LOAD, 0, 0, _NETWORK_HEADER + _IP_SOURCE), *_unless_one_of(list(self._sources))]
        return [*instructions, _ACCEPT]

    def _apply(self) -> None:
        program = self.program()
        if program == [_ACCEPT] and not self._is_attached:
            return  # nothing to drop, and perhaps no right to attach anything
        self._is_attached = True
        for inode, descriptor in listening_sockets().items():
            if inode in self._inodes:
                with _borrowed(descriptor) as sock:
                    _attach(sock, program)


def _attach(sock: socket.socket, program: Sequence[Instruction]) -> None:
    raw = ctypes.create_string_buffer(b"".join(_INSTRUCTION.pack(*instruction) for instruction in program))
    option = struct.pack("HP", len(program), ctypes.addressof(raw))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, option)


def _unless_one_of(addresses: Sequence[str]) -> Iterator[Instruction]:
    """Drops the packet unless the loaded word is one of `addresses`.

    Two instructions each, because a jump reaches 255 instructions: not equal, skip one; else jump to the end, whose
    distance an unconditional jump can hold.
    """
    jump_always = 0x05
    for index, address in enumerate(addresses):
        value = int.from_bytes(socket.inet_aton(address), "big")
        yield (_JUMP_IF_EQUAL, 0, 1, value)
        yield (jump_always, 0, 0, 2 * (len(addresses) - index - 1) + 1)
    yield (_RETURN, 0, 0, 0)


def _is_ipv4(address: str) -> bool:
    try:
        socket.inet_pton(socket.AF_INET, address)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket]:
    """A socket object over somebody else's descriptor, which stays open."""
    sock = socket.socket(fileno=descriptor)
    try:
        yield sock
    finally:
        sock.detach()
