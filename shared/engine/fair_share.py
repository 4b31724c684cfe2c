"""Fairness between tenants: virtual token counters, and stepping aside.

Every tenant has a counter of the tokens that it was served while others were there too; whoever was served least is
next (virtual token counters: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024). A tenant that comes
back starts at the least counter of those present, so that nobody saves up a claim by being away.

Counters order who starts, but a tenant with fifty running streams makes every step long. So a tenant that runs more
than its share of the sequences *steps aside* while another one waits for a first token: its sequences keep their KV and
skip the step, a few in a row at most. That costs it what it would have cost to wait its turn.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from shared.engine.sequence import Sequence
from shared.engine.step import ScheduledSequence
from shared.engine.waiting_queue import Waiting

OUTPUT_WEIGHT = 2
"""An output token counts as so many prompt tokens: it reads the weights for itself."""
CREDIT_TOKENS = 4096
"""How far ahead a quiet tenant may be and busy ones still step aside for it: its burst."""
QUIET_SHARE = 4
"""A tenant is quiet beside one that has so many times its sequences here."""
MAX_STEPS_ASIDE = 8
MAX_REMEMBERED = 4096


class FairShare:
    """Counters of one engine; guarded by its lock. With a single tenant it costs next to nothing."""

    def __init__(self) -> None:
        self._counters: dict[str, int] = {}
        self._present: Counter[str] = Counter()
        self._steps_aside = 0

    def enter(self, sequence: Sequence) -> None:
        """A sequence came."""
        tenant = sequence.tenant
        if not self._present[tenant]:
            present = [self._counters[other] for other in self._present if other != tenant]
            self._counters[tenant] = max(self._counters.get(tenant, 0), min(present, default=0))
        self._present[tenant] += 1

    def leave(self, sequence: Sequence) -> None:
        """A sequence ended."""
        tenant = sequence.tenant
        self._present[tenant] -= 1
        if not self._present[tenant]:
            del self._present[tenant]
            if len(self._counters) > MAX_REMEMBERED:
                self._counters = {name: self._counters[name] for name in self._present}

    def serve(self, scheduled: Iterable[ScheduledSequence]) -> None:
        """Counts what a step computes."""
        if len(self._present) < 2:
            return
        for entry in scheduled:
            weight = OUTPUT_WEIGHT if entry.num_new_tokens == 1 and entry.samples else 1
            self._counters[entry.sequence.tenant] += weight * entry.num_new_tokens

    def served(self, tenant: str) -> int:
        """A tenant's counter, in weighted tokens."""
        return self._counters.get(tenant, 0)

    def order(self, waiting: list[Waiting]) -> Iterator[Waiting]:
        """Waiting sequences as they should start: aged ones, then by priority class, then tenants by what they got.

        Args:
            waiting: Senior first; that order is kept within a tenant.
        """
        if len(self._present) < 2 or len({entry.sequence.tenant for entry in waiting}) < 2:
            yield from waiting
            return
        aged = [entry for entry in waiting if entry.is_aged]
        yield from aged
        queues: defaultdict[tuple[int, str], list[Waiting]] = defaultdict(list)
        for entry in waiting:
            if not entry.is_aged:
                queues[entry.sequence.priority, entry.sequence.tenant].append(entry)
        heads = [(priority, self.served(tenant), tenant, 0) for priority, tenant in queues]
        heapq.heapify(heads)
        while heads:
            priority, served, tenant, index = heapq.heappop(heads)
            entry = queues[priority, tenant][index]
            yield entry
            if index + 1 < len(queues[priority, tenant]):
                following = served + entry.sequence.num_uncomputed_tokens
                heapq.heappush(heads, (priority, following, tenant, index + 1))

    def stepping_aside(self, running: list[Sequence], waiting: Iterable[Waiting]) -> frozenset[str]:
        """Tenants whose running sequences skip the next step, so that others get their first token."""
        if len(self._present) < 2:
            return frozenset()
        counts = Counter(sequence.tenant for sequence in running)
        expecting = {sequence.tenant for sequence in running if not sequence.num_output_tokens}
        expecting |= {entry.sequence.tenant for entry in waiting if not entry.sequence.num_output_tokens}
        share = max(1.0, len(running) / len(self._present))
        aside = frozenset(
            tenant
            for tenant, count in counts.items()
            if count > share and any(self._may_pass(other, tenant, counts) for other in expecting)
        )
        self._steps_aside = self._steps_aside + 1 if aside else 0
        if self._steps_aside > MAX_STEPS_ASIDE:
            self._steps_aside = 0
            return frozenset()
        return aside

    def _may_pass(self, other: str, tenant: str, counts: Counter[str]) -> bool:
        is_quiet = QUIET_SHARE * self._present[other] <= self._present[tenant]
        lead = self.served(other) - self.served(tenant)
        return other != tenant and counts[other] < counts[tenant] and lead <= (CREDIT_TOKENS if is_quiet else 0)
