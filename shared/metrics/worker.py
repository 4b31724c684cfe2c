"""The metrics of an engine process, prefill or decode.

What the engine counts by itself is read from its stats when somebody scrapes; only distributions are kept here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from prometheus_client import Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from shared.engine.stats import EngineStats
from shared.engine.step import StepOutputs
from shared.metrics.registry import STEP_BUCKETS_S, TOKENS_PER_STEP_BUCKETS, TRANSFER_BUCKETS_S, new_registry

_LABELS = ("model_name", "role")

_GAUGES: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("vllm:num_requests_running", "Sequences in the batch.", lambda s: s.running),
    ("vllm:num_requests_waiting", "Sequences admitted and not in the batch.", lambda s: s.waiting),
    ("tandem_num_requests_waiting_for_kv", "Sequences whose KV is being fetched.", lambda s: s.waiting_for_kv),
    ("vllm:kv_cache_usage_perc", "Share of KV blocks in use; 1 is full.", lambda s: _cache_usage(s)),
    ("vllm:gpu_cache_usage_perc", "The same under its older name.", lambda s: _cache_usage(s)),
    ("tandem_kv_slot_utilization", "Used / allocated token slots, over all steps.", lambda s: s.slot_utilization),
    ("tandem_kv_oldest_pin_seconds", "Age of the oldest pin of a KV block; 0 without any.", lambda s: s.oldest_pin_s),
    ("tandem_queued_prefill_tokens", "Prompt tokens still to compute.", lambda s: s.queued_prefill_tokens),
    ("tandem_prefill_tokens_per_second", "Measured lately; 0 before any.", lambda s: s.prefill_tokens_per_s),
    (
        "tandem_neighbour_slowdown",
        "Steps that decode take so many times as long beside a remote prefill.",
        lambda s: s.neighbour_slowdown,
    ),
    ("tandem_engine_failed", "1 when the engine stopped by itself.", lambda s: float(bool(s.failure))),
)

_COUNTERS: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("vllm:num_preemptions", "Times that a running sequence yielded its blocks.", lambda s: s.preemptions),
    ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", lambda s: s.prefix_query_tokens),
    ("vllm:prefix_cache_hits", "Of them, tokens whose KV was reused or fetched.", lambda s: s.prefix_hit_tokens),
    ("tandem_prefilled_tokens", "Prompt tokens computed here.", lambda s: s.prefilled_tokens),
    ("tandem_sampled_tokens", "Tokens sampled here.", lambda s: s.generated_tokens),
    ("tandem_kv_used_slots", "Token slots in use, summed over sampled steps.", lambda s: s.used_slots),
    ("tandem_kv_allocated_slots", "Likewise, token slots allocated.", lambda s: s.allocated_slots),
    ("tandem_engine_steps", "Forward passes.", lambda s: s.steps),
)


class WorkerMetrics:
    """One per process; used on the event loop.

    Attributes:
        registry: To be served.
    """

    def __init__(self, *, role: str, model: str) -> None:
        self._labels = {"model_name": model, "role": role}
        self._read: Callable[[], EngineStats] | None = None
        self.registry = new_registry()
        self.registry.register(_StatsCollector(list(self._labels.values()), self._stats))
        self._step_s = self._histogram("tandem_engine_step_seconds", "Duration of a step.", STEP_BUCKETS_S)
        self._step_tokens = self._histogram(
            "vllm:iteration_tokens_total", "Tokens computed in a step.", TOKENS_PER_STEP_BUCKETS
        )
        self._fetch_s = self._histogram(
            "tandem_kv_fetch_seconds", "Per sequence, first request to last verified block.", TRANSFER_BUCKETS_S
        )
        self._remote_prefill_s = self._histogram(
            "tandem_remote_prefill_seconds", "Per sequence, call of a prefill worker to its last block.", STEP_BUCKETS_S
        )
        self._finished = self._counter("tandem_sequences_finished", "Ended sequences.", "reason")
        self._acquired = self._counter(
            "tandem_kv_acquisitions", "Sequences by where their prompt KV came from.", "mode"
        )
        self._blocks = self._counter(
            "tandem_kv_acquired_blocks", "Prompt blocks by source; missed = recomputed.", "source"
        )
        self._skipped_blocks = self._counter(
            "tandem_kv_skipped_fetch_blocks", "Held elsewhere, and cheaper computed here than fetched."
        ).labels(**self._labels)
        self._fetched_bytes = self._counter("tandem_kv_fetched_bytes", "Bytes fetched for prompts.").labels(
            **self._labels
        )

    def follow(self, read_stats: Callable[[], EngineStats]) -> None:
        """From now on a scrape reads the engine's stats as of then."""
        self._read = read_stats

    def observe_step(self, outputs: StepOutputs) -> None:
        """Takes what one step brought, or what changed between two."""
        for sequence in outputs.finished:
            reason = sequence.finish_reason
            self._finished.labels(**self._labels, reason="unknown" if reason is None else reason.value).inc()
        if outputs.step is not None:
            self._step_s.observe(outputs.step.seconds)
            self._step_tokens.observe(outputs.step.num_tokens)

    def observe_acquisition(
        self,
        *,
        mode: str,
        local_blocks: int,
        held_blocks: int,
        prefilled_blocks: int,
        missed_blocks: int,
        skipped_blocks: int,
        fetched_bytes: int,
        fetch_s: float,
        prefill_s: float,
    ) -> None:
        """Takes what one sequence's search for KV brought: blocks by source, bytes and seconds."""
        self._acquired.labels(**self._labels, mode=mode).inc()
        by_source = {"local": local_blocks, "holder": held_blocks, "prefill": prefilled_blocks, "missed": missed_blocks}
        for source, num_blocks in by_source.items():
            self._blocks.labels(**self._labels, source=source).inc(num_blocks)
        self._skipped_blocks.inc(skipped_blocks)
        if fetched_bytes:
            self._fetched_bytes.inc(fetched_bytes)
            self._fetch_s.observe(fetch_s)
        if prefilled_blocks:
            self._remote_prefill_s.observe(prefill_s)

    def _stats(self) -> EngineStats | None:
        return self._read() if self._read is not None else None

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, documentation, _LABELS, registry=self.registry, buckets=buckets).labels(**self._labels)

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(name, documentation, (*_LABELS, *labels), registry=self.registry)


class _StatsCollector(Collector):
    def __init__(self, labels: list[str], read: Callable[[], EngineStats | None]) -> None:
        self._labels = labels
        self._read = read

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        stats = self._read()
        if stats is None:
            return
        for name, documentation, value in _GAUGES:
            gauge = GaugeMetricFamily(name, documentation, labels=_LABELS)
            gauge.add_metric(self._labels, value(stats))
            yield gauge
        for name, documentation, value in _COUNTERS:
            counter = CounterMetricFamily(name, documentation, labels=_LABELS)
            counter.add_metric(self._labels, value(stats))
            yield counter
        blocks = GaugeMetricFamily("tandem_kv_blocks", "KV blocks by state.", labels=(*_LABELS, "state"))
        for state, count in dataclasses.asdict(stats.blocks).items():
            if state != "total":
                blocks.add_metric([*self._labels, state], count)
        yield blocks


def _cache_usage(stats: EngineStats) -> float:
    in_use = stats.blocks.used + stats.blocks.pinned + stats.blocks.quarantined
    return in_use / stats.blocks.total if stats.blocks.total else 0.0
