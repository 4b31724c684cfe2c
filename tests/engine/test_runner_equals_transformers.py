"""Greedy output of every architecture against transformers, through steps as a scheduler would make them."""

import random
import shutil
from collections import deque
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kernels.backend import load_backend
from kernels.cpu.build import COMPILERS
from shared.engine.kv_cache import KvCache
from shared.engine.runner import ModelRunner
from shared.engine.sampling_params import SamplingParams
from shared.engine.sequence import Sequence
from shared.engine.step import ScheduledSequence, StepBatch
from shared.kv_arena import KvLayout, SharedArena
from shared.models.config import ModelConfig
from shared.models.load import load_decoder
from shared.models.resolve import resolve_model

BLOCK_SIZE = 16
CHUNK = 32
NUM_BLOCKS = 96
NUM_OUTPUT = 20
PROMPT_LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 97)
LOGIT_TOLERANCE = 2e-4
"""Of logits up to about 10 in size: both sides sum in float32, in different orders."""

SIZES = {
    "vocab_size": 307,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama-biases-llama3-rope": (
        LlamaForCausalLM,
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3_ROPE},
    ),
    "llama-linear-rope": (
        LlamaForCausalLM,
        LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}},
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None, "head_dim": 24}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"num_key_value_heads": 1}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32, "tie_word_embeddings": True}),
}


def save_checkpoint(directory: Path, family: str, **save_options):
    """Writes a random-weight checkpoint; biases and norms are random too, since zeros and ones would hide mistakes."""
    model_class, config_class, special = FAMILIES[family]
    torch.manual_seed(len(family))
    model = model_class(config_class(**(SIZES | special))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(directory, **save_options)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small only lose by being shared between threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=list(FAMILIES))
def checkpoint(request, tmp_path_factory):
    """A checkpoint directory per architecture; every second one in shards."""
    directory = tmp_path_factory.mktemp(request.param)
    sharded = list(FAMILIES).index(request.param) % 2 == 0
    save_checkpoint(directory, request.param, max_shard_size="100KB" if sharded else "1GB")
    assert (len(list(directory.glob("*.safetensors"))) > 1) == sharded
    return directory


@pytest.fixture(scope="module")
def prompts():
    """One prompt per length, around every block and chunk border."""
    source = random.Random(7)
    return [[source.randrange(307) for _ in range(length)] for length in PROMPT_LENGTHS]


