"""A prefill and a decode worker as queues on a simulated clock, under the real placement: what a policy is worth.

Steps are what the engine does: one token for each sequence that decodes, and prompt chunks as long as the step's time
allows. A prompt computed elsewhere arrives after its transfer; its last tokens are computed where it decodes.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from services.gateway.sessions.placement import Mode, Placement, Prompt, Snapshot, place
from services.gateway.sessions.placement_learning import PlacementLearning
from shared.directory.records import TransferRecord, WorkerLoad, WorkerRecord
from shared.engine.neighbour_slowdown import NeighbourSlowdown
from shared.identity import Fingerprint, Incarnation, WorkerId

FP = Fingerprint("fp")
BLOCK = 16
DECODE_INDEX, PREFILL_INDEX = 1, 2


@dataclass(frozen=True)
class Speeds:
    """Of the machine, in seconds and tokens per second."""

    prefill_rate: float = 1800.0
    step_s: float = 0.002
    decode_s: float = 0.001
    max_step_s: float = 0.1
    remote_s: float = 0.02
    """What a remote prefill takes beyond its compute: calls, and the fetch of the last chunk."""
    heartbeat_s: float = 1.0
    beside: float = 1.0
    """How many times as long a step takes while the other worker computes: 1 on machines of their own."""


TWO_SHARED_CORES = Speeds(prefill_rate=2140.0, step_s=0.0042, decode_s=0.00084, remote_s=0.042, beside=1.9)
"""Two cores that workers, sidecars, the gateway and its clients share: what one worker computes, the other waits for.
`test_placement_goodput` holds it against measurements."""

FASTER_SHARED_CORES = Speeds(prefill_rate=3000.0, step_s=0.003, decode_s=0.0006, remote_s=0.03, beside=2.0)
"""The same in an hour in which the machine had 1.4 times the speed."""


@dataclass(eq=False)
class Request:
    """One of the trace; begins with so many blocks of the prompt that others share."""

    at_s: float
    num_tokens: int
    output_tokens: int
    shared_blocks: int
    placement: Placement | None = None
    left: int = 0
    token_times: list[float] = field(default_factory=list)

    def is_good(self, ttft_s: float, tpot_s: float) -> bool:
        first, last = self.token_times[0], self.token_times[-1]
        return first - self.at_s <= ttft_s and (last - first) <= tpot_s * (self.output_tokens - 1)


def _bench_document(rng: random.Random) -> int:
    sentences = min(60, max(8, int(rng.lognormvariate(3.0, 0.6))))
    return 40 + 62 * (sentences // 4 + 1)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of prompts, in tokens: short chats, a system prompt that many share and what each adds to it, documents."""

    short: tuple[int, int]
    shared_blocks: int
    shared_tail: int
    document: Callable[[random.Random], int]


BENCH = Lengths((15, 100), 24, 30, _bench_document)
"""What the placement bench sends to real workers."""
LONG_DOCUMENTS = Lengths((30, 150), 20, 25, lambda rng: rng.randrange(400, 1600))


def trace(rate: float, seconds: float, seed: int, lengths: Lengths = LONG_DOCUMENTS) -> list[Request]:
    """Half short chats, a third with the shared system prompt, the rest with a long document."""
    rng, requests, at_s = random.Random(seed), [], 0.0
    while (at_s := at_s + rng.expovariate(rate)) < seconds:
        kind = rng.choices(("short", "shared", "long"), weights=(3, 2, 1))[0]
        tokens = {
            "short": rng.randrange(*lengths.short),
            "shared": lengths.shared_blocks * BLOCK + lengths.shared_tail,
            "long": lengths.document(rng),
        }
        output = min(128, max(8, int(rng.lognormvariate(3.7, 0.6))))
        requests.append(Request(at_s, tokens[kind], output, lengths.shared_blocks if kind == "shared" else 0))
    return requests


@dataclass
class Step:
    """Under way; `work_s` is what is left of it at full speed, as of `since_s`."""

    work_s: float
    chunks: list[tuple[Request, int]]
    decoding: list[Request]
    began_s: float = 0.0
    since_s: float = 0.0
    slowness: float = 1.0


