"""The device runner's whole path, interpreted: engine, staged inputs, pending tokens, kernels, draws, two in flight."""

from __future__ import annotations

import dataclasses
import queue

import numpy as np
import pytest
import torch

from kernels.backend import load_backend
from shared.engine.block_pool import BlockPool
from shared.engine.config import EngineConfig
from shared.engine.device_kv_cache import DeviceKvCache
from shared.engine.device_runner import DeviceRunner
from shared.engine.engine import Engine
from shared.engine.runner import ModelRunner
from shared.engine.sampling_params import SamplingParams
from shared.engine.sequence import Pooling, Sequence
from shared.identity import Fingerprint, SessionId, namespace_hash
from shared.kv_arena import KvLayout
from shared.models.config import ModelConfig
from shared.models.decoder import Decoder, LayerWeights
from shared.models.rope import RopeScaling
from tests.kernels.triton.check_plugin import INTERPRETED

CPU = torch.device("cpu")
DEVICE = CPU if INTERPRETED else torch.device("cuda")
BLOCK_SIZE, NUM_BLOCKS, VOCABULARY = 16, 24, 96
LAYOUT = KvLayout(num_layers=2, block_size=BLOCK_SIZE, num_kv_heads=1, head_dim=32, dtype="float32")
LIMITS = {"max_batch_tokens": 16, "max_sequences": 4, "max_model_len": 64}
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_layers=2,
    num_heads=2, num_kv_heads=1, head_dim=32, rms_norm_eps=1e-5, rope=RopeScaling(10000.0), max_model_len=64,
    qkv_bias=False, output_bias=False, mlp_bias=False, qk_norm=False, tie_word_embeddings=False, eos_token_ids=(95,),
    checkpoint_dtype="float32",
)  # fmt: skip


def decoder(backend_name: str, device: torch.device) -> Decoder:
    """The same random weights for every backend."""
    generator = np.random.default_rng(3)
    backend = load_backend(backend_name, device)
    ones = torch.ones(64, device=device)

    def weight(*shape: int) -> torch.Tensor:
        return torch.from_numpy(generator.normal(size=shape).astype(np.float32) / shape[-1] ** 0.5).to(device)

    layers = [
        LayerWeights(
            attention_norm=ones, qkv=backend.linear(weight(128, 64), None), query_norm=None, key_norm=None,
            output=backend.linear(weight(64, 64), None), feed_forward_norm=ones,
            gate_up=backend.linear(weight(128, 64), None), down=backend.linear(weight(64, 64), None),
        )
        for _ in range(2)
    ]  # fmt: skip
    embedding, head = weight(VOCABULARY, 64) * 8, backend.linear(weight(VOCABULARY, 64) * 6, None)
    return Decoder(CONFIG, backend, embedding=embedding, layers=layers, final_norm=ones, lm_head=head)


def serve(
    runner: object, many_params: list[SamplingParams], *, are_choices: bool = False
) -> list[tuple[list[int], list[object]]]:
    """Output tokens and their log-probabilities, of prompts of different lengths, or of the choices of one session."""
    messages: queue.SimpleQueue = queue.SimpleQueue()
    config = EngineConfig(block_size=BLOCK_SIZE, eos_token_ids=frozenset(CONFIG.eos_token_ids), **LIMITS)
    engine = Engine(runner, BlockPool(NUM_BLOCKS, BLOCK_SIZE), config, messages.put)
    sequences = [
        Sequence(
            session_id=SessionId("one" if are_choices else str(i)),
            token_ids=[(7 * n + 3 * j) % 90 for j in range(5 + 9 * n)], num_prompt_tokens=5 + 9 * n,
            sampling=params, namespace=namespace_hash(Fingerprint("check")), choice=i if are_choices else 0,
        )
        for i, params in enumerate(many_params)
        for n in (1 if are_choices else i,)
    ]  # fmt: skip
    engine.submit(sequences)
    engine.start()
    finished, logprobs = 0, {one.sequence_id: [] for one in sequences}
    while finished < len(sequences):
        outputs = messages.get(timeout=60)
        for one, _, found in outputs.tokens:
            logprobs[one.sequence_id].append(found)
        finished += len(outputs.finished)
    engine.stop()
    engine.check_integrity()
    assert not engine.stats().failure
    return [(one.token_ids[one.num_prompt_tokens :], logprobs[one.sequence_id]) for one in sequences]


