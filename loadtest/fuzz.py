"""Throws garbage at the ports of a running suite and watches its processes: they must live, serve on, and stay small.

    tandem up --detach --prefill 1 --decode 1
    python -m loadtest.fuzz [--run-dir DIR] [--seconds 300] [--seed 1]

gRPC: every call of every service that is served over TCP, with random bytes, damaged messages, messages of random and
extreme fields, and streams of commands in any order, ended in any way. TCP: noise, HTTP, damaged HTTP/2. UCX: noise,
and connect messages in which a proxy between two sidecars flips bits (`fuzz_ucx`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from protos import kv_transfer_pb2, worker_pb2
from shared.rpc import open_channel

CALL_TIMEOUT_S = 1.0
MAX_COMMANDS = 12
_EDGES = (0, 1, -1, 2, 16, 127, 255, 4096, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63), 2**64 - 1)
_FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, 1e30, math.inf, -math.inf, math.nan)
_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


@dataclass(frozen=True)
class Method:
    """One call: its path, what it takes, and whether it takes a stream."""

    path: str
    request: type[Message]
    is_stream: bool = False
    opening: bytes = b""  # what a well-behaved caller says first


WORKER_METHODS = (
    Method("/tandem.Worker/Generate", worker_pb2.GenerateCommand, is_stream=True),
    Method("/tandem.Worker/Embed", worker_pb2.EmbedRequest),
    Method("/tandem.Worker/Prefill", worker_pb2.PrefillRequest),
    Method("/tandem.Worker/Status", worker_pb2.StatusRequest),
    Method("/tandem.Worker/NoSuchCall", worker_pb2.StatusRequest),
)
FETCH_METHODS = (
    Method("/tandem.KvFetch/Fetch", kv_transfer_pb2.FetchRequest),
    Method("/tandem.KvFetch/Fetches", kv_transfer_pb2.FetchAsk, is_stream=True),
    Method("/tandem.KvFetch/TransferStatus", kv_transfer_pb2.TransferStatusRequest),
    Method("/tandem.KvTransfer/Attach", kv_transfer_pb2.AttachRequest),  # not served there
)
LOCAL_METHODS = (  # on the Unix socket between a worker and its kv_transfer; Attach is left to the worker
    Method("/tandem.KvTransfer/Pull", kv_transfer_pb2.PullRequest),
    Method("/tandem.KvTransfer/Save", kv_transfer_pb2.SaveRequest),
    Method("/tandem.KvTransfer/Publish", kv_transfer_pb2.BlockEvents, is_stream=True),
    Method("/tandem.KvTransfer/NoSuchCall", kv_transfer_pb2.PinRequest),
)
HOST_METHODS = (Method("/tandem.BlockHost/Pin", kv_transfer_pb2.PinRequest),)


@dataclass
class Usage:
    """What a process uses; `grown_since` compares."""

    pid: int
    rss_bytes: int
    descriptors: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        """Now; raises FileNotFoundError where the process is gone."""
        with open(f"/proc/{pid}/statm") as statm:
            pages = int(statm.read().split()[1])
        return cls(pid, pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd")))


@dataclass
class Fuzzer:
    """Makes requests. `known` are values that get past the first checks: ids, incarnations, fingerprints.

    Attributes:
        outcomes: Status codes to how often they came.
    """

    rng: random.Random
    known: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    outcomes: dict[str, int] = field(default_factory=dict)

    def payload(self, request: type[Message]) -> bytes:
        """Bytes of a request: noise, a damaged message, or a message nobody meant."""
        kind = self.rng.random()
        if kind < 0.2:
            return self.noise(self.rng.choice((0, 1, 3, 16, 200, 4000, 200_000)))
        raw = bytearray(self.message(request).SerializeToString())
        if kind < 0.4 and raw:
            for _ in range(self.rng.randint(1, 8)):
                raw[self.rng.randrange(len(raw))] ^= 1 << self.rng.randrange(8)
        elif kind < 0.45:
            del raw[self.rng.randrange(len(raw) + 1) :]
        return bytes(raw)

    def noise(self, size: int) -> bytes:
        """Random bytes."""
        return self.rng.randbytes(size)

    def message(self, request: type[Message], depth: int = 0) -> Message:
        """A message of random fields, partly well-known ones."""
        message = request()
        oneofs = {oneof.name: self.rng.choice(oneof.fields).name for oneof in request.DESCRIPTOR.oneofs}
        for descriptor in request.DESCRIPTOR.fields:
            oneof = descriptor.containing_oneof
            if oneof is not None and oneofs[oneof.name] != descriptor.name:
                continue
            if self.rng.random() < 0.8:
                with contextlib.suppress(ValueError, TypeError, OverflowError):
                    self._fill(message, descriptor, depth)
        return message

    def _fill(self, message: Message, descriptor: FieldDescriptor, depth: int) -> None:
        name = descriptor.name
        if descriptor.message_type is not None and descriptor.message_type.GetOptions().map_entry:
            for _ in range(self.rng.randint(0, 3)):
                getattr(message, name)[self.rng.choice((0, 1, -1, 10**6))] = self.rng.choice(_FLOATS)
        elif descriptor.is_repeated:
            sizes = (0, 1, 2, 17, 40, 3000) if descriptor.message_type is None else (0, 1, 2, 20)
            count = self.rng.choice(sizes) if depth < 2 else 1
            values = [self._value(message, descriptor, depth) for _ in range(count)]
            if name in self.known and self.rng.random() < 0.7:
                values = list(self.rng.choice(self.known[name]))
            getattr(message, name).extend(values)
        elif descriptor.message_type is not None:
            getattr(message, name).CopyFrom(self._value(message, descriptor, depth))
        else:
            setattr(message, name, self._value(message, descriptor, depth))

    def _value(self, message: Message, descriptor: FieldDescriptor, depth: int) -> Any:
        rng, name = self.rng, descriptor.name
        if descriptor.message_type is not None:
            return self.message(_class_of(descriptor), depth + 1)
        if name in self.known and not descriptor.is_repeated and rng.random() < 0.8:
            return rng.choice(self.known[name])
        match descriptor.cpp_type:
            case FieldDescriptor.CPPTYPE_STRING:
                size = rng.choice((0, 1, 16, 33, 5000))
                return self.noise(size) if descriptor.type == FieldDescriptor.TYPE_BYTES else "é\0/" * (size // 3)
            case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
                return rng.choice(_FLOATS)
            case FieldDescriptor.CPPTYPE_BOOL:
                return rng.random() < 0.5
            case FieldDescriptor.CPPTYPE_ENUM:
                return rng.choice((0, 1, 2, 99))
            case kind:
                low, high = _RANGES[kind]
                return rng.choice([edge for edge in _EDGES if low <= edge <= high])

    async def call(self, channel: grpc.aio.Channel, method: Method) -> None:
        """One call, ended by the server, by its deadline, or by leaving."""
        payloads = [self.payload(method.request) for _ in range(self.rng.randint(0, MAX_COMMANDS))]
        patience_s = self.rng.choice((0.0, 0.01, 0.1, CALL_TIMEOUT_S))
        if method.opening and self.rng.random() < 0.8:
            payloads.insert(0, method.opening)
        if method.is_stream:
            call = channel.stream_stream(method.path)(_paced(payloads, self.rng), timeout=CALL_TIMEOUT_S)
        else:
            call = channel.unary_stream(method.path)((payloads or [b""])[0], timeout=CALL_TIMEOUT_S)
        outcome = "OK"
        try:
            async with asyncio.timeout(patience_s):
                async for _ in call:
                    pass
        except TimeoutError:
            outcome = "LEFT"
        except grpc.aio.AioRpcError as exc:
            outcome = exc.code().name
        finally:
            call.cancel()
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    async def tcp(self, host: str, port: int) -> None:
        """One connection that is not gRPC, or not for long."""
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        settings = b"\0\0\0\4\0\0\0\0\0"
        kind = self.rng.randrange(6)
        head = (b"", b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", preface, preface + settings, b"\x16\x03\x01", b"*1\r\n")[
            kind
        ]
        body = (
            b"".join(self._frame() for _ in range(self.rng.randint(0, 20)))
            if kind in (2, 3)
            else self.noise(self.rng.choice((0, 1, 100, 70_000)))
        )
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(CALL_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(host, port)
                try:
                    writer.write(head + body)
                    await writer.drain()
                    if self.rng.random() < 0.5:
                        await reader.read(1 << 16)
                finally:
                    writer.transport.abort()

    def _frame(self) -> bytes:
        """An HTTP/2 frame: length, type, flags, stream, payload, none of which need fit the others."""
        payload = self.noise(self.rng.choice((0, 4, 8, 100, 20_000)))
        length = len(payload) if self.rng.random() < 0.7 else self.rng.randrange(2**24)
        header = length.to_bytes(3, "big") + bytes([self.rng.randrange(12), self.rng.randrange(256)])
        return header + self.rng.choice((0, 1, 2, 3, 2**31 - 1)).to_bytes(4, "big") + payload


def _class_of(descriptor: FieldDescriptor) -> type[Message]:
    module = worker_pb2 if descriptor.message_type.file.name == "protos/worker.proto" else kv_transfer_pb2
    found: type[Message] = getattr(module, descriptor.message_type.name)
    return found


async def _paced(payloads: Sequence[bytes], rng: random.Random) -> Any:
    for payload in payloads:
        yield payload
        if rng.random() < 0.3:
            await asyncio.sleep(rng.random() * 0.02)


async def fuzz_port(
    address: str, methods: Sequence[Method], known: Mapping[str, Sequence[Any]], *, seed: int, seconds: float
) -> dict[str, int]:
    """Fuzzes one server for a while, eight callers at a time; gives the outcomes by status code."""
    host, _, port = address.rpartition(":")
    noise_share = 0.0 if address.startswith("unix:") else 0.15
    fuzzer = Fuzzer(random.Random(seed), known)
    deadline_s = time.monotonic() + seconds

    async def caller() -> None:
        async with open_channel(address) as channel:
            while time.monotonic() < deadline_s:
                if fuzzer.rng.random() < noise_share:
                    await fuzzer.tcp(host, int(port))
                else:
                    await fuzzer.call(channel, fuzzer.rng.choice(methods))

    await asyncio.gather(*(caller() for _ in range(8)))
    return fuzzer.outcomes


def worker_methods(worker: Mapping[str, Any]) -> tuple[Method, ...]:
    """The calls of a worker, and how to be let in."""
    hello = worker_pb2.Hello(gateway_id="fuzz", incarnation=worker["incarnation"], fingerprint=worker["fingerprint"])
    opening = worker_pb2.GenerateCommand(hello=hello).SerializeToString()
    return (replace(WORKER_METHODS[0], opening=opening), *WORKER_METHODS[1:])


def known_values(worker: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What `tandem status --json` says of a worker, as far as it opens doors."""
    transfer = worker.get("transfer") or {}
    return {
        "incarnation": [worker["incarnation"], transfer.get("incarnation", "")],
        "fingerprint": [worker["fingerprint"]],
        "worker_id": [worker["worker_id"]],
        "session_id": ["a", "b", "c"],
        "prompt_token_ids": [list(range(5, 60)), [7] * 33, [1]],
        "token_ids": [list(range(5, 60)), [7] * 33, [1]],
        "num_blocks": [1, 2, 3],
        "num_choices": [1, 2],
        "max_tokens": [1, 5, 2000],
        "temperature": [0.0, 1.0],
        "top_p": [1.0],
        "min_p": [0.0],
        "repetition_penalty": [1.0],
    }


