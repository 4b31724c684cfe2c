"""The metrics of a kv_transfer process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from shared.metrics.registry import TRANSFER_BUCKETS_S, new_registry


@dataclass(frozen=True, slots=True)
class TransferFigures:
    """How the process stands at the moment of a scrape.

    Attributes:
        sent_bytes, received_bytes: Since the start, over the data plane.
        unpublished_blocks: Blocks whose hints have not reached the directory.
    """

    attached: bool
    active_transfers: int
    sent_bytes: int
    received_bytes: int
    tier_blocks: int
    tier_bytes: int
    tier_budget_bytes: int
    unpublished_blocks: int
    directory_healthy: bool


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
        self._pulled = Counter(
            "tandem_transfer_pulled_blocks", "Blocks asked for, by outcome.", ("outcome",), registry=self.registry
        )
        for outcome in ("verified", "missing", "mismatched", "failed"):
            self._pulled.labels(outcome=outcome)
        self._pull_s = self._histogram("tandem_transfer_pull_seconds", "Per pull, as the worker waits for it.")
        self._verify_s = self._histogram("tandem_transfer_verify_seconds", "Of it, checksums.")

    def observe_pull(
        self, *, asked: int, verified: int, missing: int, mismatched: int, seconds: float, verify_s: float
    ) -> None:
        """Takes one pull's outcome, in blocks and seconds; blocks of no other outcome count as failed."""
        outcomes = {"verified": verified, "missing": missing, "mismatched": mismatched}
        outcomes["failed"] = max(0, asked - sum(outcomes.values()))
        for outcome, num_blocks in outcomes.items():
            self._pulled.labels(outcome=outcome).inc(num_blocks)
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
        yield _gauge("tandem_host_tier_blocks", "Blocks in the host tier.", figures.tier_blocks)
        yield _gauge("tandem_host_tier_bytes", "Bytes in the host tier.", figures.tier_bytes)
        yield _gauge("tandem_host_tier_budget_bytes", "Bytes that it may take.", figures.tier_budget_bytes)
        yield _gauge("tandem_hints_unpublished_blocks", "Blocks not in the directory yet.", figures.unpublished_blocks)
        yield _gauge("tandem_directory_healthy", "1 while Redis answers in time.", figures.directory_healthy)


def _gauge(name: str, documentation: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, documentation, value=float(value))


def _counter(name: str, documentation: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, documentation, value=float(value))
