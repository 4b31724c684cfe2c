"""The metrics of a kv_transfer process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from shared.metrics.registry import TRANSFER_BUCKETS_S, new_registry


@dataclass(frozen=True, slots=True)
class TierFigures:
    """One tier's blocks, and how often blocks were read out of it or turned out damaged since the start."""

    blocks: int
    used_bytes: int
    budget_bytes: int
    hits: int
    corrupt: int


@dataclass(frozen=True, slots=True)
class DiskFigures:
    """The disk tier.

    Attributes:
        lost_blocks: Evicted from memory before they were written.
        failures: Reads and writes that the disk refused.
    """

    tier: TierFigures
    is_readable: bool
    is_writable: bool
    written_bytes: int
    read_bytes: int
    lost_blocks: int
    failures: int


@dataclass(frozen=True, slots=True)
class TransferFigures:
    """How the process stands at the moment of a scrape.

    Attributes:
        sent_bytes, received_bytes: Since the start, over the data plane.
        unpublished_blocks: Blocks whose hints have not reached the directory.
        stale_blocks: Since the start, blocks that peers came for, by hints that were no longer true.
    """

    attached: bool
    active_transfers: int
    sent_bytes: int
    received_bytes: int
    memory: TierFigures
    disk: DiskFigures
    unpublished_blocks: int
    stale_blocks: int
    directory_healthy: bool


_OUTCOMES = ("verified", "missing", "mismatched", "failed")


class TransferMetrics:
    """One per process; used on the event loop.

    Attributes:
        registry: To be served.
    """

    def __init__(self, read: Callable[[], TransferFigures]) -> None:
        """Declares all metrics.

        Args:
            read: Called on each scrape.
        """
        self.registry = new_registry()
        self.registry.register(_FiguresCollector(read))
        pulled = Counter(
            "tandem_transfer_pulled_blocks", "Blocks asked for, by outcome.", ("outcome",), registry=self.registry
        )
        self._pulled = {outcome: pulled.labels(outcome=outcome) for outcome in _OUTCOMES}
        self._pull_s = self._histogram("tandem_transfer_pull_seconds", "Per pull, as the worker waits for it.")
        self._verify_s = self._histogram("tandem_transfer_verify_seconds", "Of it, checksums.")

    def observe_pull(
        self, *, asked: int, verified: int, missing: int, mismatched: int, seconds: float, verify_s: float
    ) -> None:
        """Takes one pull's outcome, in blocks and seconds; blocks of no other outcome count as failed."""
        outcomes = {"verified": verified, "missing": missing, "mismatched": mismatched}
        outcomes["failed"] = max(0, asked - sum(outcomes.values()))
        for outcome, num_blocks in outcomes.items():
            self._pulled[outcome].inc(num_blocks)
        self._pull_s.observe(seconds)
        self._verify_s.observe(verify_s)

    def _histogram(self, name: str, documentation: str) -> Histogram:
        return Histogram(name, documentation, registry=self.registry, buckets=TRANSFER_BUCKETS_S)


class _FiguresCollector(Collector):
    def __init__(self, read: Callable[[], TransferFigures]) -> None:
        self._read = read

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        figures = self._read()
        yield _gauge("tandem_transfer_worker_attached", "1 while a worker is attached.", figures.attached)
        yield _gauge("tandem_transfer_active", "Transfers in progress, either way.", figures.active_transfers)
        yield _counter("tandem_transfer_sent_bytes", "Bytes sent to peers.", figures.sent_bytes)
        yield _counter("tandem_transfer_received_bytes", "Bytes received from peers.", figures.received_bytes)
        yield from _tier("host", figures.memory)
        yield from _disk(figures.disk)
        yield _gauge("tandem_hints_unpublished_blocks", "Blocks not in the directory yet.", figures.unpublished_blocks)
        yield _counter("tandem_hints_stale_blocks", "Blocks peers came for that were not here.", figures.stale_blocks)
        yield _gauge("tandem_directory_healthy", "1 while Redis answers in time.", figures.directory_healthy)


def _tier(name: str, figures: TierFigures) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
    yield _gauge(f"tandem_{name}_tier_blocks", f"Blocks in the {name} tier.", figures.blocks)
    yield _gauge(f"tandem_{name}_tier_bytes", f"Bytes in the {name} tier.", figures.used_bytes)
    yield _gauge(f"tandem_{name}_tier_budget_bytes", "Bytes that it may take.", figures.budget_bytes)
    yield _counter(f"tandem_{name}_tier_hits", "Blocks read out of it.", figures.hits)
    yield _counter(f"tandem_{name}_tier_corrupt_blocks", "Blocks found damaged and dropped.", figures.corrupt)


def _disk(figures: DiskFigures) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
    yield from _tier("disk", figures.tier)
    yield _gauge("tandem_disk_tier_readable", "1 while blocks are read from disk.", figures.is_readable)
    yield _gauge("tandem_disk_tier_writable", "1 while blocks are written to disk.", figures.is_writable)
    yield _counter("tandem_disk_tier_written_bytes", "Bytes written.", figures.written_bytes)
    yield _counter("tandem_disk_tier_read_bytes", "Bytes read.", figures.read_bytes)
    yield _counter("tandem_disk_tier_lost_blocks", "Evicted before they were written.", figures.lost_blocks)
    yield _counter("tandem_disk_tier_failures", "Reads and writes that the disk refused.", figures.failures)


def _gauge(name: str, documentation: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, documentation, value=float(value))


def _counter(name: str, documentation: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, documentation, value=float(value))
