"""What a step reads, writes and returns, on a model of random weights."""

import pytest
import torch

from kernels.backend import load_backend
from shared.engine.kv_cache import KvCache, num_blocks_for
from shared.engine.runner import ModelRunner
from shared.engine.sampling_params import SamplingParams
from shared.engine.sequence import Sequence
from shared.engine.step import ScheduledSequence, StepBatch
from shared.errors import ConfigurationError
from shared.kv_arena import KvLayout, SharedArena
from shared.models.config import ModelConfig
from shared.models.load import load_decoder

BLOCK_SIZE = 4
NUM_BLOCKS = 12
CPU = torch.device("cpu")
SENTINEL = 55.0


@pytest.fixture
def make_runner(tiny_qwen3, tmp_path):
    """Builds (runner, cache) over a cache full of a sentinel."""

    def make(*, with_lm_head=True, backend="cpu"):
        config = ModelConfig.from_pretrained(tiny_qwen3)
        model = load_decoder(
            tiny_qwen3,
            config,
            dtype="float32",
            device=CPU,
            backend=load_backend(backend, CPU),
            with_lm_head=with_lm_head,
        )
        layout = KvLayout(config.num_layers, BLOCK_SIZE, config.num_kv_heads, config.head_dim, "float32")
        cache = KvCache(SharedArena.create(tmp_path / "arena", NUM_BLOCKS, layout.block_bytes), layout)
        cache.tensor.fill_(SENTINEL)
        return ModelRunner(model, cache, max_batch_tokens=32, max_sequences=4, max_model_len=64), cache

    return make


def make_sequence(num_tokens, table, *, sampling="greedy", **fields):
    params = SamplingParams(max_tokens=9, temperature=0.0) if sampling == "greedy" else sampling
    tokens = [(7 * i + num_tokens) % 60 for i in range(num_tokens)]
    return Sequence("s", tokens, num_tokens, params, b"", block_table=list(table), **fields)


def whole(sequence):
    return ScheduledSequence(sequence, 0, sequence.num_tokens, not sequence.is_prefill_only)


def test_an_empty_step_returns_nothing(make_runner):
    runner, _ = make_runner()
    result = runner.execute(StepBatch([]))
    assert (result.token_ids, result.logprobs) == ([], [])


def test_only_sequences_that_reach_their_last_token_are_sampled(make_runner):
    runner, _ = make_runner()
    reaching = [make_sequence(3, [0]), make_sequence(5, [1, 2])]
    alone = [runner.execute(StepBatch([whole(s)])).token_ids[0] for s in reaching]
    chunk = ScheduledSequence(make_sequence(9, [3, 4, 5]), 0, 8, samples=False)
    assert runner.execute(StepBatch([whole(reaching[0]), chunk, whole(reaching[1])])).token_ids == alone


def test_a_step_writes_its_own_slots_and_clears_the_rest_of_a_block_it_begins(make_runner):
    runner, cache = make_runner()
    runner.execute(StepBatch([whole(make_sequence(6, [7, 2]))]))
    untouched = [block for block in range(NUM_BLOCKS) if block not in (7, 2)]
    assert bool((cache.tensor[untouched] == SENTINEL).all())
    assert not bool((cache.tensor[7] == SENTINEL).any())
    assert not bool((cache.tensor[2, :, :, :2] == SENTINEL).any())
    assert bool((cache.tensor[2, :, :, 2:] == 0).all())


def test_a_step_that_is_not_wanted_ends_before_its_next_layer_and_says_so(make_runner):
    runner, cache = make_runner(backend="native")
    sequence = make_sequence(6, [7, 2])
    unwanted = StepBatch([whole(sequence)])
    unwanted.unwanted.value = 1
    result = runner.execute(unwanted)
    assert (result.was_given_up, result.token_ids) == (True, [])
    assert bool((cache.tensor == SENTINEL).all())
    wanted = runner.execute(StepBatch([whole(sequence)]))
    assert not wanted.was_given_up
    assert len(wanted.token_ids) == 1
    assert not bool((cache.tensor[7] == SENTINEL).any())


