"""A prefill that was cut off leaves whole sealed blocks, and nobody takes anything else of it for KV."""

import pytest

from tests.engine.fake_runner import Bench, continuation, prompt, sequence

BLOCK = 4
LENGTH = 40


@pytest.mark.parametrize("num_steps", range(6))
@pytest.mark.parametrize("in_flight", [False, True])
def test_what_an_aborted_prefill_left_is_sealed_blocks_and_the_next_one_goes_on_from_them(num_steps, in_flight):
    """The fake runner fails as soon as a sequence attends to KV that is not its own."""
    bench = Bench(max_batch_tokens=6, max_sequences=2)
    cut = sequence(prompt(LENGTH), max_tokens=0, session="cut")
    bench.submit(cut)
    for _ in range(num_steps):
        bench.step()
    if in_flight:
        batch = bench.scheduler.schedule()
        bench.scheduler.abort([cut.sequence_id])
        bench.scheduler.update(batch, bench.runner.execute(batch))
    else:
        bench.scheduler.abort([cut.sequence_id])
    bench.check()
    counts = bench.pool.counts()
    assert counts.used == counts.pinned == 0
    assert counts.cached <= 6 * (num_steps + in_flight) // BLOCK < LENGTH // BLOCK
    following = sequence(prompt(LENGTH), max_tokens=5, session="following")
    bench.submit(following)
    bench.run()
    assert following.num_cached_tokens == BLOCK * counts.cached
    assert following.token_ids[LENGTH:] == continuation(prompt(LENGTH), 5)
