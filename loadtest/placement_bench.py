"""Goodput of four ways to place requests: on one cluster, with one trace, in one run.

    python -m loadtest.placement_bench --rates 2 4 6 8 --json out.json --plot out.svg

Requests arrive as a Poisson process: short chats, chats with a shared system prompt, long documents. A request is good
when its first token came within the TTFT target and its tokens, on average, within the TPOT target. Rounds of the
policies are interleaved, each time beginning with another one; each round has its own cache salt, so that the shared
prompt is reused within it alone.

A second table says what each policy decided and what came of it: beside the predicted time to a first token the actual
one, from submission to the worker.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from loadtest.bench import percentile
from loadtest.cluster import RunningCluster, cluster
from loadtest.streams import StreamResult, stream_chat
from loadtest.workload import ChatRequest, draw

POLICIES: dict[str, dict[str, str]] = {
    "always remote": {"PLACEMENT": "remote"},
    "never remote": {"PLACEMENT": "local"},
    "threshold 256": {"PLACEMENT": "remote", "MIN_REMOTE_TOKENS": "256"},
    "cost model": {"PLACEMENT": "auto"},
}

Decisions = dict[str, dict[str, dict[str, dict[str, float]]]]
"""By policy, offered rate and way."""


@contextlib.contextmanager
def gateways(running: RunningCluster) -> Iterator[dict[str, str]]:
    """One more gateway per policy, on the cluster's Redis; yields their URLs."""
    redis_url = json.loads((running.run_dir / "state.json").read_text())["redis_url"]
    processes, urls = [], {}
    try:
        for name, settings in POLICIES.items():
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            environment = {f"TANDEM_GATEWAY_{key}": value for key, value in settings.items()}
            environment |= {"TANDEM_GATEWAY_PORT": str(port), "TANDEM_GATEWAY_REDIS_URL": redis_url}
            log = (running.run_dir / f"{name.replace(' ', '-')}.log").open("wb")
            command = [sys.executable, "-m", "services.gateway"]
            processes.append(subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log))
            urls[name] = f"http://127.0.0.1:{port}"
        for url in urls.values():
            _wait_ready(url)
        yield urls
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(timeout=60)


def _wait_ready(url: str, timeout_s: float = 60) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"{url} did not become ready")


async def run_round(
    url: str, requests: list[ChatRequest], arrivals_s: list[float], salt: str
) -> list[StreamResult | None]:
    """Sends each request at its time; None = refused or failed."""
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=None)) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        started_s = time.perf_counter()

        async def one(request: ChatRequest, at_s: float) -> StreamResult | None:
            await asyncio.sleep(max(0.0, started_s + at_s - time.perf_counter()))
            try:
                return await stream_chat(client, model, request, cache_salt=salt)
            except (RuntimeError, httpx.HTTPError):
                return None

        return await asyncio.gather(*(one(r, at) for r, at in zip(requests, arrivals_s, strict=True)))


def is_good(result: StreamResult | None, ttft_s: float, tpot_s: float) -> bool:
    """Whether both targets were met."""
    if result is None or result.ttft_s > ttft_s:
        return False
    return not result.itl_s or statistics.mean(result.itl_s) <= tpot_s


def trace(rate: float, seconds: float, seed: int) -> tuple[list[ChatRequest], list[float]]:
    """Requests and when they arrive."""
    rng = random.Random(seed)
    requests, arrivals_s, at_s = [], [], rng.expovariate(rate)
    while at_s < seconds:
        requests.append(draw(rng, output_tokens=min(128, max(8, int(rng.lognormvariate(3.7, 0.6))))))
        arrivals_s.append(at_s)
        at_s += rng.expovariate(rate)
    return requests, arrivals_s