def test_a_step_keeps_what_earlier_steps_wrote_in_a_partial_block(make_runner):
    runner, cache = make_runner()
    sequence = make_sequence(7, [3, 9])
    runner.execute(StepBatch([whole(sequence)]))
    at_once = cache.tensor[[3, 9]].clone()
    cache.tensor.fill_(SENTINEL)
    for begin, count in ((0, 3), (3, 2), (5, 1), (6, 1)):
        runner.execute(StepBatch([ScheduledSequence(sequence, begin, count, samples=False)]))
    torch.testing.assert_close(cache.tensor[[3, 9]], at_once, rtol=1e-5, atol=1e-5)


def test_a_prefill_worker_without_lm_head_stores_the_same_kv(make_runner):
    caches = []
    for with_lm_head in (True, False):
        runner, cache = make_runner(with_lm_head=with_lm_head)
        result = runner.execute(StepBatch([whole(make_sequence(8, [5, 6], sampling=None))]))
        assert result.token_ids == []
        caches.append(cache.tensor.clone())
    assert caches[0].equal(caches[1])


@pytest.mark.parametrize("with_lm_head", [True, False])
def test_warm_up_reports_progress_and_leaves_the_cache_alone(make_runner, with_lm_head):
    runner, cache = make_runner(with_lm_head=with_lm_head)
    seen = []
    runner.warm_up(lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))]
    assert len(seen) > 1
    assert bool((cache.tensor == SENTINEL).all())


def test_seeded_draws_and_logprobs_do_not_depend_on_the_batch(make_runner):
    runner, _ = make_runner()
    sampling = [
        SamplingParams(max_tokens=9, temperature=1.0, seed=5, num_logprobs=3),
        SamplingParams(max_tokens=9, temperature=0.8, top_p=0.9, seed=6),
        SamplingParams(max_tokens=9, temperature=0.0, repetition_penalty=1.4),
        SamplingParams(max_tokens=9, temperature=1.5, top_k=7, seed=5, num_logprobs=0),
    ]
    sequences = [make_sequence(3 + i, [2 * i, 2 * i + 1], sampling=p, choice=i % 2) for i, p in enumerate(sampling)]
    together = runner.execute(StepBatch([whole(s) for s in sequences]))
    for row, sequence in enumerate(sequences):
        alone = runner.execute(StepBatch([whole(sequence)]))
        assert alone.token_ids == [together.token_ids[row]]
        assert (alone.logprobs[0] is None) == (together.logprobs[row] is None)
        if together.logprobs[row] is not None:
            assert alone.logprobs[0].logprob == pytest.approx(together.logprobs[row].logprob, abs=1e-4)
            assert alone.logprobs[0].top_token_ids == together.logprobs[row].top_token_ids


def test_the_cache_is_the_arenas_own_memory(tmp_path):
    layout = KvLayout(num_layers=2, block_size=4, num_kv_heads=1, head_dim=8, dtype="bfloat16")
    arena = SharedArena.create(tmp_path / "arena", 3, layout.block_bytes)
    cache = KvCache(arena, layout)
    cache.layer(1)[2, 1, 3].fill_(1.0)
    assert (cache.num_blocks, tuple(cache.tensor.shape)) == (3, (3, *layout.block_shape))
    other = SharedArena.open(tmp_path / "arena", 3, layout.block_bytes)
    assert other.blocks[2].any()
    assert not other.blocks[:2].any()
    assert not other.blocks[2, : layout.block_bytes - 16].any()


def test_a_cache_refuses_an_arena_of_other_blocks(tmp_path):
    layout = KvLayout(num_layers=2, block_size=4, num_kv_heads=1, head_dim=8, dtype="float32")
    arena = SharedArena.create(tmp_path / "arena", 3, 64)
    with pytest.raises(ConfigurationError, match="blocks of 64 bytes, the model needs 512"):
        KvCache(arena, layout)


def test_a_budget_below_one_block_is_refused_with_both_numbers():
    layout = KvLayout(num_layers=2, block_size=4, num_kv_heads=1, head_dim=8, dtype="float32")
    assert num_blocks_for(1100, layout) == 2
    with pytest.raises(ConfigurationError, match="511 bytes is smaller than one block of 512"):
        num_blocks_for(511, layout)
