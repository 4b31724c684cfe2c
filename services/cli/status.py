"""`tandem status`: what runs, and how each worker's cache and queue stand, asked of the processes themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc

from protos import kv_transfer_pb2, kv_transfer_pb2_grpc, worker_pb2, worker_pb2_grpc
from services.cli.state_file import ClusterState, living, read_state
from shared.directory.client import Directory
from shared.directory.records import GatewayRecord, TransferRecord, WorkerRecord
from shared.rpc import PeerRole, TlsFiles, open_channel

_CALL_TIMEOUT_S = 2.0

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class BlockUse:
    """Blocks of one worker's cache, by what holds them."""

    total: int
    free: int
    cached: int
    used: int
    pinned: int
    quarantined: int


@dataclass(frozen=True, slots=True)
class TransferStatus:
    """A worker's kv_transfer, by its own answer."""

    incarnation: str
    address: str
    attached: bool
    transport: str
    tier_blocks: int
    tier_bytes: int
    tier_budget_bytes: int
    active_transfers: int
    sent_bytes: int
    received_bytes: int
    mismatched_blocks: int


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A prefill or decode worker, by its own answer.

    Attributes:
        used_slots, allocated_slots: Token slots, summed over sampled steps: their ratio is the utilization.
        transfer: None when its kv_transfer is not in the directory or does not answer.
    """

    worker_id: str
    role: str
    incarnation: str
    address: str
    ready: bool
    reason: str
    fingerprint: str
    model: str
    backend: str
    dtype: str
    cpus: str
    threads: int
    block_size: int
    max_model_len: int
    blocks: BlockUse
    running: int
    waiting: int
    waiting_for_kv: int
    used_slots: int
    allocated_slots: int
    transfer: TransferStatus | None


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """One process.

    Attributes:
        state: The supervisor's view; "dead" when the pid is gone and nobody noticed; "foreign" for a member of the
            directory that this supervisor did not start.
        incarnation, address: "" when the process is not in the directory. The address is HTTP for a gateway, else gRPC.
    """

    name: str
    role: str
    worker_id: str
    pid: int | None
    state: str
    detail: str
    restarts: int
    log: str
    incarnation: str
    address: str


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """All of it; `ready` when every process is and every worker says so."""

    url: str
    model: str
    ready: bool
    phase: str
    supervisor_pid: int
    redis_url: str
    redis_healthy: bool
    run_dir: str
    startup_s: float
    processes: list[ProcessStatus]
    workers: list[WorkerStatus]


async def cluster_status(run_dir: Path) -> ClusterStatus | None:
    """Asks every worker and sidecar that meets at the cluster's Redis; None when no cluster is in `run_dir`."""
    state = read_state(run_dir)
    if state is None:
        return None
    tls = TlsFiles(Path(state.tls_dir) / PeerRole.OPERATOR) if state.tls_dir else None
    async with Directory(state.redis_url) as directory:
        transfers = {record.worker_id: record for record in directory.transfers()}
        answers = await asyncio.gather(*(_worker(r, transfers.get(r.worker_id), tls) for r in directory.workers()))
        processes = _processes(state, _members(directory))
        healthy = directory.healthy
    workers = sorted((w for w in answers if w is not None), key=lambda w: w.worker_id)
    return ClusterStatus(
        url=state.url,
        model=state.model,
        ready=state.is_ready and all(p.state != "dead" for p in processes) and all(w.ready for w in workers),
        phase=state.phase,
        supervisor_pid=state.supervisor_pid,
        redis_url=state.redis_url,
        redis_healthy=healthy,
        run_dir=state.run_dir,
        startup_s=state.startup_s,
        processes=processes,
        workers=workers,
    )


@dataclass(frozen=True, slots=True)
class _Member:
    """A record of any kind, as far as a process list shows it."""

    name: str
    role: str
    worker_id: str
    pid: int
    incarnation: str
    address: str


