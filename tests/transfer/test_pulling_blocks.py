"""Receiver against sender, over both transports: whole transfers and every way they break."""

import asyncio
import contextlib
import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from shared.identity import BlockHash
from shared.transfer.checksum import block_checksum
from shared.transfer.grants import GrantBook, Source
from shared.transfer.loopback import LoopbackNetwork, LoopbackTransport
from shared.transfer.protocol import HEADER_BYTES, Header
from shared.transfer.receiver import BlockReceiver, Offer
from shared.transfer.sender import BlockSender
from shared.transfer.transport import TransportError
from shared.transfer.ucx import UcxTransport

pytestmark = pytest.mark.timeout(60)

BLOCK_BYTES = 200_000


def engine_failed(error):
    raise AssertionError("the engine failed") from error


class Peers:
    """A holder with blocks and a receiver with empty slots."""

    def __init__(self, near, far, executor):
        self.near, self.far = near, far
        self.grants = GrantBook()
        self.sender = BlockSender(self.grants, executor, handshake_s=1.0, idle_s=0.5)
        self.receiver = BlockReceiver(near, executor)
        rng = np.random.default_rng(0)
        self.blocks = rng.integers(0, 256, (12, BLOCK_BYTES), dtype=np.uint8)
        self.hashes = [BlockHash(rng.bytes(16)) for _ in range(12)]
        self.slots = np.zeros_like(self.blocks)

    def grant(self, indices, checksums=None):
        return self.grants.issue(
            [Source(self.hashes[i], self.blocks[i], None if checksums is None else checksums[i]) for i in indices],
            requester="near",
            fingerprint="model",
        )

    def offer(self, grant, **changes):
        key = changes.pop("key", grant.key)
        claims = dataclasses.replace(grant.claims, **changes)
        return Offer(peer="life-1", host="127.0.0.1", port=self.far.port, claims=claims, key=key)

    async def receive(self, grant, indices, slots=None, **changes):
        slots = indices if slots is None else slots
        async with asyncio.timeout(30):
            return await self.receiver.receive(
                self.offer(grant, **changes), [self.hashes[i] for i in indices], [self.slots[i] for i in slots]
            )


@pytest.fixture(params=["loopback", "ucx"])
async def peers(request):
    if request.param == "loopback":
        network = LoopbackNetwork()
        near, far = LoopbackTransport(network), LoopbackTransport(network)
    else:
        near, far = (UcxTransport("tcp", "127.0.0.1", 0, on_failure=engine_failed) for _ in range(2))
    with ThreadPoolExecutor(2) as executor:
        peers = Peers(near, far, executor)
        await near.start(lambda endpoint: None)
        await far.start(peers.sender.serve)
        yield peers
        await peers.receiver.close_idle(older_than_s=0)
        await peers.sender.stop()
        await near.stop()
        await far.stop()


async def test_granted_blocks_arrive_verified_in_their_slots(peers):
    indices, slots = [3, 1, 7], [0, 5, 2]
    grant = peers.grant(indices)
    received = await peers.receive(grant, indices, slots)
    assert received.verified == [True] * 3
    assert (peers.slots[slots] == peers.blocks[indices]).all()
    assert not np.delete(peers.slots, slots, axis=0).any()
    assert await asyncio.wait_for(grant.finished, 30) is True


async def test_an_endpoint_serves_many_transfers(peers):
    for i in range(5):
        await peers.receive(peers.grant([i]), [i])
    assert peers.sender.num_endpoints == 1
    assert (peers.slots[:5] == peers.blocks[:5]).all()


async def test_transfers_at_once_do_not_mix(peers):
    async def one(i):
        return await peers.receive(peers.grant([i, 11 - i]), [i, 11 - i])

    received = await asyncio.gather(*(one(i) for i in range(6)))
    assert all(r.verified == [True, True] for r in received)
    assert (peers.slots == peers.blocks).all()


async def test_bytes_that_changed_since_their_checksum_are_not_verified(peers):
    checksums = [block_checksum(block) for block in peers.blocks]
    peers.blocks[4, 777] ^= 1
    grant = peers.grant([3, 4, 5], checksums)
    received = await peers.receive(grant, [3, 4, 5])
    assert received.verified == [True, False, True]
    await grant.finished
    assert grant.corrupt == [peers.hashes[4]]


async def test_bytes_that_change_between_checksum_and_send_are_not_verified(peers, monkeypatch):
    """The sender's checksum is of other bytes than those that travelled."""

    def checksum_then_flip(blocks, executor):
        checksums = [block_checksum(block) for block in blocks]
        checksums[1] ^= 1
        done = asyncio.get_running_loop().create_future()
        done.set_result(checksums)
        return done

    monkeypatch.setattr("shared.transfer.sender.checksums_of", checksum_then_flip)
    received = await peers.receive(peers.grant([0, 1]), [0, 1])
    assert received.verified == [True, False]


async def test_a_block_under_another_name_is_not_verified(peers):
    received = await peers.receive(peers.grant([0, 1]), [0, 2], slots=[0, 1])
    assert received.verified == [True, False]


@pytest.mark.parametrize(
    "change",
    [
        {"key": b"x" * 32},
        {"transfer_id": b"x" * 16},
        {"requester": b"x" * 16},
        {"fingerprint": b"x" * 16},
        {"blocks": b"x" * 16},
        {"block_bytes": BLOCK_BYTES + 1},
        {"expires_ms": 2**60},
    ],
    ids=lambda change: next(iter(change)),
)
async def test_a_wrong_key_or_claim_gets_nothing(peers, change):
    grant = peers.grant([0])
    with pytest.raises(TransportError):
        await peers.receive(grant, [0], **change)
    assert not peers.slots.any()
    assert peers.sender.refused >= 1


