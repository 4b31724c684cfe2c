"""Where a prompt's KV comes from, in which order, and what becomes of every reserved slot."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses

import pytest

from protos import kv_transfer_pb2 as transfer_pb
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from shared.engine.block_pool import BlockPool
from shared.engine.config import EngineConfig
from shared.engine.engine import Engine
from shared.engine.sampling_params import SamplingParams
from shared.engine.sequence import Sequence, SequenceStatus
from shared.engine.step import StepResult
from shared.identity import namespace_hash
from shared.rpc import bind_tcp, new_server, open_channel, silence
from shared.worker.fetch_cost import FetchCosts, HolderClass
from shared.worker.kv_acquisition import AcquisitionReport, KvAcquisition
from shared.worker.kv_state import new_kv_life
from shared.worker.peers import PrefillPeer
from shared.worker.sidecar_link import SidecarLost

BLOCK = 4
NUM_BLOCKS = 32
PROMPT_BLOCKS = 6


class NoRunner:
    def execute(self, batch):
        return StepResult(token_ids=[1 for entry in batch.scheduled if entry.samples], logprobs=[])


class FakeLink:
    """Answers pulls from `has`: holder id -> how many leading blocks it verifies; None = never answers."""

    def __init__(self, has):
        self.has = has
        self.is_attached = True
        self.incarnation = "transfer"
        self.pulls = []
        self.gate = None

    async def pull(self, pull):
        self.pulls.append((pull.holder_id, len(pull.block_ids)))
        if self.gate is not None:
            await self.gate.wait()
        found = self.has.get(pull.holder_id, ())
        if found is None:
            raise SidecarLost("gone")
        verified = [index in found for index in range(len(pull.block_ids))]
        return transfer_pb.PullReply(verified=verified, missing=verified.count(False), bytes=10 * sum(verified))


class NoPeers:
    def prefill_worker(self, ref):
        return None


@pytest.fixture
def engine():
    engine = Engine(
        NoRunner(),
        BlockPool(NUM_BLOCKS, BLOCK),
        EngineConfig(block_size=BLOCK, max_model_len=256),
        lambda outputs: None,
    )
    yield engine
    engine.check_integrity()


def submit(engine):
    prompt = list(range(100, 100 + PROMPT_BLOCKS * BLOCK + 1))
    sequence = Sequence(
        session_id="s",
        token_ids=prompt,
        num_prompt_tokens=len(prompt),
        sampling=SamplingParams(max_tokens=4),
        namespace=namespace_hash("fp"),
        status=SequenceStatus.WAITING_FOR_KV,
    )
    engine.submit([sequence])
    return sequence


class OnePeer:
    """A prefill worker at some channel, whatever it is called."""

    def __init__(self, channel):
        self.peer = PrefillPeer("prefill-0", "transfer", rpc.WorkerStub(channel))

    def prefill_worker(self, ref):
        return self.peer


class Computing(rpc.WorkerServicer):
    """Says that it has computed everything, the first `NUM_CACHED` blocks for somebody before."""

    NUM_CACHED = 2

    async def Prefill(self, request, context):
        yield pb.PrefillProgress(sealed_blocks=request.num_blocks, cached_blocks=self.NUM_CACHED)
        await asyncio.Event().wait()


class Hanging(rpc.WorkerServicer):
    """Takes calls and answers none."""

    async def Prefill(self, request, context):
        await asyncio.Event().wait()
        yield pb.PrefillProgress()

    async def Status(self, request, context):
        await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def serving(worker):
    """A prefill worker for `acquisition(peers=...)`."""
    server = new_server()
    rpc.add_WorkerServicer_to_server(worker, server)
    address = bind_tcp(server, "127.0.0.1", 0)
    await server.start()
    async with open_channel(address) as channel:
        yield OnePeer(channel)
    await server.stop(0)


def acquisition(engine, link, sequence, costs=None, peers=None, prefill_timeout_s=1):
    return KvAcquisition(
        engine=engine,
        link=link,
        peers=peers or NoPeers(),
        worker_id="me",
        fingerprint="fp",
        block_size=BLOCK,
        block_bytes=10,
        costs=costs or FetchCosts(),
        prefill_timeout_s=prefill_timeout_s,
        sequence=sequence,
        block_hashes=sequence.block_hashes[:PROMPT_BLOCKS],
        cache_salt="",
        life=new_kv_life(),
        report=AcquisitionReport(),
    )


def hint(worker_id, num_blocks):
    return pb.HolderHint(holder=pb.PeerRef(worker_id=worker_id, incarnation="i"), num_blocks=num_blocks)


async def test_own_tier_is_asked_before_a_peer_with_a_longer_prefix(engine):
    link = FakeLink({"": range(2), "peer": range(4)})
    sequence = submit(engine)
    report = await acquisition(engine, link, sequence).run([hint("peer", 6), hint("me", 2)], ())
    assert link.pulls == [("", 2), ("peer", 4)]
    assert (report.held_blocks, report.missed_blocks, report.mode) == (6, 0, "fetched")
    assert sequence.num_computed_tokens == PROMPT_BLOCKS * BLOCK


async def test_only_the_verified_prefix_counts_when_a_block_in_the_middle_is_bad(engine):
    link = FakeLink({"peer": (0, 1, 3, 4, 5)})
    sequence = submit(engine)
    report = await acquisition(engine, link, sequence).run([hint("peer", 6)], ())
    assert (report.held_blocks, report.missed_blocks) == (2, 4)
    assert len(sequence.block_table) == 2
    assert engine.stats().blocks.used == 2


async def test_a_pull_without_an_answer_quarantines_its_slots(engine):
    sequence = submit(engine)
    report = await acquisition(engine, FakeLink({"peer": None}), sequence).run([hint("peer", 6)], ())
    assert (report.held_blocks, report.missed_blocks) == (0, 6)
    assert engine.stats().blocks.quarantined == 6


async def test_slots_of_a_cancelled_acquisition_stay_reserved_until_the_pull_ends(engine):
    link = FakeLink({"peer": range(6)})
    link.gate = asyncio.Event()
    sequence = submit(engine)
    running = asyncio.create_task(acquisition(engine, link, sequence).run([hint("peer", 6)], ()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    running.cancel()
    engine.abort([sequence.sequence_id])
    with pytest.raises(asyncio.CancelledError):
        await running
    assert engine.stats().blocks.free == NUM_BLOCKS - 6
    link.gate.set()
    await asyncio.sleep(0.01)
    assert engine.stats().blocks.free == NUM_BLOCKS


async def test_blocks_found_here_are_not_fetched(engine):
    link = FakeLink({"peer": range(6)})
    first = submit(engine)
    await acquisition(engine, link, first).run([hint("peer", 6)], ())
    second = submit(engine)
    report = await acquisition(engine, link, second).run([hint("peer", 6)], ())
    assert report.local_blocks == PROMPT_BLOCKS
    assert len(link.pulls) == 1


async def test_without_holders_or_prefill_workers_the_prompt_is_local(engine):
    link = FakeLink({})
    report = await acquisition(engine, link, submit(engine)).run([], [pb.PeerRef(worker_id="gone", incarnation="x")])
    assert (report.mode, link.pulls) == ("local", [])


async def test_a_pool_without_room_ends_the_search(engine):
    taken = [submit(engine) for _ in range(5)]
    for other in taken:
        assert engine.reserve(other, PROMPT_BLOCKS)
    link = FakeLink({"peer": range(6)})
    report = await acquisition(engine, link, submit(engine)).run([hint("peer", 6)], ())
    assert (report.held_blocks, link.pulls) == (0, [])


async def test_what_is_cheaper_computed_is_not_fetched_unless_a_prefill_worker_would_compute_it(engine, monkeypatch):
    stats = engine.stats
    monkeypatch.setattr(engine, "stats", lambda: dataclasses.replace(stats(), prefill_tokens_per_s=1000.0))
    costs = FetchCosts()
    for _ in range(5):
        costs.observe(HolderClass.PEER, 60, 60.0)
    link = FakeLink({"peer": range(6), "": range(2)})
    hints = [hint("peer", 6), hint("me", 2)]
    report = await acquisition(engine, link, submit(engine), costs).run(hints, ())
    assert (report.held_blocks, report.skipped_blocks, link.pulls) == (2, 4, [("", 2)])
    report = await acquisition(engine, link, submit(engine), costs).run(hints, [pb.PeerRef(worker_id="p")])
    assert (report.held_blocks, report.skipped_blocks) == (4, 0)


async def test_what_came_from_where_is_known_as_soon_as_a_choice_can_share_it(engine, monkeypatch):
    """Whoever shares the prompt may have a token, and say what was cached, before the acquisition is over."""
    commit, seen = engine.commit, []

    def commit_and_look(*args):
        commit(*args)
        report = search.report
        asyncio.get_running_loop().call_soon(
            lambda: seen.append((report.held_blocks, report.prefilled_blocks, report.prefill_cached_blocks))
        )

    monkeypatch.setattr(engine, "commit", commit_and_look)
    async with serving(Computing()) as peers, asyncio.timeout(20):
        link = FakeLink({"peer": range(1), "prefill-0": range(PROMPT_BLOCKS)})
        search = acquisition(engine, link, submit(engine), peers=peers, prefill_timeout_s=600)
        await search.run([hint("peer", 1)], [pb.PeerRef(worker_id="prefill-0", incarnation="i")])
    assert seen == [(1, 0, 0), (1, PROMPT_BLOCKS - 1, Computing.NUM_CACHED)]


async def test_a_prefill_worker_that_answers_nothing_is_not_waited_for(engine, monkeypatch):
    monkeypatch.setattr(silence, "QUIET_S", 0.1)
    monkeypatch.setattr(silence, "ANSWER_WITHIN_S", 0.3)
    async with serving(Hanging()) as peers, asyncio.timeout(20):
        search = acquisition(engine, FakeLink({}), submit(engine), peers=peers, prefill_timeout_s=600)
        report = await search.run((), [pb.PeerRef(worker_id="prefill-0", incarnation="i")])
    assert (report.mode, report.prefill_worker) == ("local", "prefill-0")