class Worker:
    """Computes prompts first come first served, in chunks beside what decodes."""

    def __init__(self, name: str, role: str, speeds: Speeds, clock: Callable[[], float]) -> None:
        self.speeds = speeds
        self.prompts: list[Request] = []
        self.decoding: list[Request] = []
        self.fetching = 0
        self.is_busy = False
        self.step = Step(0.0, [], [])
        self.has_shared = False
        self._rate_tokens = self._rate_s = 0.0
        self._slowdown = NeighbourSlowdown(clock)
        self.record = WorkerRecord(
            worker_id=WorkerId(name), role=role, model="m", fingerprint=FP, incarnation=Incarnation(name),
            address="127.0.0.1:1", pid=1, block_size=BLOCK, max_model_len=4096, vocab_size=100, block_bytes=1 << 17,
            started_at=1.0, ready=True, load=WorkerLoad(total_blocks=5000, free_blocks=5000),
        )  # fmt: skip

    def begin_step(self, now_s: float) -> None:
        """Begins to compute: a token for each that decodes, and prompt chunks."""
        speeds, decoding = self.speeds, list(self.decoding)
        seconds = speeds.step_s + speeds.decode_s * len(decoding)
        budget = max(32, int(speeds.prefill_rate * max(speeds.max_step_s - seconds, 0)))
        chunks = []
        for request in self.prompts:
            chunk = min(request.left, budget)
            budget -= chunk
            if chunk:
                chunks.append((request, chunk))
        tokens = sum(chunk for _, chunk in chunks)
        self.step = Step(seconds + tokens / speeds.prefill_rate, chunks, decoding, began_s=now_s, since_s=now_s)
        self.is_busy = True

    def measure(self, now_s: float) -> None:
        """The step is over."""
        step = self.step
        if step.decoding and not step.chunks:
            self._slowdown.observe(now_s - step.began_s, len(step.decoding), is_beside=self.fetching > 0)
        tokens = sum(chunk for _, chunk in self.step.chunks)
        if tokens > len(self.step.decoding):
            self._rate_tokens = 0.9 * self._rate_tokens + tokens
            self._rate_s = 0.9 * self._rate_s + now_s - self.step.began_s

    def report(self) -> None:
        """A heartbeat."""
        load = replace(
            self.record.load,
            running=len(self.decoding) + len(self.prompts),
            waiting_for_kv=self.fetching,
            queued_prefill_tokens=sum(request.left for request in self.prompts),
            prefill_tokens_per_s=self._rate_tokens / self._rate_s if self._rate_s else 0.0,
            transfer_bytes_per_s=1e9,
            neighbour_slowdown=self._slowdown.factor,
        )
        self.record = replace(self.record, load=load)


