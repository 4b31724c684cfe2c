"""Steps of one native call give the very tokens of steps that take several, whatever happens between them."""

import dataclasses
import itertools
import random

import pytest
import torch

from kernels.backend import load_backend
from shared.engine.block_pool import BlockPool
from shared.engine.config import EngineConfig
from shared.engine.kv_cache import KvCache
from shared.engine.runner import ModelRunner
from shared.engine.sampling_params import SamplingParams
from shared.engine.scheduler import Scheduler
from shared.engine.sequence import Sequence
from shared.identity import BlockHash
from shared.kv_arena import KvLayout, SharedArena
from shared.models.config import ModelConfig
from shared.models.load import load_decoder

BLOCK_SIZE = 4
CPU = torch.device("cpu")
NATIVE_CALLS = ("tandem_generate", "tandem_decoder_step", "tandem_multiply", "tandem_sample", "tandem_logprobs")
PLAIN = (
    SamplingParams(max_tokens=40, temperature=0.0),
    SamplingParams(max_tokens=40, temperature=1.0, seed=3),
    SamplingParams(max_tokens=40, temperature=0.7, top_p=0.9, seed=4),
    SamplingParams(max_tokens=40, temperature=1.3, top_k=5, min_p=0.02, seed=5),
    SamplingParams(max_tokens=40, temperature=0.0, num_logprobs=0),
    SamplingParams(max_tokens=40, temperature=0.8, seed=6, num_logprobs=7),
)
OTHER = (
    SamplingParams(max_tokens=40, temperature=0.9, seed=6, repetition_penalty=1.3),
    SamplingParams(max_tokens=40, temperature=0.0, min_tokens=9),
)


@pytest.fixture(scope="module")
def model(tiny_qwen3):
    """Natively computed."""
    parsed = ModelConfig.from_pretrained(tiny_qwen3)
    return load_decoder(tiny_qwen3, parsed, dtype="float32", device=CPU, backend=load_backend("native", CPU))


class Worker:
    """Scheduler and runner over blocks of their own, driven step by step.

    Attributes:
        native_calls: Names, in order, of the calls of the step that ran last.
        logprobs: By sequence, of each of its tokens.
    """

    def __init__(self, model, arena, num_blocks, monkeypatch):
        layout = KvLayout(
            model.config.num_layers, BLOCK_SIZE, model.config.num_kv_heads, model.config.head_dim, "float32"
        )
        cache = KvCache(SharedArena.create(arena, num_blocks, layout.block_bytes), layout)
        cache.tensor.fill_(float("nan"))
        self.runner = ModelRunner(model, cache, max_batch_tokens=24, max_sequences=5, max_model_len=128)
        self.pool = BlockPool(num_blocks, BLOCK_SIZE)
        config = EngineConfig(
            block_size=BLOCK_SIZE,
            max_model_len=128,
            eos_token_ids=frozenset(),
            max_batch_tokens=24,
            max_sequences=5,
        )
        self.scheduler = Scheduler(self.pool, config, clock=lambda: 1.0)
        self.native_calls, self.logprobs = [], {}
        calls = model.backend.library.calls
        for name in NATIVE_CALLS:
            monkeypatch.setattr(calls, name, self._counted(name, getattr(calls, name)))

    def _counted(self, name, call):
        def counted(*args):
            self.native_calls.append(name)
            return call(*args)

        return counted

    def step(self):
        """Returns the batch; empty when there is nothing to do."""
        batch = self.scheduler.schedule()
        self.native_calls.clear()
        if batch.scheduled:
            for sequence, _, logprobs in self.scheduler.update(batch, self.runner.execute(batch)).tokens:
                self.logprobs.setdefault(sequence.sequence_id, []).append(logprobs)
        return batch


@pytest.fixture
def make_worker(model, tmp_path_factory, monkeypatch):
    """Builds workers of so many blocks."""
    return lambda num_blocks: Worker(model, tmp_path_factory.mktemp("arena") / "kv", num_blocks, monkeypatch)


session_ids = map("s{}".format, itertools.count())


def sequence_of(prompt, sampling):
    """The only one of its session: choices of one session wait for each other."""
    return Sequence(next(session_ids), list(prompt), len(prompt), sampling, BlockHash(bytes(16)))


def run(worker, arrivals, source):
    """Tokens of sequences that arrive at the given steps; a few are aborted at moments that `source` draws."""
    sequences = [sequence_of(prompt, sampling) for _, prompt, sampling in arrivals]
    step = 0
    while any(not s.is_finished for s in sequences):
        for (at, _, _), sequence in zip(arrivals, sequences, strict=True):
            if at == step:
                worker.scheduler.add(sequence)
        if source.random() < 0.02:
            worker.scheduler.abort([source.choice(sequences).sequence_id])
        worker.step()
        step += 1
        assert step < 2000
    worker.scheduler.check_integrity()
    return [s.token_ids for s in sequences], [worker.logprobs.get(s.sequence_id) for s in sequences]


def draw_arrivals(source):
    """Few distinct prompts, so that blocks are found again and equal ones merge while they are computed."""
    prompts = [[source.randrange(2, 61) for _ in range(source.randint(1, 30))] for _ in range(4)]
    return [
        (
            source.randrange(60),
            source.choice(prompts)[: source.randint(1, 30)],
            dataclasses.replace(source.choice(PLAIN + OTHER[: source.randint(0, 2)]), max_tokens=source.randint(1, 40)),
        )
        for _ in range(14)
    ]


@pytest.mark.parametrize("seed", range(6))
def test_tokens_and_logprobs_do_not_depend_on_how_a_step_is_called(make_worker, seed):
    arrivals = draw_arrivals(random.Random(seed))
    in_several_calls = [
        (at, prompt, dataclasses.replace(sampling, logit_bias={2: 0.0})) for at, prompt, sampling in arrivals
    ]
    num_blocks = 24 + 10 * (seed % 3)  # the fewest make sequences yield to each other
    worker = make_worker(num_blocks)
    assert run(worker, arrivals, random.Random(seed)) == run(
        make_worker(num_blocks), in_several_calls, random.Random(seed)
    )
    assert worker.scheduler.preemption.count > 0 or seed % 3


def test_a_step_of_sequences_that_decode_is_one_native_call(make_worker):
    worker = make_worker(40)
    for index, sampling in enumerate(PLAIN):
        worker.scheduler.add(sequence_of([2 + index, 3, 4], sampling))
    worker.step()
    assert worker.native_calls == ["tandem_decoder_step", "tandem_multiply", "tandem_sample", "tandem_logprobs"]
    for _ in range(10):
        worker.step()
        assert worker.native_calls == ["tandem_generate"]


def test_a_sequence_that_wants_more_than_a_choice_takes_its_batch_with_it_and_gives_it_back(make_worker):
    worker = make_worker(40)
    worker.scheduler.add(sequence_of([2, 3, 4], PLAIN[1]))
    worker.scheduler.add(sequence_of([5, 6], dataclasses.replace(OTHER[0], max_tokens=3)))
    calls = []
    for _ in range(6):
        worker.step()
        calls.append(len(worker.native_calls))
    assert calls == [3, 3, 3, 1, 1, 1]
