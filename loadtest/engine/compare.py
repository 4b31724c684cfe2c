"""Tandem's CPU engine beside transformers and llama.cpp: the same shapes, threads and requests, in one run.

    python -m loadtest.engine.compare --shapes 135m 500m --json loadtest/results/NAME.json
    python -m loadtest.engine.compare --groups int8 --tasks "decode 1" --ways --json loadtest/results/NAME.json

Every contestant has a process of its own and sleeps while another is measured; rounds are interleaved, medians printed.
What is in the JSON file already and is not measured anew stays, so a long comparison can be run in pieces, as
`loadtest.engine.bench` does; a run that is cut off leaves there what it measured.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loadtest.engine import report
from loadtest.engine.contestant import Remote
from loadtest.engine.machine import machine, multiplies_bfloat16
from loadtest.engine.read_roof import read_roof_bytes_per_s
from loadtest.engine.requests import draw_requests
from loadtest.engine.shapes import checkpoint

GROUPS = {
    "bfloat16": ("tandem:bfloat16", "transformers:bfloat16", "llama.cpp:bf16"),
    # What the others are fastest with on processors that do not multiply bfloat16: torch crawls in it there.
    "wide": ("tandem:bfloat16", "transformers:float32", "llama.cpp:f16", "llama.cpp:bf16"),
    "int8": ("tandem:int8", "llama.cpp:q8_0"),
    "int4": ("tandem:int4", "llama.cpp:q4_0"),
}
"""What is set side by side; the first is Tandem."""
SIXTEEN_BITS = "16-bit"
"""`bfloat16`, or `wide` where the processor does not multiply it."""

TASKS: dict[str, dict[str, object]] = {
    **{
        f"decode {batch}": {"do": "decode", "batch": batch, "steps": max(4, 32 // batch)}
        for batch in (1, 2, 4, 8, 16, 32)
    },
    "prefill 512": {"do": "prefill", "tokens": 512},
}
USUAL_TASKS = ("decode 1", "decode 8", "decode 32", "prefill 512")
TRANSFORMERS_WAYS = ("1", "8", "16", "32", "continuous")
WORKLOAD_REQUESTS = 64


@contextmanager
def contestants(names: tuple[str, ...], directory: Path, threads: int) -> Iterator[list[Remote]]:
    """The processes of a group, ended together."""
    remotes = [Remote(name, directory, threads) for name in names]
    try:
        yield remotes
    finally:
        for remote in remotes:
            remote.close()


def measure(
    remotes: list[Remote], rounds: int, tasks: list[str], context: int, console: Console
) -> Iterator[dict[str, dict[str, float]]]:
    """Median seconds by task and contestant; after each task, of those so far."""
    table: dict[str, dict[str, float]] = {}
    for task in tasks:
        what = TASKS[task] | ({"context": context} if TASKS[task]["do"] == "decode" else {})
        samples: dict[str, list[float]] = {remote.name: [] for remote in remotes}
        for number in range(rounds + 1):
            for remote in remotes:
                seconds = remote.run(**what)
                if number:  # the first round warms up
                    samples[remote.name].append(seconds)
        table[task] = {name: statistics.median(values) for name, values in samples.items()}
        console.print(task, {name: f"{1e3 * value:.1f} ms" for name, value in table[task].items()})
        yield table


def measure_workload(
    remotes: list[Remote], rounds: int, ways: list[str], num_requests: int, one_by_one: int, console: Console
) -> Iterator[dict[str, float]]:
    """Median seconds of the first `num_requests` of the workload by contestant and way; after each, of those so far.

    One by one only the first `one_by_one` requests are run, and the rest counted like them, by tokens.
    """
    samples: dict[str, list[float]] = {}
    for _ in range(rounds if ways else 0):
        for remote in remotes:
            for how in ways if remote.name.startswith("transformers") else ("own",):
                key = remote.name if how == "own" else f"{remote.name}, {_WAY_NAMES.get(how, f'batches of {how}')}"
                count = min(one_by_one, num_requests) if how == "1" else num_requests
                seconds = remote.run(do="workload", count=count, how=how) * share_of_tokens(num_requests, count)
                samples.setdefault(key, []).append(seconds)
                console.print(f"{key}: {seconds:.1f} s")
                yield {name: statistics.median(values) for name, values in samples.items()}


def share_of_tokens(num_requests: int, count: int) -> float:
    """Output tokens of the workload for each one of its first `count` requests."""
    tokens = [request.output_tokens for request in draw_requests(1000)[:num_requests]]
    return sum(tokens) / sum(tokens[:count])


_WAY_NAMES = {"1": "one by one", "continuous": "continuous batching"}


def main() -> None:
    """Prints a table per shape and kind of weights, and JSON with `--json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["135m"])
    parser.add_argument("--groups", nargs="+", default=[SIXTEEN_BITS, "int8", "int4"], choices=[SIXTEEN_BITS, *GROUPS])
    parser.add_argument("--tasks", nargs="*", default=list(USUAL_TASKS), choices=list(TASKS))
    parser.add_argument(
        "--without", nargs="*", default=[], metavar="CONTESTANT", help="as transformers or llama.cpp:bf16"
    )
    parser.add_argument("--context", type=int, default=128, help="tokens of each sequence that decodes")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workload-rounds", type=int, default=1)
    ways = "transformers' ways of the workload; none: no workload"
    parser.add_argument("--ways", nargs="*", default=list(TRANSFORMERS_WAYS), help=ways)
    parser.add_argument("--requests", type=int, default=WORKLOAD_REQUESTS, help="of the workload")
    parser.add_argument("--one-by-one", type=int, default=WORKLOAD_REQUESTS, help="requests that are run so")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "tandem" / "bench-models")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console(width=120)
    measured: report.Report = {"machine": machine(options.threads)}
    console.print(measured["machine"])
    for shape in options.shapes:
        for group in options.groups:
            if group == SIXTEEN_BITS:
                group = "bfloat16" if multiplies_bfloat16() else "wide"
            for so_far in measure_group(shape, group, options, console):
                measured[f"{shape}, {group}"] = so_far
                if options.json:
                    report.add(options.json, measured)


def measure_group(shape: str, group: str, options: argparse.Namespace, console: Console) -> Iterator[dict[str, object]]:
    """What the report says of one group, as it grows; printed when it is whole."""
    directory = checkpoint(shape, options.cache)
    weight_bytes = (directory / "model.safetensors").stat().st_size
    names = tuple(name for name in GROUPS[group] if not {name, name.split(":")[0]} & set(options.without))
    roof = read_roof_bytes_per_s(options.threads)
    result: dict[str, object] = {"read_roof_gb_per_s": roof / 1e9, "bfloat16_weight_bytes": weight_bytes}
    times: dict[str, dict[str, float]] = {}
    workload: dict[str, float] = {}
    with contestants(names, directory, options.threads) as remotes:
        for times in measure(remotes, options.rounds, options.tasks, options.context, console):
            yield (result := result | {"context": options.context, "seconds": times})
        for workload in measure_workload(
            remotes, options.workload_rounds, options.ways, options.requests, options.one_by_one, console
        ):
            yield (result := result | {"workload_requests": options.requests, "workload_seconds": workload})
    print_group(console, f"{shape}, {group}", names, times, workload)
    if names[0] == "tandem:bfloat16" and "decode 1" in times:
        share = weight_bytes / roof / times["decode 1"][names[0]]
        console.print(f"read roof {roof / 1e9:.1f} GB/s; Tandem's decode 1 at {share:.2f} of it")


def print_group(
    console: Console,
    title: str,
    names: tuple[str, ...],
    times: dict[str, dict[str, float]],
    workload: dict[str, float],
) -> None:
    """Milliseconds, and how many times as long the others take as Tandem."""
    if times:
        table = Table(title=f"{title}: ms per step (x Tandem)")
        for column in ("", *names):
            table.add_column(column, justify="right")
        for task, row in times.items():
            table.add_row(task, *(f"{1e3 * row[name]:.1f} ({row[name] / row[names[0]]:.2f})" for name in names))
        console.print(table)
    if not workload:
        return
    table = Table(title=f"{title}: the workload")
    for column in ("", "s", "x Tandem"):
        table.add_column(column, justify="right")
    for name, seconds in workload.items():
        table.add_row(name, f"{seconds:.1f}", f"{seconds / workload[names[0]]:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
