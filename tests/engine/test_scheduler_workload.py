"""A conversation workload, with lengths like ShareGPT's, on a scheduler without a model."""

import random

import pytest

from shared.engine.block_pool import BlockPool
from shared.engine.config import EngineConfig
from shared.engine.scheduler import Scheduler
from shared.engine.stats import StepMeter, slot_usage
from shared.engine.step import StepResult
from tests.engine.fake_runner import Bench, prompt, sequence

BLOCK_SIZE = 16
MEAN_PROMPT_TOKENS, MEAN_OUTPUT_TOKENS = 161, 338  # ShareGPT as tokenized in the PagedAttention paper, figure 11


def conversation_lengths(rng):
    """`(prompt tokens, output tokens)`, log-normal with ShareGPT's means."""
    sigma = 1.0
    prompt_tokens = rng.lognormvariate(0, sigma) / 2.718**0.5 * MEAN_PROMPT_TOKENS
    output_tokens = rng.lognormvariate(0, sigma) / 2.718**0.5 * MEAN_OUTPUT_TOKENS
    return min(max(int(prompt_tokens), 4), 1024), min(max(int(output_tokens), 1), 1024)


def serve(num_sequences, num_blocks, arrivals_per_step, seed=0):
    """Runs the workload; returns scheduler and meter."""
    rng = random.Random(seed)
    pool = BlockPool(num_blocks, BLOCK_SIZE)
    scheduler = Scheduler(pool, EngineConfig(block_size=BLOCK_SIZE, max_model_len=4096))
    meter = StepMeter(BLOCK_SIZE)
    num_submitted, num_finished, due = 0, 0, 0.0
    while num_finished < num_sequences:
        due += arrivals_per_step
        while num_submitted < min(due, num_sequences):
            prompt_tokens, output_tokens = conversation_lengths(rng)
            one = sequence(prompt(prompt_tokens, num_submitted), output_tokens, session=str(num_submitted))
            scheduler.tables.name_blocks(one, prompt_tokens // BLOCK_SIZE)
            scheduler.add(one)
            num_submitted += 1
        batch = scheduler.schedule()
        num_sampled = sum(entry.samples for entry in batch.scheduled)
        result = StepResult(token_ids=[rng.randrange(1000) for _ in range(num_sampled)], logprobs=[None] * num_sampled)
        num_finished += len(scheduler.update(batch, result).finished)
        meter.record(batch, 0.01, scheduler.running, is_beside=False)
    scheduler.check_integrity()
    return scheduler, meter


@pytest.mark.parametrize(
    ("num_blocks", "arrivals_per_step"),
    [
        pytest.param(8192, 0.15, id="room for all"),
        pytest.param(8192, 10.0, id="all at once"),
        pytest.param(1024, 10.0, id="memory is the limit"),
    ],
)
def test_allocated_token_slots_are_used(num_blocks, arrivals_per_step):
    scheduler, meter = serve(250, num_blocks, arrivals_per_step)
    assert meter.used_slots >= 0.96 * meter.allocated_slots
    # Preemption is an exception even when memory is what limits the batch.
    assert meter.prefilled_tokens < 1.25 * scheduler.prefix_query_tokens


def test_shared_blocks_count_once():
    bench = Bench(block_size=4)
    choices = [sequence(prompt(18), choice=i) for i in range(3)]
    bench.submit(*choices)
    bench.step()
    bench.step()
    # Four shared blocks; each choice has 2 or 3 tokens in a block of its own.
    private = [one.num_computed_tokens - 16 for one in choices]
    assert private == [3, 2, 2]
    assert slot_usage(choices, 4) == (16 + 7, 16 + 12)