@pytest.fixture(autouse=True, scope="module")
def host_by_default():
    """Here every tensor says where it lives, as in a worker."""
    with CPU:
        yield


@pytest.fixture(scope="module")
def runners(host_by_default):
    device = DeviceRunner(decoder("triton", DEVICE), DeviceKvCache(NUM_BLOCKS, LAYOUT, DEVICE), **LIMITS)
    seen = []
    device.warm_up(lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == len(seen)
    return device, lambda: ModelRunner(decoder("cpu", CPU), DeviceKvCache(NUM_BLOCKS, LAYOUT, CPU), **LIMITS)


GREEDY = SamplingParams(max_tokens=4, temperature=0.0)
CASES = {
    "greedy and drawn": [GREEDY, SamplingParams(max_tokens=3, seed=5), SamplingParams(max_tokens=2, temperature=0.7)],
    "cut": [SamplingParams(max_tokens=3, top_k=5, seed=1), SamplingParams(max_tokens=3, top_p=0.7, seed=2), GREEDY],
    "edited": [
        SamplingParams(max_tokens=4, temperature=0.0, num_logprobs=2),
        SamplingParams(max_tokens=5, seed=4, frequency_penalty=0.5),
        SamplingParams(max_tokens=4, temperature=0.0, logit_bias={11: 3.0}, min_tokens=3),
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_the_device_runner_says_what_the_eager_runner_says(runners, name):
    device, eager = runners
    for (tokens, logprobs), (wanted, wanted_logprobs) in zip(
        serve(device, CASES[name]), serve(eager(), CASES[name]), strict=True
    ):
        assert tokens == wanted
        assert [p is None for p in logprobs] == [p is None for p in wanted_logprobs]
        for found, expected in zip(logprobs, wanted_logprobs, strict=True):
            if found is not None:
                assert found.top_token_ids == expected.top_token_ids
                assert found.logprob == pytest.approx(expected.logprob, abs=1e-4)


def test_over_an_fp8_cache_the_device_runner_says_what_the_reference_says():
    layout = dataclasses.replace(LAYOUT, dtype="float8_e4m3fn")
    device = DeviceRunner(decoder("triton", DEVICE), DeviceKvCache(NUM_BLOCKS, layout, DEVICE), **LIMITS)
    eager = ModelRunner(decoder("reference", CPU), DeviceKvCache(NUM_BLOCKS, layout, CPU), **LIMITS)
    several = [GREEDY, SamplingParams(max_tokens=4, seed=5)]
    assert [tokens for tokens, _ in serve(device, several)] == [tokens for tokens, _ in serve(eager, several)]


def test_choices_copy_the_block_that_the_first_one_has_begun_while_it_runs_on(runners):
    device, eager = runners
    params = [SamplingParams(max_tokens=3, seed=5)] * 3
    copies = []
    launch = device.launch
    device.launch = lambda batch: copies.extend(batch.copies) or launch(batch)
    try:
        choices = serve(device, params, are_choices=True)
    finally:
        del device.launch
    assert len(copies) == 2
    assert [tokens for tokens, _ in choices] == [tokens for tokens, _ in serve(eager(), params, are_choices=True)]


def test_a_pooled_prompt_has_the_vector_of_the_eager_runner(runners):
    device, eager = runners
    vectors = []
    for runner in (device, eager()):
        messages: queue.SimpleQueue = queue.SimpleQueue()
        config = EngineConfig(block_size=BLOCK_SIZE, **LIMITS)
        engine = Engine(runner, BlockPool(NUM_BLOCKS, BLOCK_SIZE), config, messages.put)
        one = Sequence(
            session_id=SessionId("pool"), token_ids=list(range(30)), num_prompt_tokens=30, sampling=None,
            pooling=Pooling.MEAN, namespace=namespace_hash(Fingerprint("pool")),
        )  # fmt: skip
        engine.submit([one])
        engine.start()
        while not messages.get(timeout=60).finished:
            pass
        engine.stop()
        vectors.append(torch.from_numpy(one.pooled / one.num_pooled_tokens))
    torch.testing.assert_close(vectors[0], vectors[1], atol=1e-4, rtol=1e-4)
