"""Records, holders and hints through a real Redis."""

import asyncio
import dataclasses
import time

import pytest

from shared.directory.client import Directory
from shared.directory.records import GatewayRecord, TransferRecord, WorkerLoad, WorkerRecord
from shared.errors import ConfigurationError
from shared.identity import Fingerprint, extend_hashes, namespace_hash, new_incarnation
from tests.directory.waiting import until

pytestmark = pytest.mark.timeout(60)

HASHES = extend_hashes(namespace_hash(Fingerprint("model")), list(range(160)), 16)


def worker_record(worker_id="decode-0", **changes):
    record = WorkerRecord(
        worker_id=worker_id,
        role="decode",
        model="pydoc-mini",
        fingerprint="f" * 32,
        incarnation=new_incarnation(),
        address="127.0.0.1:7001",
        pid=1,
        block_size=16,
        max_model_len=2048,
        vocab_size=4096,
        block_bytes=65536,
        started_at=0.0,
    )
    return dataclasses.replace(record, **changes)


def transfer_record(holder, worker_id="decode-0"):
    return TransferRecord(worker_id, new_incarnation(), "f" * 32, "127.0.0.1:7002", holder.index, 2)


async def until_published(*holders):
    await until(lambda: all(holder.num_unpublished == 0 for holder in holders))
    await asyncio.sleep(0.05)  # the last batch is taken off the list before Redis has it


@pytest.fixture
async def open_directory(fresh_redis_url):
    opened = []

    async def make(**options):
        directory = Directory(fresh_redis_url, **{"heartbeat_s": 0.2, "lookup_timeout_s": 0.5, **options})
        opened.append(directory)
        await directory.start()
        return directory

    yield make
    await asyncio.gather(*(directory.close() for directory in opened))


async def test_a_record_is_seen_by_others_with_every_field(open_directory):
    mine, theirs = await open_directory(), await open_directory()
    worker = worker_record(load=WorkerLoad(running=3, free_blocks=7, prefill_tokens_per_s=1.5))
    gateway = GatewayRecord("gw", new_incarnation(), "127.0.0.1:8000", 4)
    await mine.announce(lambda: worker)
    await mine.announce(lambda: gateway)
    await until(lambda: theirs.workers() and theirs.gateways())
    assert theirs.workers() == (worker,)
    assert theirs.gateways() == (gateway,)
    assert theirs.transfers() == ()
    await until(lambda: theirs.healthy)


async def test_each_heartbeat_carries_the_current_value(open_directory):
    mine, theirs = await open_directory(), await open_directory()
    record = worker_record()
    await mine.announce(lambda: record)
    await until(theirs.workers)
    changed = asyncio.create_task(theirs.wait_for_change())
    record = dataclasses.replace(record, load=WorkerLoad(waiting=9))
    await asyncio.wait_for(changed, 30)
    assert theirs.workers()[0].load.waiting == 9


async def test_a_dead_process_disappears_after_three_heartbeats(open_directory):
    mine, theirs = await open_directory(), await open_directory()
    await mine.announce(worker_record)
    await until(theirs.workers)
    for task in mine._tasks:
        task.cancel()
    died = time.monotonic()
    await until(lambda: not theirs.workers())
    assert time.monotonic() - died > 0.3


async def test_a_withdrawn_record_disappears_at_once(open_directory):
    mine, theirs = await open_directory(heartbeat_s=30), await open_directory()
    record = worker_record()
    await mine.announce(lambda: record)
    await until(theirs.workers)
    await mine.withdraw()
    await until(lambda: not theirs.workers())


async def test_a_restarted_worker_replaces_its_dead_predecessor_and_outlives_its_farewell(open_directory):
    old, new, theirs = await open_directory(heartbeat_s=30), await open_directory(), await open_directory()
    first, second = worker_record(), worker_record()
    await old.announce(lambda: first)
    await until(lambda: theirs.workers() == (first,))
    await new.announce(lambda: second)
    await until(lambda: theirs.workers() == (second,))
    await old.close()
    await asyncio.sleep(0.3)
    assert theirs.workers() == (second,)


async def test_only_watched_kinds_are_read(open_directory):
    mine, theirs = await open_directory(), await open_directory(watch=(GatewayRecord,))
    await mine.announce(worker_record)
    await mine.announce(lambda: GatewayRecord("gw", new_incarnation(), "a:1", 4))
    await until(theirs.gateways)
    with pytest.raises(KeyError):
        theirs.workers()


async def test_a_record_of_another_version_is_ignored_when_it_cannot_be_read(open_directory, fresh_redis_url):
    import redis.asyncio

    theirs = await open_directory()
    async with redis.asyncio.from_url(fresh_redis_url) as client:
        await client.sadd("tandem:{members}:worker", "odd", "newer")
        await client.set("tandem:{members}:worker:odd", b'{"worker_id": 7}')
        mine = await open_directory()
        await mine.announce(lambda: worker_record("newer"))
        raw = await client.get("tandem:{members}:worker:newer")
        await mine.withdraw()
        await client.sadd("tandem:{members}:worker", "newer")
        await client.set("tandem:{members}:worker:newer", raw.replace(b'{"worker_id"', b'{"later": 1, "worker_id"'))
        await until(theirs.workers)
    assert [record.worker_id for record in theirs.workers()] == ["newer"]


async def test_a_heartbeat_survives_a_defect_in_the_owners_callback(open_directory):
    mine, theirs = await open_directory(), await open_directory()
    outcome = [worker_record()]
    await mine.announce(lambda: outcome[0])
    outcome[0] = None
    await until(lambda: not theirs.workers())
    outcome[0] = worker_record("again")
    await until(theirs.workers)


