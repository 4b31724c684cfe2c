"""The registry of a process, and the bucket borders that all histograms share."""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector

STEP_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
TRANSFER_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 20.0)
TOKENS_PER_STEP_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def new_registry() -> CollectorRegistry:
    """A registry with the process's own CPU, memory and file-descriptor metrics in it."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a time stamp per series doubles the page
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry


def exposition(registry: CollectorRegistry, accept: str = "") -> tuple[bytes, str]:
    """Body and content type of a `/metrics` reply, in the format that the scraper's Accept header prefers.

    Where several processes share one port (prometheus_client's multiprocess mode), those of all of them.
    """
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:  # prometheus_client's own switch, set by the parent process
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type
