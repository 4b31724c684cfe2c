"""Lists of CPUs as Linux writes them: `0-3,8`."""

from __future__ import annotations

import itertools
import os

from shared.errors import ConfigurationError


def parse_cpus(text: str) -> tuple[int, ...]:
    """The CPUs of a list, ascending; of "" those that this process may use.

    Raises:
        ConfigurationError: Not a list, or it names one that this process may not use.
    """
    allowed = os.sched_getaffinity(0)
    if not text:
        return tuple(sorted(allowed))
    cpus: set[int] = set()
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            cpus.update(range(int(first), int(last if dash else first) + 1))
    except ValueError as exc:
        raise ConfigurationError(f"cpus {text!r} is not a list like 0-3,8") from exc
    if not cpus or not cpus <= allowed:
        raise ConfigurationError(f"cpus {text!r}: this process may use {format_cpus(tuple(sorted(allowed)))}")
    return tuple(sorted(cpus))


def format_cpus(cpus: tuple[int, ...]) -> str:
    """Undoes `parse_cpus`; runs are written as ranges."""
    runs: list[list[int]] = []
    for cpu in cpus:
        if runs and runs[-1][1] == cpu - 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def share_cpus(cpus: tuple[int, ...], num_workers: int) -> list[tuple[int, ...]]:
    """Parts for the engine workers of one machine, each of neighbours, disjoint.

    Of sixteen and more, one in sixteen is left to gateways, event loops and sidecars; on fewer they run wherever a
    worker idles. With fewer CPUs than workers nobody gets any of its own: () means that the kernel schedules.
    """
    cpus = cpus[: len(cpus) - len(cpus) // 16]
    if len(cpus) < num_workers:
        return [()] * num_workers
    borders = [len(cpus) * index // num_workers for index in range(num_workers + 1)]
    return [cpus[begin:end] for begin, end in itertools.pairwise(borders)]
