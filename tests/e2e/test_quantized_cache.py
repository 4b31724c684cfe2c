"""With int8 weights and an int8 KV cache tokens do not depend on who computed the prompt: own, remote, or the tier."""

from __future__ import annotations

import shutil
import time
import uuid

import pytest

from kernels.cpu.build import COMPILERS
from protos import worker_pb2 as pb
from tests.e2e.conftest import start_suite, stop_suite

PROMPT = [(41 * i + 7) % 1500 + 300 for i in range(600)]
NUM_BLOCKS = 160
pytestmark = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """One prefill and one decode worker with room for four of the prompts each."""
    arguments = ["--prefill", "1", "--decode", "1", "--threads", "1", "--kv-cache-dtype", "int8"]
    arguments += ["--quantization", "int8"]
    # Of pydoc-mini: 6 layers, 2 heads of 64 values and a scale, 16 tokens.
    block_bytes = 6 * 2 * 16 * 2 * 68
    run_dir = tmp_path_factory.mktemp("quantized")
    suite = start_suite(run_dir, *arguments, "--kv-cache-bytes", str(NUM_BLOCKS * block_bytes))
    yield suite
    stop_suite(suite)


def worker_of(suite, role: str) -> dict:
    return next(w for w in suite.status()["workers"] if w["role"] == role)


async def test_tokens_do_not_depend_on_where_the_prompts_kv_came_from(quantized, generate):
    decode, prefill = worker_of(quantized, "decode"), worker_of(quantized, "prefill")
    assert decode["blocks"]["total"] == NUM_BLOCKS
    salt = uuid.uuid4().hex
    local = await generate(decode, PROMPT, max_tokens=24, cache_salt=salt)
    peer = pb.PeerRef(worker_id=prefill["worker_id"], incarnation=prefill["incarnation"])
    remote = await generate(decode, PROMPT, max_tokens=24, cache_salt=uuid.uuid4().hex, prefill_candidates=[peer])
    assert (local.finish.timeline.mode, remote.finish.timeline.mode) == ("local", "remote_prefill")
    assert remote.finish.timeline.fetched_blocks == 37
    assert remote.token_ids == local.token_ids
    again, deadline = None, time.monotonic() + 20
    own = pb.PeerRef(worker_id=decode["worker_id"], incarnation=decode["transfer"]["incarnation"])
    while time.monotonic() < deadline and (again is None or again.finish.timeline.fetched_blocks == 0):
        for _ in range(4):  # a block that is evicted before it was copied is lost
            await generate(decode, PROMPT, cache_salt=uuid.uuid4().hex, max_tokens=1)
        hint = pb.HolderHint(holder=own, num_blocks=37)
        again = await generate(decode, PROMPT, max_tokens=24, cache_salt=salt, holders=[hint])
        assert again.token_ids == local.token_ids
    assert again.finish.timeline.fetched_blocks > 0, "the first prompt's blocks went to the host tier and came back"
    quantized.wait_for_baseline()
