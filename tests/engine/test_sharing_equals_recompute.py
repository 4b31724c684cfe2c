"""With native kernels a begun block that is copied holds the bits that computing it again would give."""

from __future__ import annotations

import queue
from dataclasses import replace

import pytest
import torch

from kernels.backend import load_backend
from services.decode.beams import BeamSearch
from shared.engine.block_pool import BlockPool
from shared.engine.config import EngineConfig
from shared.engine.engine import Engine
from shared.engine.kv_cache import KvCache
from shared.engine.runner import ModelRunner
from shared.engine.sampling_params import SamplingParams
from shared.engine.sequence import Sequence
from shared.identity import Fingerprint, SessionId, namespace_hash
from shared.kv_arena import KvLayout, SharedArena
from shared.models.config import ModelConfig
from shared.models.load import load_decoder
from shared.models.resolve import resolve_model

CPU = torch.device("cpu")
BLOCK_SIZE = 16
NUM_BLOCKS = 96
PROMPT = [(37 * i) % 4000 + 5 for i in range(43)]


class Bench:
    """An engine with its thread and the bundled model, and all that came out of it."""

    def __init__(self, directory, kv_dtype):
        config = ModelConfig.from_pretrained(resolve_model("pydoc-mini"), max_model_len=512)
        backend = load_backend("native", CPU)
        model = load_decoder(resolve_model("pydoc-mini"), config, dtype="float32", device=CPU, backend=backend)
        layout = KvLayout(config.num_layers, BLOCK_SIZE, config.num_kv_heads, config.head_dim, kv_dtype)
        self.arena = SharedArena.create(directory / "arena", NUM_BLOCKS, layout.block_bytes)
        limits = {"max_batch_tokens": 256, "max_sequences": 16, "max_model_len": 512}
        runner = ModelRunner(model, KvCache(self.arena, layout), **limits)
        self.outputs = queue.SimpleQueue()
        self.engine = Engine(
            runner, BlockPool(NUM_BLOCKS, BLOCK_SIZE), EngineConfig(block_size=BLOCK_SIZE, **limits), self.outputs.put
        )

    def run(self, sequences, submit):
        """Submits and waits for the end; every token with its log-probabilities, by sequence."""
        submit()
        found, finished = {one.sequence_id: [] for one in sequences}, 0
        while finished < len(sequences):
            step = self.outputs.get(timeout=60)
            finished += len(step.finished)
            for one, token, logprobs in step.tokens:
                found[one.sequence_id].append((token, logprobs))
        return [found[one.sequence_id] for one in sequences]


@pytest.fixture(scope="module", params=["float32", "int8"])
def bench(request, tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("arena"), request.param)
    bench.engine.start()
    yield bench
    bench.engine.stop()
    bench.engine.check_integrity()
    bench.arena.unlink()


def make(tokens, params, namespace, *, session="s", **fields):
    return Sequence(SessionId(session), list(tokens), len(PROMPT), params, namespace, **fields)


def search(bench, width, length, namespace, *, shares):
    """Beams' tokens and the bits of their sums; without sharing each beam of each step computes its begun block."""
    params = SamplingParams(max_tokens=length, beam_width=width, temperature=0.0, num_logprobs=2 * width)
    found, before = BeamSearch(params, frozenset()), []
    while not found.is_over:
        sequences = [
            make([*PROMPT, *beam.token_ids], replace(params, max_tokens=len(beam.token_ids) + 1), namespace,
                 choice=number, session=f"s{number}", keeps_blocks=shares)
            for number, beam in enumerate(found.beams)
        ]  # fmt: skip
        if before and shares:
            branches = list(zip([before[number] for number in found.origins], sequences, strict=True))
            tokens = bench.run(sequences, lambda: bench.engine.branch(before, branches))  # noqa: B023
        else:
            tokens = bench.run(sequences, lambda: bench.engine.submit(sequences))  # noqa: B023
        found.advance([logprobs for ((_, logprobs),) in tokens])
        before = sequences
    for one in before:
        bench.engine.release(one)
    return [(beam.token_ids, beam.total.hex()) for beam in found.best()]


@pytest.mark.parametrize("width", [2, 4, 6])
def test_beams_that_share_equal_beams_that_compute_everything_themselves(bench, width):
    namespaces = [namespace_hash(Fingerprint(f"{width}{shares}")) for shares in (True, False)]
    sharing = search(bench, width, 40, namespaces[0], shares=True)
    computed = bench.engine.stats().prefilled_tokens
    assert sharing == search(bench, width, 40, namespaces[1], shares=False)
    assert bench.engine.stats().prefilled_tokens > computed + 40
    assert bench.engine.stats().blocks.used == 0


def test_choices_that_share_equal_sessions_of_their_own(bench):
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=11, num_logprobs=3, ignore_eos=True)
    results = []
    for number, session in enumerate(["one", None]):
        namespace = namespace_hash(Fingerprint(f"n{number}"))
        before = bench.engine.stats().prefilled_tokens
        choices = [make(PROMPT, params, namespace, session=session or f"alone{c}", choice=c) for c in range(4)]
        results.append(bench.run(choices, lambda: bench.engine.submit(choices)))  # noqa: B023
        if session:
            assert bench.engine.stats().prefilled_tokens == before + len(PROMPT)
    assert results[0] == results[1]
    assert len({tuple(token for token, _ in choice) for choice in results[0]}) == 4
