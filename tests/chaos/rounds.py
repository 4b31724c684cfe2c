"""Rounds of faults in traffic; after each all must be ready again, and every answer must have been right.

calm: oracle  |  traffic: faults -> until all is ready again -> the next round ...  |  lull: blocks free  |  traffic ...

What leaked in one round is still missing some rounds later: traffic stops, which takes as long as its longest request,
only now and then.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx

from loadtest.fleet import Fleet
from tests.chaos.cases import Answer, Case, ask, draw
from tests.chaos.faults import Fault, Saboteur, plan
from tests.e2e.conftest import Suite

HEAL_S = 60.0
FREE_S = 15.0
SLOW_S = 15.0
ROUNDS_BETWEEN_LULLS = 4
SALTS, FRESH = 4, 0.2
EXPLICIT_ERRORS = {"unavailable", "worker_lost", "worker_draining", "overloaded", "request_timeout"}
"""What a client may be told when it cannot be served. Anything else is a defect."""


@dataclass
class Report:
    """What happened, in numbers.

    Attributes:
        faulted: Requests that were under way while something was broken or not ready again yet.
    """

    requests: int = 0
    faulted: int = 0
    wall_s: float = 0.0
    outcomes: Counter = field(default_factory=Counter)
    errors: Counter = field(default_factory=Counter)
    faults: Counter = field(default_factory=Counter)
    migrations: int = 0
    wrong: list[str] = field(default_factory=list)
    reply_s: list[float] = field(default_factory=list)
    heal_s: list[float] = field(default_factory=list)
    free_s: list[float] = field(default_factory=list)
    rounds: int = 0

    def as_dict(self) -> dict:
        """For JSON."""
        return {
            "rounds": self.rounds,
            "requests": self.requests,
            "faulted_requests": self.faulted,
            "requests_per_s": round(self.requests / self.wall_s, 1) if self.wall_s else 0.0,
            "wrong": self.wrong,
            "outcomes": dict(self.outcomes),
            "errors": dict(self.errors),
            "faults": dict(self.faults),
            "migrations": self.migrations,
            "reply_s": _spread(self.reply_s),
            "all_ready_again_s": _spread(self.heal_s),
            "all_blocks_free_s": _spread(self.free_s),
        }


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        name: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3) if ordered else 0.0
        for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
    }


class Chaos:
    """One suite, its oracle, and the report."""

    def __init__(
        self, suite: Suite, saboteur: Saboteur, cases: list[Case], kinds: list[str], say: Callable[[str], None]
    ) -> None:
        self._suite = suite
        self._saboteur = saboteur
        self._cases = cases
        self._kinds = kinds
        self._say = say
        self._oracle: dict[str, Answer] = {}
        self._is_disturbed = False
        self.report = Report()

    async def learn(self, oracle_url: str) -> None:
        """Asks every case of an undisturbed, aggregated gateway."""
        async with _client(oracle_url) as client:
            for case in self._cases:
                answer = await ask(client, case, "oracle")
                assert answer.outcome == "answered", (case.name, answer.outcome, answer.code)
                self._oracle[case.name] = answer

    async def run(self, rng: random.Random, *, rounds: int = 0, seconds: float = 0.0, streams: int = 8) -> None:
        """So many rounds, or rounds for so long; stops at the first violation."""
        started_s, report = time.monotonic(), self.report
        is_over = lambda: report.rounds >= rounds and time.monotonic() >= started_s + seconds  # noqa: E731
        async with Fleet(self._suite.redis_url) as fleet:
            num_workers = len((await asyncio.to_thread(self._suite.status))["workers"])
            while not is_over():
                await self._stretch(random.Random(rng.getrandbits(64)), fleet, num_workers, streams, is_over)
                report.wall_s = time.monotonic() - started_s

    async def _stretch(
        self, rng: random.Random, fleet: Fleet, num_workers: int, streams: int, is_over: Callable[[], bool]
    ) -> None:
        """Some rounds in one traffic, then a lull, in which every block must be free."""
        lull = asyncio.Event()
        async with asyncio.TaskGroup() as traffic:
            for _ in range(streams):
                traffic.create_task(self._stream(random.Random(rng.getrandbits(64)), lull))
            for _ in range(ROUNDS_BETWEEN_LULLS):
                await self._round(rng, fleet, num_workers)
                if is_over():
                    break
            lull.set()
        still_s = time.perf_counter()
        self.report.free_s.append(await fleet.until_free(FREE_S) - still_s)

    async def _round(self, rng: random.Random, fleet: Fleet, num_workers: int) -> None:
        length_s = rng.uniform(2.0, 5.0)
        faults = plan(rng, length_s, self._kinds)
        self._saboteur.look(fleet.addresses())
        report, before = self.report, self.report.requests
        await asyncio.gather(asyncio.sleep(length_s), *(self._inflict(fault) for fault in faults))
        self._saboteur.calm()
        calm_s = time.perf_counter()
        await self._until_healed(fleet, num_workers, faults)
        report.heal_s.append(time.perf_counter() - calm_s)
        self._is_disturbed = False
        report.rounds += 1
        num_requests = report.requests - before
        self._say(f"round {report.rounds}: {'; '.join(map(str, faults))}: {num_requests} requests, {report.outcomes}")

    async def _inflict(self, fault: Fault) -> None:
        await asyncio.sleep(fault.at_s)
        self._is_disturbed = True
        self.report.faults[f"{fault.kind} {fault.target}".split("-")[0]] += 1
        await self._saboteur.inflict(fault)

    async def _stream(self, rng: random.Random, lull: asyncio.Event) -> None:
        async with _client(self._suite.url) as client:
            while not lull.is_set():
                await self._one(client, rng)

    async def _one(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        case, stream = draw(self._cases, rng), rng.random() < 0.6
        # What is cached travels no more, unless its worker is gone: some prompts are new to everybody.
        salt = f"salt-{rng.getrandbits(64) if rng.random() < FRESH else rng.randrange(SALTS)}"
        leave_after_s = rng.uniform(0.005, 0.5) if rng.random() < 0.15 else 0.0
        was_disturbed, began_s = self._is_disturbed, time.perf_counter()
        answer = await ask(client, case, salt, stream=stream, leave_after_s=leave_after_s)
        report = self.report
        report.requests += 1
        report.reply_s.append(took_s := time.perf_counter() - began_s)
        if took_s > SLOW_S:
            fate = f"{answer.outcome} {answer.code}, {answer.migrations} migrations"
            self._say(f"{case.name} took {took_s:.1f} s: {fate}")
        report.faulted += was_disturbed or self._is_disturbed
        report.outcomes[answer.outcome] += 1
        report.migrations += answer.migrations
        if answer.outcome == "error":
            report.errors[answer.code] += 1
            if answer.code not in EXPLICIT_ERRORS:
                report.wrong.append(f"{case.name}: error {answer.code}")
        elif answer.outcome == "broken":
            report.wrong.append(f"{case.name}: the reply broke off ({answer.code})")
        elif answer.outcome == "answered":
            if not answer.same_as(self._oracle[case.name]):
                report.wrong.append(f"{case.name}: other tokens than undisturbed, {answer.migrations} migrations")
            elif answer.num_replies != 1:
                report.wrong.append(f"{case.name}: {answer.num_replies} replies")

    async def _until_healed(self, fleet: Fleet, num_workers: int, faults: list[Fault]) -> None:
        try:
            async with asyncio.timeout(HEAL_S):
                while not self._saboteur.all_run():
                    await asyncio.sleep(0.05)
            await fleet.until_ready(num_workers, HEAL_S)
            await self._until_gateway_ready()
        except TimeoutError as exc:
            done = "; ".join(map(str, faults))
            raise AssertionError(f"not healed after {HEAL_S:g} s: {exc}; faults: {done}") from exc

    async def _until_gateway_ready(self) -> None:
        async with asyncio.timeout(HEAL_S), _client(self._suite.url) as client:
            while (await client.get("/ready")).status_code != 200:
                await asyncio.sleep(0.05)


def _client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None))
