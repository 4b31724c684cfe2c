"""`make bench-suite`: the suite beside transformers' `generate` on the same model and requests, in one run.

Both use the same cores and dtype, greedy decoding and a fixed number of output tokens. transformers gets the requests
in static batches as large as the suite's concurrency; rounds are interleaved and medians are printed. Tandem is
measured through HTTP, with every process of the suite and the client on the same machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loadtest.cluster import cluster
from loadtest.streams import StreamResult, run_streams
from loadtest.workload import ChatRequest, draw

BUNDLED = Path(__file__).parent.parent / "shared" / "assets" / "pydoc-mini"


def requests_for(concurrency: int, output_tokens: int, seed: int) -> list[ChatRequest]:
    """Enough requests to keep `concurrency` streams busy twice over."""
    rng = random.Random(seed)
    return [draw(rng, output_tokens=output_tokens) for _ in range(max(4, 2 * concurrency))]


def transformers_generate(model_dir: Path, dtype: str) -> Callable[[Sequence[ChatRequest], int], float]:
    """Loads the model; returns a function from (requests, batch size) to wall seconds."""
    # As the suite's engines have it: fair, and on cores that others use too much faster than spinning threads.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).eval()

    def run(requests: Sequence[ChatRequest], batch_size: int) -> float:
        started_s = time.perf_counter()
        for start in range(0, len(requests), batch_size):
            batch = requests[start : start + batch_size]
            texts = [
                tokenizer.apply_chat_template(r.messages, tokenize=False, add_generation_prompt=True) for r in batch
            ]
            inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
            length = batch[0].max_tokens
            with torch.inference_mode():
                model.generate(**inputs, do_sample=False, min_new_tokens=length, max_new_tokens=length)
        return time.perf_counter() - started_s

    return run


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def latency(results: Sequence[StreamResult]) -> dict[str, float]:
    """TTFT and ITL in milliseconds."""
    ttft = [1e3 * r.ttft_s for r in results]
    itl = [1e3 * gap for r in results for gap in r.itl_s]
    return {
        "ttft_p50_ms": percentile(ttft, 0.5),
        "ttft_p99_ms": percentile(ttft, 0.99),
        "itl_p50_ms": percentile(itl, 0.5),
        "itl_p99_ms": percentile(itl, 0.99),
    }


def handoff(results: Sequence[StreamResult]) -> dict[str, float]:
    """Bytes moved per request that moved any, their rate, and the transfer's share of the time to first token.

    The share counts what the transfer added after prefill had ended: the rest ran while prefill computed.
    """
    moved = [r for r in results if float(str(r.timing.get("fetched_bytes", 0)))]
    if not moved:
        return {}
    number = lambda r, key: float(str(r.timing.get(key, 0)))  # noqa: E731
    return {
        "requests": len(moved),
        "bytes_per_request": statistics.mean(number(r, "fetched_bytes") for r in moved),
        "gb_per_s": sum(number(r, "fetched_bytes") for r in moved) / sum(number(r, "fetch_s") for r in moved) / 1e9,
        "share_of_ttft": statistics.median(
            max(0.0, number(r, "first_step_s") - number(r, "prefill_s") - number(r, "queued_s")) / r.ttft_s
            for r in moved
        ),
    }


def measure(url: str, concurrency: int, output_tokens: int, seed: int) -> tuple[float, list[StreamResult]]:
    """One round; the cache salt keeps the prefix cache of earlier rounds and of other concurrencies out of it."""
    requests = requests_for(concurrency, output_tokens, seed)
    seconds, results = asyncio.run(
        run_streams(url, requests, concurrency, cache_salt=f"{concurrency} streams, round {seed}")
    )
    return sum(r.output_tokens for r in results) / seconds, results


def main() -> None:
    """Prints the tables, and JSON with `--json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console()
    baseline = transformers_generate(BUNDLED, options.dtype)
    report: dict[str, object] = {"hardware": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}"}
    rows: dict[int, dict[str, float]] = {}
    latencies: dict[str, dict[str, float]] = {}
    with (
        cluster(prefill=1, decode=1, options=("--dtype", options.dtype)) as split,
        cluster(prefill=0, decode=1, options=("--dtype", options.dtype)) as whole,
    ):
        report["startup_s"] = {"disaggregated": split.startup_s, "aggregated": whole.startup_s}
        for concurrency in options.concurrency:
            samples: dict[str, list[float]] = {"transformers": [], "aggregated": [], "disaggregated": []}
            results: dict[str, list[StreamResult]] = {"aggregated": [], "disaggregated": []}
            for seed in range(options.rounds):
                requests = requests_for(concurrency, options.output_tokens, seed)
                tokens = options.output_tokens * len(requests)
                samples["transformers"].append(tokens / baseline(requests, concurrency))
                for name, url in (("aggregated", whole.url), ("disaggregated", split.url)):
                    rate, streams = measure(url, concurrency, options.output_tokens, seed)
                    samples[name].append(rate)
                    results[name] += streams
                console.print(f"concurrency {concurrency}, round {seed + 1} of {options.rounds} done")
            rows[concurrency] = {name: statistics.median(values) for name, values in samples.items()}
            for name, streams in results.items():
                latencies[f"{name}, {concurrency} streams"] = latency(streams)
            report[f"handoff, {concurrency} streams"] = handoff(results["disaggregated"])
    report |= {"tokens_per_s": rows, "latency": latencies}
    print_tables(console, report, rows, latencies)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def print_tables(
    console: Console,
    report: dict[str, object],
    rows: dict[int, dict[str, float]],
    latencies: dict[str, dict[str, float]],
) -> None:
    """Throughput with ratios, latencies, and the hand-over."""
    table = Table(title=f"output tokens/s, {report['hardware']}")
    for column in ("streams", "transformers", "aggregated", "ratio", "disaggregated", "ratio"):
        table.add_column(column, justify="right")
    for concurrency, row in rows.items():
        base, whole, split = row["transformers"], row["aggregated"], row["disaggregated"]
        table.add_row(
            str(concurrency),
            f"{base:.0f}",
            f"{whole:.0f}",
            f"{whole / base:.2f}",
            f"{split:.0f}",
            f"{split / base:.2f}",
        )
    console.print(table)
    table = Table(title="latency, ms")
    for column in ("", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99"):
        table.add_column(column, justify="right")
    for name, values in latencies.items():
        table.add_row(name, *(f"{value:.1f}" for value in values.values()))
    console.print(table)
    for name, value in report.items():
        if name.startswith(("handoff", "startup")):
            console.print(name, value)


if __name__ == "__main__":
    main()