def _members(directory: Directory) -> dict[int, _Member]:
    members = [
        *(_Member(r.worker_id, r.role, r.worker_id, r.pid, r.incarnation, r.address) for r in directory.workers()),
        *(
            _Member(f"{r.worker_id}.transfer", "kv_transfer", r.worker_id, r.pid, r.incarnation, r.fetch_address)
            for r in directory.transfers()
        ),
        *(_gateway_member(r) for r in directory.gateways()),
    ]
    return {member.pid: member for member in members}


def _gateway_member(record: GatewayRecord) -> _Member:
    return _Member(record.gateway_id, "gateway", "", record.pid, record.incarnation, record.address)


def _processes(state: ClusterState, members: dict[int, _Member]) -> list[ProcessStatus]:
    """Ours in the supervisor's order, then what else is in the directory."""
    result = []
    for process in state.processes:
        member = members.pop(process.pid, None) if process.pid else None
        result.append(
            ProcessStatus(
                name=process.name,
                role=process.role,
                worker_id=process.worker_id,
                pid=process.pid,
                state="dead" if process.pid and not living([process]) else process.state,
                detail=process.detail,
                restarts=process.restarts,
                log=process.log,
                incarnation=member.incarnation if member else "",
                address=member.address if member else "",
            )
        )
    for member in members.values():
        ours = (member.name, member.role, member.worker_id, member.pid)
        result.append(ProcessStatus(*ours, "foreign", "", 0, "", member.incarnation, member.address))
    return result


async def _worker(record: WorkerRecord, transfer: TransferRecord | None, tls: TlsFiles | None) -> WorkerStatus | None:
    """None when the worker does not answer: its record is older than its death."""
    channel = open_channel(record.address, tls=tls, peer=(PeerRole(record.role), record.worker_id))
    reply, transfer_status = await asyncio.gather(
        _ask(channel, lambda channel: worker_pb2_grpc.WorkerStub(channel).Status(worker_pb2.StatusRequest())),
        _transfer(transfer, tls),
    )
    if reply is None:
        return None
    blocks = reply.blocks
    return WorkerStatus(
        worker_id=reply.worker_id,
        role=reply.role,
        incarnation=reply.incarnation,
        address=record.address,
        ready=reply.ready,
        reason=reply.reason,
        fingerprint=reply.fingerprint,
        model=reply.model,
        backend=reply.backend,
        dtype=reply.dtype,
        cpus=reply.cpus,
        threads=reply.threads,
        block_size=reply.block_size,
        max_model_len=reply.max_model_len,
        blocks=BlockUse(blocks.total, blocks.free, blocks.cached, blocks.used, blocks.pinned, blocks.quarantined),
        running=reply.running,
        waiting=reply.waiting,
        waiting_for_kv=reply.waiting_for_kv,
        used_slots=reply.used_slots,
        allocated_slots=reply.allocated_slots,
        transfer=transfer_status,
    )


async def _transfer(record: TransferRecord | None, tls: TlsFiles | None) -> TransferStatus | None:
    if record is None:
        return None
    request = kv_transfer_pb2.TransferStatusRequest()
    reply = await _ask(
        open_channel(record.fetch_address, tls=tls, peer=(PeerRole.TRANSFER, record.worker_id)),
        lambda channel: kv_transfer_pb2_grpc.KvFetchStub(channel).TransferStatus(request),
    )
    if reply is None:
        return None
    return TransferStatus(
        incarnation=reply.incarnation,
        address=record.fetch_address,
        attached=reply.attached,
        transport=reply.transport,
        tier_blocks=reply.tier_blocks,
        tier_bytes=reply.tier_bytes,
        tier_budget_bytes=reply.tier_budget_bytes,
        active_transfers=reply.active_transfers,
        sent_bytes=reply.sent_bytes,
        received_bytes=reply.received_bytes,
        mismatched_blocks=reply.mismatched_blocks,
    )


async def _ask(channel: grpc.aio.Channel, call: Callable[[grpc.aio.Channel], Awaitable[R]]) -> R | None:
    """The reply, or None when the process does not give one in time."""
    try:
        async with asyncio.timeout(_CALL_TIMEOUT_S), channel:
            return await call(channel)
    except (grpc.aio.AioRpcError, TimeoutError):
        return None
