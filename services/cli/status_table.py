"""`ClusterStatus` for people."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from services.cli.quantities import format_bytes
from services.cli.status import ClusterStatus, ProcessStatus, WorkerStatus

_STYLES = {"ready": "green", "dead": "bold red", "failed": "bold red"}


def print_status(status: ClusterStatus, console: Console) -> None:
    """Two tables: processes, then what the workers and sidecars say."""
    word = "[green]ready[/]" if status.ready else f"[yellow]not ready[/] ({status.phase})"
    console.print(f"{status.url}  {escape(status.model)}  {word}", highlight=False, soft_wrap=True)
    if not status.redis_healthy:
        console.print(f"[yellow]Redis does not answer at {status.redis_url}[/]", highlight=False, soft_wrap=True)
    console.print()
    console.print(_processes(status.processes))
    console.print()
    console.print(_workers(status.workers))
    console.print(_transfers(status.workers))


def _processes(processes: list[ProcessStatus]) -> Table:
    table = _table("process", "pid", "state", "worker id", "incarnation", "address", "restarts")
    for process in processes:
        style = _STYLES.get(process.state, "yellow")
        detail = f" {escape(process.detail)}" if process.detail else ""
        table.add_row(
            process.name,
            str(process.pid or "-"),
            f"[{style}]{process.state}[/]{detail}",
            process.worker_id or "-",
            process.incarnation or "-",
            process.address or "-",
            str(process.restarts),
        )
    return table


def _workers(workers: list[WorkerStatus]) -> Table:
    columns = (
        "blocks",
        "free",
        "cached",
        "used",
        "pinned",
        "quarantined",
        "running",
        "waiting",
        "for KV",
        "slots",
        "CPUs",
    )
    table = _table("worker", *columns, "")
    for worker in workers:
        blocks = worker.blocks
        numbers = (blocks.total, blocks.free, blocks.cached, blocks.used, blocks.pinned, blocks.quarantined)
        queue = (worker.running, worker.waiting, worker.waiting_for_kv)
        share = f"{worker.used_slots / worker.allocated_slots:.1%}" if worker.allocated_slots else "-"
        table.add_row(worker.worker_id, *map(str, numbers), *map(str, queue), share, worker.cpus, escape(worker.reason))
    return table


def _transfers(workers: list[WorkerStatus]) -> Table:
    table = _table("sidecar", "transport", "tier", "active", "sent", "received", "mismatched")
    for worker in workers:
        if (transfer := worker.transfer) is None:
            continue
        table.add_row(
            worker.worker_id,
            transfer.transport,
            f"{format_bytes(transfer.tier_bytes)} of {format_bytes(transfer.tier_budget_bytes)}",
            str(transfer.active_transfers),
            format_bytes(transfer.sent_bytes),
            format_bytes(transfer.received_bytes),
            str(transfer.mismatched_blocks),
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
