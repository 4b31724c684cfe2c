"""Steps with prompts in them take about as long as they may, on machines of every speed."""

import pytest

from shared.engine.prefill_pace import MIN_CHUNK_TOKENS, PrefillPace
from shared.engine.step import ScheduledSequence, StepBatch
from tests.engine.fake_runner import Bench, continuation, prompt, sequence

MAX_STEP_S = 0.1


class Machine:
    """Steps a scheduler and tells it what each step would have taken."""

    def __init__(self, *, step_s=0.005, token_s=0.0002, decode_s=0.0005, **config):
        config = {"num_blocks": 4000, "block_size": 16, "max_batch_tokens": 4096, "max_model_len": 100_000, **config}
        self.bench = Bench(max_step_s=MAX_STEP_S, **config)
        self.step_s, self.token_s, self.decode_s = step_s, token_s, decode_s
        self.seconds = []

    def step(self, *, delay_s=0.0):
        """One step; returns the lengths of its prompt chunks, together."""
        batch = self.bench.scheduler.schedule()
        chunk = sum(entry.num_new_tokens for entry in batch.scheduled if entry.num_new_tokens > 1)
        decodes = sum(entry.num_new_tokens == 1 for entry in batch.scheduled)
        self.seconds.append(self.step_s + self.token_s * chunk + self.decode_s * decodes + delay_s)
        self.bench.scheduler.update(batch, self.bench.runner.execute(batch))
        self.bench.scheduler.pace.observe(batch, self.seconds[-1])
        return chunk


@pytest.mark.parametrize("token_s", [0.00005, 0.0002, 0.001])
def test_steps_take_as_long_as_they_may_after_the_first_few(token_s):
    machine = Machine(token_s=token_s)
    machine.bench.submit(sequence(prompt(8000), max_tokens=1))
    for _ in range(12):
        machine.step()
    bounded = [s for s in machine.seconds[6:] if s > machine.step_s]
    assert bounded
    assert max(machine.seconds) <= 1.05 * MAX_STEP_S
    assert min(bounded) >= 0.75 * MAX_STEP_S or token_s == 0.00005  # there the tokens' own limit is the lower one


def test_nothing_is_bounded_without_a_limit():
    bench = Bench(num_blocks=64, block_size=16, max_batch_tokens=512)
    bench.submit(sequence(prompt(512), max_tokens=1))
    assert [tokens for *_, tokens in bench.step()] == [512]


def test_the_limit_in_tokens_stays_the_upper_one():
    machine = Machine(token_s=1e-6, max_batch_tokens=256)
    machine.bench.submit(sequence(prompt(2000), max_tokens=1))
    assert [machine.step() for _ in range(6)][-3:] == [256, 256, 256]


def test_whole_blocks_are_computed_at_a_time():
    machine = Machine(token_s=0.0003)
    machine.bench.submit(sequence(prompt(3000), max_tokens=1))
    chunks = [machine.step() for _ in range(8)]
    assert all(chunk % 16 == 0 for chunk in chunks)


def test_beside_sequences_that_decode_the_step_as_a_whole_is_bounded():
    machine = Machine(decode_s=0.005, step_s=0.01)
    machine.bench.submit(*(sequence(prompt(8, i), max_tokens=200, session=str(i)) for i in range(7)))
    for _ in range(20):
        machine.step()
    machine.bench.submit(sequence(prompt(4000, 99), max_tokens=1, session="long"))
    chunks = [machine.step() for _ in range(10)]
    assert all(chunks)
    assert max(machine.seconds) <= 1.05 * MAX_STEP_S


def test_where_decoding_alone_takes_as_long_prompts_still_get_half_of_the_time():
    machine = Machine(decode_s=0.02, step_s=0.04, token_s=0.001)  # 8 sequences: 0.2 s without any prompt
    machine.bench.submit(*(sequence(prompt(8, i), max_tokens=200, session=str(i)) for i in range(7)))
    for _ in range(40):
        machine.step()
    without = machine.seconds[-1]
    machine.bench.submit(sequence(prompt(4000, 99), max_tokens=1, session="long"))
    for _ in range(20):
        machine.step()
    assert 1.5 * without <= machine.seconds[-1] <= 2.2 * without


def test_a_hopelessly_slow_machine_still_makes_progress():
    machine = Machine(token_s=1.0)
    one = sequence(prompt(200), max_tokens=2)
    machine.bench.submit(one)
    chunks = [machine.step() for _ in range(8)]
    assert chunks[:7] == [MIN_CHUNK_TOKENS] * 6 + [200 - 6 * MIN_CHUNK_TOKENS]
    assert one.token_ids[200:] == continuation(prompt(200), 2)


def test_one_step_that_was_stopped_for_long_does_not_change_much():
    machine = Machine()
    machine.bench.submit(sequence(prompt(12_000), max_tokens=1))
    before = [machine.step() for _ in range(8)][-1]
    machine.step(delay_s=30)
    assert machine.step() >= before / 2
    for _ in range(4):
        after = machine.step()
    assert after >= 0.9 * before


def test_a_first_step_that_was_stopped_for_long_is_forgotten():
    machine = Machine()
    machine.bench.submit(sequence(prompt(12_000), max_tokens=1))
    machine.step(delay_s=3)
    for _ in range(60):
        chunk = machine.step()
    assert chunk >= 300


def test_a_machine_that_becomes_slower_is_followed():
    machine = Machine()
    machine.bench.submit(sequence(prompt(12_000), max_tokens=1))
    for _ in range(8):
        machine.step()
    machine.token_s *= 4
    for _ in range(6):
        machine.step()
    assert machine.seconds[-1] <= 1.2 * MAX_STEP_S


def test_short_chunks_teach_nothing():
    pace = PrefillPace(MAX_STEP_S, MIN_CHUNK_TOKENS)
    pace.observe(_chunk(320), 0.064)
    before = pace.limit(4096, beside_decodes=False)
    for _ in range(100):
        pace.observe(_chunk(4), 0.01)
    assert pace.limit(4096, beside_decodes=False) == before


def _chunk(num_tokens):
    return StepBatch([ScheduledSequence(sequence(prompt(8), max_tokens=1), 0, num_tokens, False)])
