"""Where the time of an engine step goes: schedule, prepare, native code, update, message.

    python -m loadtest.engine.step_breakdown --model pydoc-mini --sequences 1 8 64

One process, no services: the parts of a decode worker are called one after the other as the step thread and the event
loop would call them, and each is timed. `native` is the time inside of the native calls, one per step of sequences that
only decode; what is outside of them is what the scheduler costs. Medians over the steps, of the step thread's own CPU
time with --clock cpu, which other processes do not disturb (and which leaves out what further compute threads do).
Reading a clock costs microseconds itself, so `step` and `outside` are of further steps in which only the native calls
are timed.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loadtest.engine import report
from services.decode.gateway_stream import GatewayStream
from services.decode.servicer import DecodeServicer
from shared.engine.sampling_params import SamplingParams
from shared.engine.sequence import Sequence
from shared.engine.step import StepOutputs
from shared.identity import BlockHash, SessionId
from shared.worker.loading import load_engine
from shared.worker.settings import WorkerSettings

PARTS = ("schedule", "prepare", "native", "update", "message")
NATIVE_CALLS = ("tandem_generate", "tandem_decoder_step", "tandem_multiply", "tandem_sample", "tandem_logprobs")

KINDS = {
    "greedy": SamplingParams(max_tokens=10**6, temperature=0.0, ignore_eos=True),
    "temperature": SamplingParams(max_tokens=10**6, temperature=0.8, ignore_eos=True),
    "temperature, top-p": SamplingParams(max_tokens=10**6, temperature=0.8, top_p=0.9, ignore_eos=True),
    "log-probabilities": SamplingParams(max_tokens=10**6, temperature=0.0, num_logprobs=1, ignore_eos=True),
}


class Stopwatch:
    """Times named parts of one step after the other.

    Attributes:
        watched: Parts that are timed now.
        seconds: By part, one per step.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.watched: tuple[str, ...] = PARTS
        self.seconds: dict[str, list[float]] = {name: [] for name in (*PARTS, "step")}
        self.native_s = 0.0  # in this step so far

    def __call__(self, name: str, call: Callable[[], Any]) -> Any:
        if name not in self.watched:
            return call()
        started_s = self.clock()
        result = call()
        self.seconds[name].append(self.clock() - started_s)
        return result

    def watch_native(self, calls: object) -> None:
        """Adds up from now on what the step's native calls take."""
        for name in NATIVE_CALLS:
            setattr(calls, name, functools.partial(self._native, getattr(calls, name)))

    def _native(self, call: Callable[..., Any], *args: object) -> Any:
        started_s = self.clock()
        result = call(*args)
        self.native_s += self.clock() - started_s
        return result


def load(options: argparse.Namespace) -> Any:
    """The engine of a decode worker, not started."""
    scratch = Path(tempfile.mkdtemp(prefix="tandem-breakdown-"))
    settings = WorkerSettings(
        model=options.model,
        worker_id=f"breakdown-{scratch.name[-8:]}",
        transfer_socket=scratch / "none",
        run_dir=scratch,
        dtype=options.dtype,
        threads=options.threads,
        log_level="error",
    )
    loaded = load_engine(settings, "decode", lambda outputs: None, lambda request: None)
    loaded.memory.unlink()  # the mapping is enough
    return loaded.engine


def message_of(servicer: Any, stream: Any, outputs: StepOutputs) -> bytes:
    """What the event loop does with a step's outputs, up to the bytes that gRPC sends."""
    DecodeServicer._on_step(servicer, outputs)
    return stream._outgoing.get_nowait().SerializeToString()


def measure(
    engine: Any, watch: Stopwatch, num_sequences: int, steps: int, sampling: SamplingParams
) -> dict[str, float]:
    """Median seconds per part at so many running sequences."""
    scheduler = engine._scheduler
    stream = GatewayStream(types.SimpleNamespace(), routes := {})
    for index in range(num_sequences):
        prompt = [(7 * index + 3 * i) % 500 + 10 for i in range(100)]
        sequence = Sequence(SessionId(f"s{index}"), prompt, len(prompt), sampling, BlockHash(index.to_bytes(16, "big")))
        scheduler.add(sequence)
        session = types.SimpleNamespace(
            first_token_s=0.0, first_sequence=index, has_started=True, note_token=lambda sequence: None
        )
        routes[sequence.sequence_id] = (stream, session)
    medians: dict[str, float] = {}
    for watch.watched in ((), PARTS):
        run_steps(engine, watch, routes, num_sequences, steps)
        parts = {name: statistics.median(values[-steps:]) for name, values in watch.seconds.items() if values}
        pairs = list(zip(watch.seconds["step"], watch.seconds["native"], strict=True))[-steps:]
        parts["outside"] = statistics.median(step - native for step, native in pairs)  # steady where steps are not
        medians = parts | medians
        for values in watch.seconds.values():
            values.clear()
    scheduler.abort_all()
    scheduler.take_outputs()
    return medians


def run_steps(engine: Any, watch: Stopwatch, routes: dict[Any, Any], num_sequences: int, steps: int) -> None:
    """Steps until so many were pure decodes of all sequences."""
    scheduler, runner = engine._scheduler, engine._runner._runner
    servicer, stream = types.SimpleNamespace(_routes=routes), next(iter(routes.values()))[0]
    done = 0
    while done < steps:
        watch.native_s = 0.0
        started_s = watch.clock()
        batch = watch("schedule", scheduler.schedule)
        result = watch("prepare", lambda batch=batch: runner.execute(batch))
        outputs = watch("update", lambda batch=batch, result=result: scheduler.update(batch, result))
        watch("message", lambda outputs=outputs: message_of(servicer, stream, outputs)) if outputs.tokens else None
        watch.seconds["step"].append(watch.clock() - started_s)
        watch.seconds["native"].append(watch.native_s)
        if "prepare" in watch.watched:
            watch.seconds["prepare"][-1] -= watch.native_s
        if batch.num_tokens == len(batch.scheduled) == num_sequences:
            done += 1


def main() -> None:
    """Prints a table per kind of sampling."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pydoc-mini")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path, help="adds the greedy table to a report")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), help="of sampling")
    options = parser.parse_args()
    engine = load(options)
    watch = Stopwatch(time.perf_counter if options.clock == "wall" else time.thread_time)
    watch.watch_native(engine._runner._runner._model.backend.library.calls)
    measured: dict[str, dict[str, float]] = {}
    print(f"{options.model}, {options.threads} threads, microseconds per step (median of {options.steps})")
    for kind in options.kinds:
        sampling = KINDS[kind]
        print(f"{kind:<20}" + "".join(f"{name:>10}" for name in (*PARTS, "step", "outside")))
        for count in options.sequences:
            medians = measure(engine, watch, count, options.steps, sampling)
            if kind == "greedy":
                measured[str(count)] = medians
            outside_s = medians["outside"]
            cells = "".join(f"{1e6 * medians[name]:10.0f}" for name in (*PARTS, "step"))
            print(
                f"{count:>8} sequences  {cells}{1e6 * outside_s:10.0f} = {outside_s / medians['step']:.1%}", flush=True
            )
    if options.json and measured:
        what = {"model": Path(options.model).name, "threads": options.threads, "seconds": measured}
        report.add(options.json, {"breakdown": what})


if __name__ == "__main__":
    main()