@pytest.fixture(scope="module")
def expected(checkpoint, prompts):
    """transformers' greedy tokens per prompt."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    outputs = []
    with torch.inference_mode():
        for prompt in prompts:
            generated = model.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=NUM_OUTPUT, min_new_tokens=NUM_OUTPUT
            )
            outputs.append(generated[0, len(prompt) :].tolist())
    return outputs


BACKENDS = [
    "cpu",
    pytest.param("native", marks=pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")),
]


def load(directory: Path, tmp_path: Path, *, backend: str = "cpu", dtype: str = "float32", with_lm_head: bool = True):
    """A model and a cache full of garbage, as blocks of failed transfers would leave it."""
    config = ModelConfig.from_pretrained(directory)
    device = torch.device("cpu")
    model = load_decoder(
        directory, config, dtype=dtype, device=device, backend=load_backend(backend, device), with_lm_head=with_lm_head
    )
    layout = KvLayout(config.num_layers, BLOCK_SIZE, config.num_kv_heads, config.head_dim, dtype)
    arena = SharedArena.create(tmp_path / "arena", NUM_BLOCKS, layout.block_bytes)
    cache = KvCache(arena, layout)
    cache.tensor.fill_(float("nan"))
    return model, cache


def make_runner(model, cache, **limits):
    sizes = {"max_batch_tokens": 4 * CHUNK, "max_sequences": 16, "max_model_len": 256} | limits
    return ModelRunner(model, cache, **sizes)


class SteppedLoop:
    """A scheduler as small as can be: everything that runs decodes, and one or two prompt chunks go along.

    Blocks are taken from a shuffled free list, so tables are scrambled, and freed ones are taken again.
    """

    def __init__(self, runner, *, num_blocks=NUM_BLOCKS, seed=0):
        self.runner = runner
        self.free = list(range(num_blocks))
        random.Random(seed).shuffle(self.free)
        self.mixed_steps = 0

    def grow(self, sequence, num_tokens):
        while len(sequence.block_table) * BLOCK_SIZE < num_tokens:
            sequence.block_table.append(self.free.pop())

    def take(self, sequence, most):
        count = min(most, sequence.num_uncomputed_tokens)
        self.grow(sequence, sequence.num_computed_tokens + count)
        reaches_end = count == sequence.num_uncomputed_tokens and not sequence.is_prefill_only
        return ScheduledSequence(sequence, sequence.num_computed_tokens, count, reaches_end)

    def run(self, sequences, *, chunk=CHUNK, max_running=8):
        waiting, running = deque(sequences), []
        while waiting or running:
            while waiting and len(running) < max_running:
                running.append(waiting.popleft())
            decoding = [s for s in running if s.num_output_tokens]
            prefilling = [s for s in running if not s.num_output_tokens][:2]
            scheduled = [self.take(s, 1) for s in decoding] + [self.take(s, chunk) for s in prefilling]
            self.mixed_steps += bool(decoding and prefilling)
            result = self.runner.execute(StepBatch(scheduled))
            tokens = iter(result.token_ids)
            for item in scheduled:
                item.sequence.num_computed_tokens += item.num_new_tokens
                if item.samples:
                    item.sequence.token_ids.append(next(tokens))
            for sequence in [s for s in running if is_done(s)]:
                running.remove(sequence)
                self.free[:0] = sequence.block_table
            assert next(tokens, None) is None


def is_done(sequence):
    if sequence.is_prefill_only:
        return sequence.num_uncomputed_tokens == 0
    return sequence.num_output_tokens == sequence.sampling.max_tokens


def greedy_sequence(prompt, num_output=NUM_OUTPUT):
    return Sequence(
        session_id="s",
        token_ids=list(prompt),
        num_prompt_tokens=len(prompt),
        sampling=SamplingParams(max_tokens=num_output, temperature=0.0),
        namespace=b"",
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_output_of_the_bundled_model_equals_transformers(tmp_path, backend):
    directory = resolve_model("pydoc-mini")
    oracle = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    source = random.Random(3)
    prompts = [[source.randrange(8, oracle.config.vocab_size) for _ in range(n)] for n in (1, 16, 33, 70)]
    sequences = [greedy_sequence(prompt, 12) for prompt in prompts]
    SteppedLoop(make_runner(*load(directory, tmp_path, backend=backend))).run(sequences)
    for sequence, prompt in zip(sequences, prompts, strict=True):
        with torch.inference_mode():
            wanted = oracle.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=12, min_new_tokens=12, eos_token_id=-1
            )
        assert sequence.token_ids == wanted[0].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_output_equals_transformers_when_chunks_and_decodes_share_steps(
    checkpoint, prompts, expected, tmp_path, backend
):
    loop = SteppedLoop(make_runner(*load(checkpoint, tmp_path, backend=backend)))
    sequences = [greedy_sequence(prompt) for prompt in prompts]
    loop.run(sequences)
    assert loop.mixed_steps > 10
    assert [s.token_ids[s.num_prompt_tokens :] for s in sequences] == expected


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_chunk_size_does_not_change_greedy_output(checkpoint, prompts, expected, tmp_path, chunk):
    loop = SteppedLoop(make_runner(*load(checkpoint, tmp_path)), seed=chunk)
    sequences = [greedy_sequence(prompt) for prompt in prompts[-4:]]
    loop.run(sequences, chunk=chunk)
    assert [s.token_ids[s.num_prompt_tokens :] for s in sequences] == expected[-4:]


def test_reference_backend_gives_the_same_tokens(checkpoint, prompts, expected, tmp_path):
    loop = SteppedLoop(make_runner(*load(checkpoint, tmp_path, backend="reference")))
    sequences = [greedy_sequence(prompt, 3) for prompt in prompts[2:6]]
    loop.run(sequences)
    assert [s.token_ids[s.num_prompt_tokens :] for s in sequences] == [tokens[:3] for tokens in expected[2:6]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_every_position_are_close_to_transformers(checkpoint, prompts, tmp_path, backend):
    model, cache = load(checkpoint, tmp_path, backend=backend)
    oracle = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    runner = make_runner(model, cache)
    seen = []
    original = model.logits
    model.logits = lambda hidden: seen.append(original(hidden).clone()) or original(hidden)
    sequence = greedy_sequence(prompts[-1], 1)
    sequence.sampling = SamplingParams(max_tokens=1, temperature=0.0, logit_bias={1: 0.0})  # else they stay native
    loop = SteppedLoop(runner)
    for end in range(1, sequence.num_prompt_tokens + 1):
        loop.grow(sequence, end)
        runner.execute(StepBatch([ScheduledSequence(sequence, end - 1, 1, samples=True)]))
    with torch.inference_mode():
        wanted = oracle(torch.tensor([prompts[-1]])).logits[0]
    torch.testing.assert_close(torch.cat(seen), wanted, rtol=0, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_float32(checkpoint, prompts, tmp_path, dtype):
    model, cache = load(checkpoint, tmp_path, dtype=dtype)
    oracle = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    seen = []
    original = model.logits
    model.logits = lambda hidden: seen.append(original(hidden).clone()) or original(hidden)
    sequence = greedy_sequence(prompts[-2], 1)
    SteppedLoop(make_runner(model, cache)).run([sequence])
    with torch.inference_mode():
        wanted = oracle(torch.tensor([prompts[-2]])).logits[0, -1]
    error = (seen[-1][0].float() - wanted).norm() / wanted.norm()
    # Three layers of random weights multiply the rounding of 8 (11) bits of mantissa by about ten.
    assert error < (0.1 if dtype == "bfloat16" else 0.02)
