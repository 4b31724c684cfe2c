"""Vectors of the real engine against transformers on random weights: chunked, batched, cached, preempted."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from kernels.backend import load_backend
from shared.engine.block_pool import BlockPool
from shared.engine.config import EngineConfig
from shared.engine.engine import Engine
from shared.engine.kv_cache import KvCache
from shared.engine.runner import ModelRunner
from shared.engine.sampling_params import SamplingParams
from shared.engine.sequence import FinishReason, Pooling, Sequence
from shared.identity import Fingerprint, SessionId, namespace_hash
from shared.kv_arena import KvLayout, SharedArena
from shared.models.config import ModelConfig
from shared.models.load import load_decoder

BLOCK_SIZE = 16
SIZES = {
    "vocab_size": 307,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}
FAMILIES = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen3": (Qwen3ForCausalLM, Qwen3Config)}
NAMESPACE = namespace_hash(Fingerprint("pooling"))
TOLERANCE = 2e-5
"""Of hidden states up to about 4: both sides sum in float32, in different orders."""


@pytest.fixture(scope="module", params=list(FAMILIES))
def checkpoint(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    model_class, config_class = FAMILIES[request.param]
    torch.manual_seed(5)
    model = model_class(config_class(**SIZES))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def prompts():
    source = random.Random(3)
    return [[source.randrange(307) for _ in range(length)] for length in (1, 15, 16, 17, 40, 64, 65, 130)]


@pytest.fixture(scope="module")
def expected(checkpoint, prompts):
    """Per pooling, transformers' vectors."""
    model = AutoModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        states = [model(torch.tensor([prompt])).last_hidden_state[0] for prompt in prompts]
    return {
        Pooling.LAST: [state[-1].numpy() for state in states],
        Pooling.MEAN: [state.mean(0).numpy() for state in states],
    }


class Pooled:
    """An engine that is told to pool, and waits."""

    def __init__(self, checkpoint, directory, *, num_blocks, max_batch_tokens=32):
        torch.set_num_threads(1)
        config, device = ModelConfig.from_pretrained(checkpoint), torch.device("cpu")
        backend = load_backend("cpu", device)
        model = load_decoder(checkpoint, config, dtype="float32", device=device, backend=backend, with_lm_head=True)
        layout = KvLayout(config.num_layers, BLOCK_SIZE, config.num_kv_heads, config.head_dim, "float32")
        arena = SharedArena.create(directory / "arena", num_blocks, layout.block_bytes)
        runner = ModelRunner(
            model, KvCache(arena, layout), max_batch_tokens=max_batch_tokens, max_sequences=16, max_model_len=256
        )
        self.ended, self.news = {}, threading.Condition()
        limits = EngineConfig(
            block_size=BLOCK_SIZE,
            max_model_len=256,
            eos_token_ids=frozenset(),
            max_batch_tokens=max_batch_tokens,
            max_sequences=16,
            role="decode",
        )
        self.engine = Engine(runner, BlockPool(num_blocks, BLOCK_SIZE), limits, self._on_step)
        self.engine.start()

    def _on_step(self, outputs):
        with self.news:
            self.ended |= {sequence.sequence_id: sequence for sequence in outputs.finished}
            self.news.notify_all()

    def run(self, sequences):
        self.engine.submit(sequences)
        with self.news:
            assert self.news.wait_for(lambda: all(s.sequence_id in self.ended for s in sequences), timeout=60)
        self.engine.check_integrity()


@pytest.fixture
def pooled(checkpoint, tmp_path):
    made = []

    def make(**sizes):
        made.append(Pooled(checkpoint, tmp_path, **sizes))
        return made[-1]

    yield make
    for one in made:
        one.engine.stop()


def to_pool(prompt, pooling, index=0):
    return Sequence(SessionId(f"s{index}"), list(prompt), len(prompt), None, NAMESPACE, pooling=pooling)


def to_generate(prompt, index, max_tokens=30):
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Sequence(SessionId(f"g{index}"), list(prompt), len(prompt), sampling, NAMESPACE)


def assert_vectors(sequences, expected):
    for sequence, vector in zip(sequences, expected, strict=True):
        assert sequence.finish_reason is FinishReason.POOLED
        assert np.abs(sequence.pooled / sequence.num_pooled_tokens - vector).max() < TOLERANCE


@pytest.mark.parametrize("pooling", list(Pooling))
def test_vectors_equal_transformers_whatever_the_chunks_and_the_cache(pooled, prompts, expected, pooling):
    engine = pooled(num_blocks=96)
    for attempt in range(2):  # the second time, every prompt's KV is cached
        sequences = [to_pool(prompt, pooling, f"{attempt}/{i}") for i, prompt in enumerate(prompts)]
        engine.run(sequences)
        assert_vectors(sequences, expected[pooling])
    assert engine.engine.stats().blocks.used == 0


def test_vectors_are_right_beside_generation_that_takes_their_blocks(pooled, prompts, expected):
    engine = pooled(num_blocks=20)
    pooling = [to_pool(prompt, Pooling.MEAN, i) for i, prompt in enumerate(prompts)]
    generating = [to_generate(prompts[3][i:], i, max_tokens=110) for i in range(4)]  # 32 blocks in all
    engine.run([*generating, *pooling])
    assert_vectors(pooling, expected[Pooling.MEAN])
    assert {s.finish_reason for s in generating} == {FinishReason.LENGTH}
    assert engine.engine.stats().preemptions > 0


def test_a_preempted_mean_goes_on_where_it_was(pooled, checkpoint, prompts, expected):
    engine, prompt = pooled(num_blocks=96), prompts[-1]
    model = AutoModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        states = model(torch.tensor([prompt])).last_hidden_state[0].double().numpy()
    engine.run([to_pool(prompt, Pooling.LAST)])  # its KV is cached from now on
    begun = to_pool(prompt, Pooling.MEAN)
    begun.add_pooled(states[:37].sum(0), 37)
    engine.run([begun])
    assert begun.num_cached_tokens == 32
    assert begun.num_pooled_tokens == len(prompt)
    assert_vectors([begun], [expected[Pooling.MEAN][-1]])