async def test_lookup_gives_every_holders_longest_prefix(open_directory):
    a, b, reader = await open_directory(), await open_directory(), await open_directory()
    holder_a = await a.claim_holder(new_incarnation(), lambda: [*HASHES[:4], *HASHES[5:]])
    holder_b = await b.claim_holder(new_incarnation(), list)
    holder_b.publish(HASHES[:7], [])
    await until_published(holder_a, holder_b)
    assert {holder_a.index, holder_b.index} == {0, 1}
    assert await reader.longest_prefixes(HASHES) == {holder_a.index: 4, holder_b.index: 7}
    assert await reader.longest_prefixes(HASHES[5:]) == {holder_a.index: 5, holder_b.index: 2}
    assert await reader.longest_prefixes([]) == {}


async def test_a_prefix_may_end_at_any_border_of_the_looks_that_find_it(open_directory):
    hashes = extend_hashes(namespace_hash(Fingerprint("model")), list(range(16 * 1050)), 16)
    lengths = [15, 16, 17, 1039, 1040, 1041, len(hashes)]
    owners, reader = [await open_directory() for _ in lengths], await open_directory()
    holders = [
        await owner.claim_holder(new_incarnation(), lambda length=length: hashes[:length])
        for owner, length in zip(owners, lengths, strict=True)
    ]
    await until_published(*holders)
    assert await reader.longest_prefixes(hashes) == {
        holder.index: length for holder, length in zip(holders, lengths, strict=True)
    }


async def test_find_holders_names_live_kv_transfers_longest_first(open_directory):
    a, b, reader = await open_directory(), await open_directory(), await open_directory()
    holder_a = await a.claim_holder(new_incarnation(), lambda: HASHES[:2])
    holder_b = await b.claim_holder(new_incarnation(), lambda: HASHES[:5])
    await a.announce(lambda: transfer_record(holder_a, "decode-0"))
    await b.announce(lambda: transfer_record(holder_b, "decode-1"))
    await until_published(holder_a, holder_b)
    await until(lambda: len(reader.transfers()) == 2)
    matches = await reader.find_holders(HASHES)
    assert [(m.transfer.worker_id, m.num_blocks) for m in matches] == [("decode-1", 5), ("decode-0", 2)]
    await b.withdraw()
    await until(lambda: len(reader.transfers()) == 1)
    assert [m.transfer.worker_id for m in await reader.find_holders(HASHES)] == ["decode-0"]


async def test_an_evicted_block_shortens_the_prefix_and_the_last_bit_takes_the_key(open_directory, fresh_redis_url):
    import redis.asyncio

    directory = await open_directory()
    holder = await directory.claim_holder(new_incarnation(), list)
    holder.publish(HASHES[:3], [])
    holder.publish(HASHES[3:4], HASHES[2:3])
    holder.publish([], HASHES[9:])  # never published: leaves nothing behind
    await until_published(holder)
    assert await directory.longest_prefixes(HASHES) == {holder.index: 2}
    async with redis.asyncio.from_url(fresh_redis_url) as client:
        assert sorted(await client.keys("tkv:*")) == sorted(b"tkv:" + h for h in (*HASHES[:2], HASHES[3]))
        assert await client.ttl(b"tkv:" + HASHES[0]) > 3000


async def test_leaving_revokes_hints_and_frees_the_index(open_directory, fresh_redis_url):
    import redis.asyncio

    directory = await open_directory()
    holder = await directory.claim_holder(new_incarnation(), lambda: HASHES)
    await until_published(holder)
    await directory.close()
    async with redis.asyncio.from_url(fresh_redis_url) as client:
        assert await client.keys("tkv:*") == []
        assert await client.keys("tandem:{holders}:*") == []


async def test_a_crashed_holders_index_is_not_given_to_its_successor(open_directory):
    crashed, successor = await open_directory(), await open_directory()
    first = await crashed.claim_holder(new_incarnation(), lambda: HASHES)
    second = await successor.claim_holder(new_incarnation(), list)
    await until_published(first)
    assert first.index != second.index
    assert second.index not in await successor.longest_prefixes(HASHES)


async def test_twenty_holders_that_start_together_get_distinct_indices(open_directory):
    directories = [await open_directory() for _ in range(20)]
    holders = await asyncio.gather(*(d.claim_holder(new_incarnation(), list) for d in directories))
    await until(lambda: all(holder.index >= 0 for holder in holders))
    assert sorted(holder.index for holder in holders) == list(range(20))


async def test_of_several_changes_to_one_block_the_last_counts(open_directory):
    directory = await open_directory()
    holder = await directory.claim_holder(new_incarnation(), list)
    holder.publish(HASHES, [])
    holder.publish([], HASHES[1:])
    holder.publish(HASHES[1:2], [])
    await until_published(holder)
    assert await directory.longest_prefixes(HASHES) == {holder.index: 2}


async def test_blocks_evicted_during_a_full_republish_are_not_published(open_directory):
    directory = await open_directory()
    many = extend_hashes(namespace_hash(Fingerprint("big")), [7] * 16 * 3000, 16)
    holder = await directory.claim_holder(new_incarnation(), lambda: many)
    holder.publish([], many[1:])
    await until_published(holder)
    assert await directory.longest_prefixes(many) == {holder.index: 1}


async def test_a_malformed_url_is_a_configuration_error():
    with pytest.raises(ConfigurationError, match="redis_url"):
        Directory("localhost:6379")