def main() -> None:
    """Prints a table, and writes JSON and a plot where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[2, 4, 6, 8], help="requests/s")
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ttft", type=float, default=0.5, help="target, s")
    parser.add_argument("--tpot", type=float, default=0.025, help="target, s per output token")
    parser.add_argument("--prefill", type=int, default=1)
    parser.add_argument("--decode", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.plot:
        importlib.import_module("matplotlib")  # if it is missing, that is known now and not after the measurement
    console = Console()
    rows: dict[str, dict[str, dict[str, float]]] = {name: {} for name in POLICIES}
    decisions: Decisions = {name: {} for name in POLICIES}
    with cluster(prefill=options.prefill, decode=options.decode) as running, gateways(running) as urls:
        for url in urls.values():  # until the workers have measured their rates
            warm = [draw(random.Random(seed), output_tokens=16) for seed in range(8)]
            asyncio.run(run_round(url, warm, [0.2 * i for i in range(8)], f"warm {url}"))
        for rate in options.rates:
            results: dict[str, list[StreamResult | None]] = {name: [] for name in urls}
            for number in range(options.rounds):
                requests, arrivals_s = trace(rate, options.seconds, seed=number)
                for name in rotated(list(urls), number):
                    salt = f"{name}, {rate}, {number}"
                    results[name] += asyncio.run(run_round(urls[name], requests, arrivals_s, salt))
            for name, values in results.items():
                rows[name][f"{rate:g}"] = summary(values, options)
                decisions[name][f"{rate:g}"] = decided(values, options)
                console.print(f"{rate:g}/s, {name}: {rows[name][f'{rate:g}']}")
    print_table(console, rows, options)
    print_decisions(console, decisions)
    if options.json:
        report = {"ttft_s": options.ttft, "tpot_s": options.tpot, "rows": rows, "decisions": decisions}
        options.json.write_text(json.dumps(report, indent=2))
    if options.plot:
        plot(rows, options)


def summary(results: list[StreamResult | None], options: argparse.Namespace) -> dict[str, float]:
    """Good requests per second, and latencies."""
    seconds = options.rounds * options.seconds
    done = [result for result in results if result is not None]
    remote = [r for r in done if r.timing.get("mode") == "remote_prefill"]
    return {
        "goodput": round(sum(is_good(r, options.ttft, options.tpot) for r in results) / seconds, 3),
        "offered": round(len(results) / seconds, 3),
        "failed": len(results) - len(done),
        "ttft_p50_s": round(percentile([r.ttft_s for r in done], 0.5), 4),
        "ttft_p99_s": round(percentile([r.ttft_s for r in done], 0.99), 4),
        "tpot_p50_s": round(percentile([statistics.mean(r.itl_s) for r in done if r.itl_s], 0.5), 5),
        "tpot_p99_s": round(percentile([statistics.mean(r.itl_s) for r in done if r.itl_s], 0.99), 5),
        "remote_share": round(len(remote) / max(1, len(done)), 3),
    }


def rotated(names: list[str], number: int) -> list[str]:
    """The order of a round, so that no policy always runs after the same one."""
    begin = number % len(names)
    return names[begin:] + names[:begin]


def decided(results: list[StreamResult | None], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """By the way that placement chose: how many requests, how many of them good, medians in seconds."""
    modes: dict[str, list[StreamResult]] = {}
    for result in results:
        if result is not None and result.timing:
            modes.setdefault(str(_predicted(result)["mode"]), []).append(result)
    return {
        mode: {
            "requests": len(chosen),
            "good": sum(is_good(r, options.ttft, options.tpot) for r in chosen),
            "predicted_first_token_s": round(
                statistics.median(float(_predicted(r)["first_token_s"]) for r in chosen), 4
            ),
            "actual_first_token_s": round(statistics.median(float(str(r.timing["first_token_s"])) for r in chosen), 4),
            "tpot_s": round(statistics.median([statistics.mean(r.itl_s) for r in chosen if r.itl_s] or [0.0]), 5),
        }
        for mode, chosen in sorted(modes.items())
    }


def _predicted(result: StreamResult) -> dict[str, Any]:
    predicted = result.timing["predicted"]
    assert isinstance(predicted, dict)
    return predicted


def print_decisions(console: Console, decisions: Decisions) -> None:
    """What each policy chose and what came of it."""
    table = Table(title="decisions: medians in ms")
    for heading in ("offered/s", "policy", "way", "requests", "good", "first token, predicted", "actual", "per token"):
        table.add_column(heading, justify="left" if heading in ("policy", "way") else "right")
    for name, rates in decisions.items():
        for rate, modes in rates.items():
            for mode, told in modes.items():
                medians = ("predicted_first_token_s", "actual_first_token_s", "tpot_s")
                milliseconds = (f"{1e3 * told[median]:.1f}" for median in medians)
                table.add_row(rate, name, mode, f"{told['requests']}", f"{told['good']}", *milliseconds)
    console.print(table)


def print_table(console: Console, rows: dict[str, dict[str, dict[str, float]]], options: argparse.Namespace) -> None:
    """Goodput by policy and rate."""
    table = Table(title=f"good requests/s (TTFT <= {options.ttft} s, TPOT <= {1e3 * options.tpot:g} ms)")
    table.add_column("offered/s", justify="right")
    for name in rows:
        table.add_column(name, justify="right")
    for rate in next(iter(rows.values())):
        table.add_row(rate, *(f"{rows[name][rate]['goodput']:.2f}" for name in rows))
    console.print(table)


def plot(rows: dict[str, dict[str, dict[str, float]]], options: argparse.Namespace) -> None:
    """Goodput over the offered rate."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6))
    for name, values in rows.items():
        offered = [value["offered"] for value in values.values()]
        axes.plot(offered, [value["goodput"] for value in values.values()], marker="o", label=name)
    axes.set_xlabel("requests/s offered")
    axes.set_ylabel("good requests/s")
    axes.set_title(f"TTFT within {options.ttft} s and TPOT within {1e3 * options.tpot:g} ms", fontsize=10)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(options.plot)


if __name__ == "__main__":
    main()
