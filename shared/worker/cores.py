"""Which cores a worker computes on.

Only what computes is bound: the step thread and the native kernels' threads. The event loop, gRPC and whatever else the
process does go wherever there is room, so they are not stuck behind a busy core of the worker's own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from kernels.cpu.library import Library
from shared.cpu_list import format_cpus, parse_cpus


@dataclass(frozen=True, slots=True)
class Cores:
    """A worker's share of the machine.

    Attributes:
        cpus: To bind to; () leaves it to the kernel.
        threads: That compute, the step thread among them.
    """

    cpus: tuple[int, ...]
    threads: int

    @classmethod
    def of(cls, cpus: str, threads: int) -> Cores:
        """From the settings of those names.

        Raises:
            ConfigurationError: `cpus` is no list of CPUs that this process may use.
        """
        usable = parse_cpus(cpus)
        return cls(usable if cpus else (), threads or len(usable))

    def bind_kernels(self, library: Library) -> None:
        """Gives each helper thread of the kernels a core, if there are enough for all; else they share."""
        if self.cpus:
            # A thread that spins at a barrier on a shared core keeps off the one that it waits for.
            library.place(self.cpus, spins=self.threads <= len(self.cpus))

    def bind_this_thread(self) -> None:
        """To all of the cores: the helpers hold theirs, and what torch starts from this thread inherits the binding."""
        if self.cpus:
            os.sched_setaffinity(0, self.cpus)

    def __str__(self) -> str:
        return format_cpus(self.cpus) or "any"