def status(run_dir: str) -> dict[str, Any]:
    """`tandem status --json`."""
    command = [sys.executable, "-m", "services.cli", "status", "--json", *(("--run-dir", run_dir) if run_dir else ())]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


async def main(run_dir: str, seconds: float, seed: int) -> None:
    """Fuzzes every gRPC port of a suite and prints what became of its processes."""
    before = status(run_dir)
    usage = {process["name"]: Usage.of(process["pid"]) for process in before["processes"]}
    for worker in before["workers"]:
        ports = ((worker["address"], worker_methods(worker)), (worker["transfer"]["address"], FETCH_METHODS))
        for address, methods in ports:
            share_s = seconds / (2 * len(before["workers"]))
            outcomes = await fuzz_port(address, methods, known_values(worker), seed=seed, seconds=share_s)
            print(f"{worker['worker_id']:12} {address:22} {sum(outcomes.values()):7} calls {outcomes}")
    await asyncio.sleep(2)
    after = {process["name"]: process for process in status(run_dir)["processes"]}
    for name, was in usage.items():
        now = Usage.of(after[name]["pid"])
        print(
            f"{name:20} {'SAME' if now.pid == was.pid else 'RESTARTED':10} "
            f"{was.rss_bytes >> 20:5} -> {now.rss_bytes >> 20:5} MiB, {was.descriptors:4} -> {now.descriptors:4} fds"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", default="")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    asyncio.run(main(arguments.run_dir, arguments.seconds, arguments.seed))
