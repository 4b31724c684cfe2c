"""How fast this machine's cores read memory: the floor of a decode step at batch 1."""

from __future__ import annotations

import threading
import time

import numpy as np

_BYTES_PER_THREAD = 256 << 20
_ROUNDS = 5


def read_roof_bytes_per_s(threads: int) -> float:
    """Best of some rounds in which every thread sums a private array that no cache holds.

    numpy's integer sum of 64-bit words reads faster than one core's share of the memory, so memory is what is measured.
    """
    arrays = [np.ones(_BYTES_PER_THREAD // 8, dtype=np.uint64) for _ in range(threads)]
    best_s = float("inf")
    for _ in range(_ROUNDS):
        barrier = threading.Barrier(threads + 1)

        def read(array: np.ndarray, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            np.bitwise_or.reduce(array)
            barrier.wait()

        workers = [threading.Thread(target=read, args=(array,)) for array in arrays]
        for worker in workers:
            worker.start()
        barrier.wait()
        started_s = time.perf_counter()
        barrier.wait()
        best_s = min(best_s, time.perf_counter() - started_s)
        for worker in workers:
            worker.join()
    return threads * _BYTES_PER_THREAD / best_s
