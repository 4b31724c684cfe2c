"""What a bound on a step's time gives streams that run beside long prompts, and what it costs the prompts.

    python -m loadtest.engine.step_bound --max-step-s 0 0.1 0.05

One process, no services: the engine of a decode worker is stepped while some sequences decode and fresh long prompts
come one after the other; then prompts alone. Bounds take turns, round by round. A step is what a stream waits for
between two tokens. Timed is the step thread's CPU time with --clock cpu, which other processes do not disturb.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from loadtest.bench import percentile
from loadtest.engine.step_breakdown import load
from shared.engine.engine import Engine
from shared.engine.prefill_pace import MIN_CHUNK_TOKENS, PrefillPace
from shared.engine.sampling_params import SamplingParams
from shared.engine.sequence import Sequence
from shared.identity import BlockHash, SessionId


@dataclass(slots=True)
class Measured:
    """Of one bound: seconds of each step beside streams, and prompt tokens and seconds beside them and without."""

    step_s: list[float] = field(default_factory=list)
    beside: list[tuple[int, float]] = field(default_factory=list)
    alone: list[tuple[int, float]] = field(default_factory=list)


class Bench:
    """Steps one engine by hand."""

    def __init__(self, engine: Engine, options: argparse.Namespace, clock: Callable[[], float]) -> None:
        self._scheduler, self._runner = engine._scheduler, engine._runner
        self._options = options
        self._clock = clock
        self._rng = random.Random(options.seed)

    def round(self, pace: PrefillPace, num_streams: int) -> list[tuple[int, float]]:
        """Prompt tokens and seconds of each step while some prompts are computed, one after the other."""
        self._scheduler.pace = pace
        streams = [self._sequence(64, max_tokens=10_000) for _ in range(num_streams)]
        while any(not stream.decodes for stream in streams):
            self._step()
        steps = []
        for _ in range(self._options.prompts):
            prompt = self._sequence(self._options.prompt_tokens, max_tokens=1)
            while not prompt.is_finished:
                steps.append(self._step())
        self._scheduler.abort([stream.sequence_id for stream in streams])
        return steps

    def _sequence(self, num_tokens: int, max_tokens: int) -> Sequence:
        sequence = Sequence(
            session_id=SessionId("bench"),
            token_ids=[self._rng.randrange(300, 1800) for _ in range(num_tokens)],
            num_prompt_tokens=num_tokens,
            sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
            namespace=BlockHash(self._rng.randbytes(16)),
        )
        self._scheduler.add(sequence)
        return sequence

    def _step(self) -> tuple[int, float]:
        started_s = self._clock()
        batch = self._scheduler.schedule()
        self._scheduler.update(batch, self._runner.launch(batch).result())
        seconds = self._clock() - started_s
        self._scheduler.pace.observe(batch, seconds)
        return sum(entry.num_new_tokens for entry in batch.scheduled if entry.num_new_tokens > 1), seconds


def main() -> None:
    """Prints a line per bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-step-s", type=float, nargs="+", default=[0.0, 0.1, 0.05])
    parser.add_argument("--model", default="pydoc-mini")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=2, help="per round")
    parser.add_argument("--prompt-tokens", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    bench = Bench(load(options), options, time.thread_time if options.clock == "cpu" else time.perf_counter)
    paces = {bound: PrefillPace(bound, MIN_CHUNK_TOKENS) for bound in options.max_step_s}
    results = {bound: Measured() for bound in paces}
    for number in range(options.rounds + 1):  # the first is for the estimates
        for bound, pace in paces.items():
            result = results[bound] if number else Measured()
            steps = bench.round(pace, options.streams)
            result.step_s += [seconds for _, seconds in steps]
            result.beside.append((sum(tokens for tokens, _ in steps), sum(seconds for _, seconds in steps)))
            steps = bench.round(pace, 0)
            result.alone.append((sum(tokens for tokens, _ in steps), sum(seconds for _, seconds in steps)))
    print(f"{options.streams} streams beside prompts of {options.prompt_tokens} tokens, {options.clock} clock")
    for bound, result in results.items():
        p50, p99 = (1e3 * percentile(result.step_s, share) for share in (0.5, 0.99))
        beside, alone = (
            percentile([tokens / seconds for tokens, seconds in rates], 0.5) for rates in (result.beside, result.alone)
        )
        print(
            f"bound {bound:4.2f} s: between tokens p50 {p50:6.1f} ms, p99 {p99:6.1f}; "
            f"prompt tokens/s {beside:5.0f} beside the streams, {alone:5.0f} alone"
        )


if __name__ == "__main__":
    main()
