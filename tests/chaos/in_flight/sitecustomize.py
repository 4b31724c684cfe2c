"""Lies on the PYTHONPATH of a suite under test: its sidecars send what the control file says, not what they should.

Its supervisor restarts what dies again and again as soon as what dies once: else most of an hour of faults is pauses.
Python imports a module of this name at start. Nothing in the product knows of it.
"""

import os
import sys

if "services.cli.detached" in sys.orig_argv and "TANDEM_CHAOS_CONTROL" in os.environ:
    import functools

    from services.cli import supervisor

    supervisor.Backoff = functools.partial(supervisor.Backoff, limit_s=0.5)

if "services.kv_transfer" in sys.orig_argv and "TANDEM_CHAOS_CONTROL" in os.environ:
    import asyncio
    import json
    import random

    from shared.transfer import ucx
    from shared.transfer.transport import TransportError

    control = os.environ["TANDEM_CHAOS_CONTROL"]
    send_as_is = ucx._UcxEndpoint.send_blocks
    rng = random.Random(os.getpid())
    known: tuple[float, dict] = (0.0, {})

    def faults() -> dict:
        global known
        changed = os.stat(control).st_mtime
        if changed != known[0]:
            with open(control) as file:
                known = changed, json.load(file)
        return known[1]

    def flipped(block):
        copy = block.copy()
        copy.reshape(-1)[rng.randrange(copy.size)] ^= 1 << rng.randrange(8)
        return copy

    async def late(endpoint, blocks, tag_base, last, seconds):
        await asyncio.sleep(seconds)
        await send_as_is(endpoint, blocks, tag_base, last)

    async def never(endpoint, last):
        """Says that all was sent, and sends no block."""
        if last is not None:
            await endpoint.send(last())

    async def cut(endpoint):
        await endpoint.close()
        raise TransportError("cut by the chaos harness")

    def send_blocks(endpoint, blocks, tag_base, last=None):
        chances = faults()
        if rng.random() < chances.get("cut", 0):
            return asyncio.ensure_future(cut(endpoint))
        if rng.random() < chances.get("drop", 0):
            return asyncio.ensure_future(never(endpoint, last))
        if rng.random() < chances.get("corrupt", 0):
            victim = rng.randrange(len(blocks))
            blocks = [flipped(block) if i == victim else block for i, block in enumerate(blocks)]
        if len(blocks) > 1 and rng.random() < chances.get("reorder", 0):
            blocks = [*blocks[1:], blocks[0]]
        if rng.random() < chances.get("delay", 0):
            return asyncio.ensure_future(late(endpoint, blocks, tag_base, last, rng.uniform(0.05, 1.0)))
        return send_as_is(endpoint, blocks, tag_base, last)

    ucx._UcxEndpoint.send_blocks = send_blocks
