"""Two steps in flight: the same tokens, stops discovered late, nothing freed that a step still touches."""

import queue

import pytest

from shared.engine.block_pool import BlockPool
from shared.engine.config import EngineConfig
from shared.engine.engine import Engine
from shared.engine.sampling_params import SamplingParams
from shared.engine.sequence import FinishReason
from shared.engine.step import StepOutputs
from tests.engine.fake_runner import PipelinedFakeRunner, continuation, merge, prompt, sequence

TIMEOUT_S = 20


class Recorder(PipelinedFakeRunner):
    """Notes how many steps were under way when each began."""

    def __init__(self, num_blocks, block_size):
        super().__init__(num_blocks, block_size)
        self.depths = []
        self.under_way = 0

    def launch(self, batch):
        self.depths.append(self.under_way)
        self.under_way += 1
        return super().launch(batch)

    def compute(self, batch, token_lists, tables):
        self.under_way -= 1
        return super().compute(batch, token_lists, tables)


def serve(sequences, num_blocks=64, eos=frozenset()):
    """Runs sequences to their ends; the runner and everything that the engine said."""
    runner, messages, outputs = Recorder(num_blocks, 4), queue.SimpleQueue(), StepOutputs()
    config = EngineConfig(block_size=4, max_model_len=2048, max_batch_tokens=32, max_sequences=8, eos_token_ids=eos)
    engine = Engine(runner, BlockPool(num_blocks, 4), config, messages.put)
    engine.submit(sequences)
    engine.start()
    while len(outputs.finished) < len(sequences):
        merge(outputs, messages.get(timeout=TIMEOUT_S))
    engine.stop()
    engine.check_integrity()
    return runner, outputs


def test_pipelined_decode_says_what_one_step_at_a_time_says_and_overlaps():
    sequences = [sequence(prompt(9 + 3 * i, seed=i), 12) for i in range(5)]
    runner, _ = serve(sequences)
    for i, one in enumerate(sequences):
        assert one.token_ids[one.num_prompt_tokens :] == continuation(prompt(9 + 3 * i, seed=i), 12)
        assert one.finish_reason is FinishReason.LENGTH
    assert runner.depths[1:-1].count(1) >= len(runner.depths) - 4


def test_a_stop_token_discovered_late_discards_the_token_computed_meanwhile():
    expected = continuation(prompt(10), 8)
    eos = expected[4]
    first_end = expected.index(eos) + 1
    one = sequence(prompt(10), 8)
    _, outputs = serve([one], eos=frozenset({eos}))
    assert one.finish_reason is FinishReason.STOP
    assert one.token_ids[10:] == expected[:first_end]
    assert [token for _, token, _ in outputs.tokens] == expected[:first_end]


def test_a_sequence_that_needs_its_own_output_is_never_run_ahead_of():
    params = SamplingParams(max_tokens=6, temperature=0.0, frequency_penalty=0.5)
    one = sequence(prompt(10), 6)
    one.sampling = params
    runner, _ = serve([one])
    assert one.token_ids[10:] == continuation(prompt(10), 6)
    assert set(runner.depths) == {0}


@pytest.mark.parametrize("num_blocks", [9, 12])
def test_memory_pressure_waits_for_the_step_in_flight_before_anybody_yields(num_blocks):
    sequences = [sequence(prompt(8, seed=i), 14) for i in range(4)]
    serve(sequences, num_blocks=num_blocks)
    for i, one in enumerate(sequences):
        assert one.token_ids[8:] == continuation(prompt(8, seed=i), 14)
