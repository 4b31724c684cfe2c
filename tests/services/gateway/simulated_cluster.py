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

from services.gateway.sessions.placement import Mode, Placement, Prompt, Snapshot, place
from services.gateway.sessions.placement_learning import PlacementLearning
from shared.directory.records import TransferRecord, WorkerLoad, WorkerRecord
from shared.identity import Fingerprint, Incarnation, WorkerId

FP = Fingerprint("fp")
BLOCK = 16
SHARED_BLOCKS = 20
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


@dataclass(eq=False)
class Request:
    """One of the trace; `shares` = begins with the prompt that many share."""

    at_s: float
    num_tokens: int
    output_tokens: int
    shares: bool
    placement: Placement | None = None
    left: int = 0
    token_times: list[float] = field(default_factory=list)

    def is_good(self, ttft_s: float, tpot_s: float) -> bool:
        first, last = self.token_times[0], self.token_times[-1]
        return first - self.at_s <= ttft_s and (last - first) <= tpot_s * (self.output_tokens - 1)


def trace(rate: float, seconds: float, seed: int) -> list[Request]:
    """Short chats, chats with a shared system prompt, long documents: as the bench on real workers sends them."""
    rng, requests, at_s = random.Random(seed), [], 0.0
    while (at_s := at_s + rng.expovariate(rate)) < seconds:
        kind = rng.choices(("short", "shared", "long"), weights=(3, 2, 1))[0]
        tokens = {
            "short": rng.randrange(30, 150),
            "shared": SHARED_BLOCKS * BLOCK + 25,
            "long": rng.randrange(400, 1600),
        }
        output = min(128, max(8, int(rng.lognormvariate(3.7, 0.6))))
        requests.append(Request(at_s, tokens[kind], output, kind == "shared"))
    return requests


class Worker:
    """Computes prompts first come first served, in chunks beside what decodes."""

    def __init__(self, name: str, role: str, speeds: Speeds) -> None:
        self.speeds = speeds
        self.prompts: list[Request] = []
        self.decoding: list[Request] = []
        self.fetching = 0
        self.is_busy = False
        self.has_shared = False
        self._rate_tokens = self._rate_s = 0.0
        self.record = WorkerRecord(
            worker_id=WorkerId(name), role=role, model="m", fingerprint=FP, incarnation=Incarnation(name),
            address="127.0.0.1:1", pid=1, block_size=BLOCK, max_model_len=4096, vocab_size=100, block_bytes=1 << 17,
            started_at=1.0, ready=True, load=WorkerLoad(total_blocks=5000, free_blocks=5000),
        )  # fmt: skip

    def begin_step(self) -> tuple[float, list[tuple[Request, int]], list[Request]]:
        """Seconds, and what is computed meanwhile."""
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
        seconds += tokens / speeds.prefill_rate
        if tokens > len(decoding):
            self._rate_tokens, self._rate_s = 0.9 * self._rate_tokens + tokens, 0.9 * self._rate_s + seconds
        return seconds, chunks, decoding

    def report(self) -> None:
        """A heartbeat."""
        load = replace(
            self.record.load,
            running=len(self.decoding) + len(self.prompts),
            waiting_for_kv=self.fetching,
            queued_prefill_tokens=sum(request.left for request in self.prompts),
            prefill_tokens_per_s=self._rate_tokens / self._rate_s if self._rate_s else 0.0,
            transfer_bytes_per_s=1e9,
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
        self._decode = Worker("d0", "decode", speeds)
        self._prefill = Worker("p0", "prefill", speeds)
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
        held = {i: SHARED_BLOCKS for i, worker in holders.items() if request.shares and worker.has_shared}
        placement = self._choose(Prompt(request.num_tokens, {FP: held}), self._snapshot())
        request.placement = placement
        self._num_there += 1
        self._sent[request] = placement.computes.worker_id, placement.uncached_tokens
        cached = BLOCK * SHARED_BLOCKS if held else 0
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
            worker.is_busy = True
            seconds, chunks, decoding = worker.begin_step()
            self._at(self._now_s + seconds, lambda: self._end_step(worker, chunks, decoding))

    def _end_step(self, worker: Worker, chunks: list[tuple[Request, int]], decoding: list[Request]) -> None:
        worker.is_busy = False
        for request in decoding:
            self._token(request)
        for request, chunk in chunks:
            request.left -= chunk
            if not request.left:
                worker.prompts.remove(request)
                self._computed(worker, request)
        self._wake(worker)

    def _computed(self, worker: Worker, request: Request) -> None:
        worker.has_shared |= request.shares
        if worker is self._prefill:
            self._at(self._now_s + self._speeds.remote_s, lambda: self._fetched(request))
            return
        self._token(request)
        if len(request.token_times) < request.output_tokens:
            worker.decoding.append(request)

    def _fetched(self, request: Request) -> None:
        self._decode.fetching -= 1
        self._decode.has_shared |= request.shares
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


def goodput(policy: str, speeds: Speeds, rate: float, *, seconds=60.0, seeds=3, ttft_s=0.5, tpot_s=0.025) -> float:
    """Good requests per second."""
    num_good = 0
    for seed in range(seeds):
        requests = trace(rate, seconds, seed)
        Cluster(POLICIES[policy], speeds).run(requests)
        num_good += sum(request.is_good(ttft_s, tpot_s) for request in requests)
    return num_good / (seeds * seconds)