async def test_a_used_grant_gets_nothing(peers):
    grant = peers.grant([0])
    await peers.receive(grant, [0])
    with pytest.raises(TransportError):
        await peers.receive(grant, [0], slots=[1])
    assert not peers.slots[1].any()


async def test_a_header_that_asks_for_more_than_was_granted_gets_nothing(peers):
    grant = peers.grant([0])
    with pytest.raises(TransportError):
        await peers.receive(grant, [0, 1], num_blocks=2)
    assert not peers.slots.any()


@pytest.mark.parametrize("payload", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\0" * HEADER_BYTES, b"\xff" * HEADER_BYTES])
async def test_a_peer_that_talks_nonsense_or_nothing_is_dropped(peers, payload):
    endpoint = await peers.near.connect("127.0.0.1", peers.far.port)
    await endpoint.send(payload or b"x")
    with pytest.raises(TransportError):
        await asyncio.wait_for(endpoint.receive(1), 30)
    await endpoint.close()
    await peers.receive(peers.grant([0]), [0])


async def test_too_many_connections_are_refused(peers):
    peers.sender._max_endpoints = 2
    peers.sender._handshake_s = 10
    endpoints = [await peers.near.connect("127.0.0.1", peers.far.port) for _ in range(4)]
    try:
        for endpoint in endpoints:
            with contextlib.suppress(TransportError):  # a refusal may come that soon
                await endpoint.send(b"x")
        await asyncio.sleep(0.2)
        assert peers.sender.num_endpoints == 2
        assert peers.sender.refused == 2
    finally:
        for endpoint in endpoints:
            await endpoint.close()


async def test_a_pooled_endpoint_that_the_sender_dropped_is_replaced(peers):
    await peers.receive(peers.grant([0]), [0])
    await asyncio.sleep(0.8)  # longer than idle_s: the sender has closed its end
    assert peers.sender.num_endpoints == 0
    received = await peers.receive(peers.grant([1]), [1])
    assert received.verified == [True]


async def test_a_cancelled_receive_leaves_its_slots_alone_for_good(peers):
    big = np.random.default_rng(1).integers(0, 256, (8, 8 << 20), dtype=np.uint8)
    slots = np.zeros_like(big)
    for delay_s in (0.0, 0.002, 0.006, 0.02):
        grant = peers.grants.issue(
            [Source(peers.hashes[i], big[i]) for i in range(8)], requester="near", fingerprint="model"
        )
        receiving = asyncio.create_task(peers.receiver.receive(peers.offer(grant), peers.hashes[:8], list(slots)))
        await asyncio.sleep(delay_s)
        receiving.cancel()
        await asyncio.wait({receiving})
        slots[:] = 0
        await asyncio.sleep(0.05)
        assert not slots.any()
    # The plane still works.
    assert (await peers.receive(peers.grant([0]), [0])).verified == [True]


async def test_a_sender_stopped_by_its_owner_tells_when_the_sources_are_free(peers):
    """A claimed grant whose endpoint is closed from outside finishes, as not sent."""
    grant = peers.grant([0])
    endpoint = await peers.near.connect("127.0.0.1", peers.far.port)
    # No receive is posted: the sender waits with the blocks in its hands (they are too big to be sent eagerly).
    await endpoint.send(Header.signed(grant.claims, 1 << 16, grant.key).encode())
    async with asyncio.timeout(30):
        while grant.endpoint is None:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert not grant.finished.done()
        await grant.endpoint.close()
        assert await grant.finished is False
    await endpoint.close()


async def test_a_damaged_wire_is_noticed():
    network = LoopbackNetwork()
    near, far = LoopbackTransport(network), LoopbackTransport(network)

    def flip_a_bit(block):
        block[block.nbytes // 2] ^= 0x10

    with ThreadPoolExecutor(1) as executor:
        peers = Peers(near, far, executor)
        await near.start(lambda endpoint: None)
        await far.start(peers.sender.serve)
        network.damage = flip_a_bit
        assert (await peers.receive(peers.grant([0, 1]), [0, 1])).verified == [False, False]
        await peers.sender.stop()


async def test_a_stalled_wire_ends_with_the_callers_timeout():
    network = LoopbackNetwork()
    near, far = LoopbackTransport(network), LoopbackTransport(network)
    with ThreadPoolExecutor(1) as executor:
        peers = Peers(near, far, executor)
        await near.start(lambda endpoint: None)
        await far.start(peers.sender.serve)
        network.is_stalled = True
        grant = peers.grant([0])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await peers.receive(grant, [0])
        network.is_stalled = False
        await asyncio.sleep(0.05)
        assert not peers.slots.any()
        assert await asyncio.wait_for(grant.finished, 30) is False
        await peers.sender.stop()


async def test_a_block_given_away_while_it_was_sent_is_withdrawn_and_not_taken_for_damage(peers):
    grant = peers.grant([0, 1, 2])
    whole, gone, last = grant.sources
    grant.sources = [whole, gone._replace(is_intact=lambda: False), last]
    received = await peers.receive(grant, [0, 1, 2])
    assert received.verified == [True, False, True]
    assert received.withdrawn == [False, True, False]


async def test_a_known_checksum_of_a_live_block_is_not_computed_again(peers, monkeypatch):
    computed = []

    def note(blocks, executor):
        computed.extend(blocks)
        done = asyncio.get_running_loop().create_future()
        done.set_result([block_checksum(block) for block in blocks])
        return done

    monkeypatch.setattr("shared.transfer.sender.checksums_of", note)
    grant = peers.grant([0, 1])
    grant.sources = [
        source._replace(checksum=block_checksum(source.block), is_suspect=False) for source in grant.sources
    ]
    assert (await peers.receive(grant, [0, 1])).verified == [True, True]
    assert computed == []