class Cluster:
    """One prefill worker, one decode worker, one gateway.

    Args:
        choose: Places a prompt.
    """

    def __init__(self, choose: Callable[[Prompt, Snapshot], Placement], speeds: Speeds) -> None:
        self._choose = choose
        self._speeds = speeds
        self._now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._decode = Worker("d0", "decode", speeds, lambda: self._now_s)
        self._prefill = Worker("p0", "prefill", speeds, lambda: self._now_s)
        self._sent: dict[Request, tuple[WorkerId, int]] = {}
        self._learning = PlacementLearning(lambda: self._now_s)
        self._num_open = 0
        self._num_there = 0

    def run(self, requests: list[Request]) -> None:
        """To the last token."""
        for request in requests:
            self._at(request.at_s, lambda request=request: self._arrive(request))
        self._num_open = len(requests)
        self._beat()
        while self._num_open:
            self._now_s, _, act = heapq.heappop(self._events)
            act()

    def _at(self, time_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._numbers), act))

    def _beat(self) -> None:
        self._decode.report()
        self._prefill.report()
        self._at(self._now_s + self._speeds.heartbeat_s, self._beat)

    def _snapshot(self) -> Snapshot:
        sent: dict[WorkerId, int] = {}
        for worker_id, tokens in self._sent.values():
            sent[worker_id] = sent.get(worker_id, 0) + tokens
        transfers = [
            TransferRecord(WorkerId(name), Incarnation(name), FP, "127.0.0.1:2", index, 1)
            for name, index in (("d0", DECODE_INDEX), ("p0", PREFILL_INDEX))
        ]
        return Snapshot(
            [self._decode.record], [self._prefill.record], transfers, {WorkerId("d0"): self._num_there}, sent,
            self._learning.overheads(),
        )  # fmt: skip

    def _arrive(self, request: Request) -> None:
        holders = {DECODE_INDEX: self._decode, PREFILL_INDEX: self._prefill}
        shared = request.shared_blocks
        held = {i: shared for i, worker in holders.items() if shared and worker.has_shared}
        placement = self._choose(Prompt(request.num_tokens, {FP: held}), self._snapshot())
        request.placement = placement
        self._num_there += 1
        self._sent[request] = placement.computes.worker_id, placement.uncached_tokens
        cached = BLOCK * shared if held else 0
        if placement.mode is Mode.REMOTE_PREFILL:
            request.left = (request.num_tokens - 1) // BLOCK * BLOCK - cached
            self._decode.fetching += 1
            self._enqueue(self._prefill, request)
        else:
            request.left = request.num_tokens - cached
            self._enqueue(self._decode, request)

    def _enqueue(self, worker: Worker, request: Request) -> None:
        worker.prompts.append(request)
        self._wake(worker)

    def _wake(self, worker: Worker) -> None:
        if not worker.is_busy and (worker.prompts or worker.decoding):
            worker.begin_step(self._now_s)
            self._share_cores()

    def _share_cores(self) -> None:
        """Who computes has changed: the ends of the steps under way move."""
        workers = [worker for worker in (self._decode, self._prefill) if worker.is_busy]
        for worker in workers:
            step = worker.step
            step.work_s -= (self._now_s - step.since_s) / step.slowness
            step.since_s, step.slowness = self._now_s, self._speeds.beside if len(workers) > 1 else 1.0
            self._at(self._now_s + step.work_s * step.slowness, partial(self._end_step, worker, step, self._now_s))

    def _end_step(self, worker: Worker, step: Step, as_of_s: float) -> None:
        if worker.step is not step or step.since_s != as_of_s or not worker.is_busy:
            return  # it ended, or ends at another time
        worker.is_busy = False
        worker.measure(self._now_s)
        self._share_cores()
        for request in step.decoding:
            self._token(request)
        for request, chunk in step.chunks:
            request.left -= chunk
            if not request.left:
                worker.prompts.remove(request)
                self._computed(worker, request)
        self._wake(worker)

    def _computed(self, worker: Worker, request: Request) -> None:
        worker.has_shared |= request.shared_blocks > 0
        if worker is self._prefill:
            self._at(self._now_s + self._speeds.remote_s, lambda: self._fetched(request))
            return
        self._token(request)
        if len(request.token_times) < request.output_tokens:
            worker.decoding.append(request)

    def _fetched(self, request: Request) -> None:
        self._decode.fetching -= 1
        self._decode.has_shared |= request.shared_blocks > 0
        request.left = request.num_tokens - (request.num_tokens - 1) // BLOCK * BLOCK
        self._enqueue(self._decode, request)

    def _token(self, request: Request) -> None:
        if not request.token_times:
            assert request.placement is not None
            self._learning.observe(request.placement, self._now_s - request.at_s)
            del self._sent[request]
        request.token_times.append(self._now_s)
        if len(request.token_times) == request.output_tokens:
            self._num_open -= 1
            self._num_there -= 1
            if request in self._decode.decoding:
                self._decode.decoding.remove(request)


POLICIES: dict[str, Callable[[Prompt, Snapshot], Placement]] = {
    "always remote": lambda prompt, snapshot: place(prompt, snapshot, "remote"),
    "never remote": lambda prompt, snapshot: place(prompt, snapshot, "local"),
    "threshold 256": lambda prompt, snapshot: place(prompt, snapshot, "remote", 256),
    "cost model": lambda prompt, snapshot: place(prompt, snapshot, "auto"),
}


@dataclass(frozen=True, slots=True)
class Targets:
    """Seconds to the first token, and per token after it."""

    ttft_s: float = 0.5
    tpot_s: float = 0.025


def goodput(
    policy: str,
    speeds: Speeds,
    rate: float,
    *,
    seconds: float = 60.0,
    seeds: int = 3,
    lengths: Lengths = LONG_DOCUMENTS,
    targets: Targets = Targets(),
) -> float:
    """Share of the requests that met both targets."""
    requests = []
    for seed in range(seeds):
        requests += (sent := trace(rate, seconds, seed, lengths))
        Cluster(POLICIES[policy], speeds).run(sent)
    return sum(request.is_good(targets.ttft_s, targets.tpot_s) for request in requests) / len(requests)
