"""KV moves by hash: between decode workers, from the host tier, and never under a wrong name."""

from __future__ import annotations

import time
import uuid

import pytest

from protos import worker_pb2 as pb

PROMPT = [(41 * i + 7) % 1500 + 300 for i in range(400)]


def decode_workers(suite) -> list[dict]:
    return sorted((w for w in suite.status()["workers"] if w["role"] == "decode"), key=lambda w: w["worker_id"])


def holder_hint(worker: dict, num_blocks: int) -> pb.HolderHint:
    holder = pb.PeerRef(worker_id=worker["worker_id"], incarnation=worker["transfer"]["incarnation"])
    return pb.HolderHint(holder=holder, num_blocks=num_blocks)


async def test_prefix_computed_on_one_decode_worker_is_fetched_by_another(suite, generate):
    first, second = decode_workers(suite)
    salt = uuid.uuid4().hex
    computed = await generate(first, PROMPT, cache_salt=salt)
    fetched = await generate(second, PROMPT, cache_salt=salt, holders=[holder_hint(first, 24)])
    assert fetched.token_ids == computed.token_ids
    assert fetched.finish.timeline.mode == "fetched"
    assert fetched.finish.timeline.fetched_blocks == 24
    assert fetched.finish.cached_tokens == 24 * 16


async def test_hint_without_a_block_behind_it_costs_a_recompute(suite, generate):
    first, second = decode_workers(suite)
    salt = uuid.uuid4().hex
    lied_to = await generate(second, PROMPT, cache_salt=salt, holders=[holder_hint(first, 24)])
    assert lied_to.finish.timeline.fetched_blocks == 0
    assert lied_to.finish.timeline.missed_blocks == 24
    assert lied_to.token_ids == (await generate(first, PROMPT, cache_salt=salt)).token_ids


async def test_prefill_worker_that_is_gone_costs_a_recompute(suite, generate):
    first, _ = decode_workers(suite)
    nobody = pb.PeerRef(worker_id="prefill-9", incarnation="0123456789abcdef")
    reply = await generate(first, PROMPT, cache_salt=uuid.uuid4().hex, prefill_candidates=[nobody])
    assert reply.finish.timeline.mode == "local"
    assert len(reply.token_ids) == 8


async def test_submit_to_an_earlier_incarnation_is_refused(suite, generate):
    first, _ = decode_workers(suite)
    with pytest.raises(Exception, match="the call meant"):
        await generate({**first, "incarnation": "dead"}, PROMPT)


async def test_host_tier_hit_equals_recompute(suite, generate):
    """Fills the cache until the first prompt's blocks were evicted, then asks for it again."""
    first, _ = decode_workers(suite)
    salt = uuid.uuid4().hex
    before = await generate(first, PROMPT, cache_salt=salt)
    total = first["blocks"]["total"]
    for round_ in range(2 * total * 16 // 3000 + 1):
        other = [(13 * i + round_) % 1500 + 300 for i in range(3000)]
        await generate(first, other, cache_salt=uuid.uuid4().hex, max_tokens=1)
    deadline, again = time.monotonic() + 20, None
    while time.monotonic() < deadline and (again is None or again.finish.timeline.fetched_blocks == 0):
        again = await generate(first, PROMPT, cache_salt=salt, holders=[holder_hint(first, 24)])
        if again.finish.timeline.local_blocks:
            break
    assert again.token_ids == before.token_ids
    assert again.finish.timeline.fetched_blocks > 0
