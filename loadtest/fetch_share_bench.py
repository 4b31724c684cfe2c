"""Where the time to a disaggregated request's first token goes: `python -m loadtest.fetch_share_bench`.

One prefill and one decode worker, one request at a time, prompts that nobody has seen. The parts are from the replies'
`timing` blocks. While one chunk of a prompt is fetched the next one is computed, so prefill and fetch overlap:
`exposed` is what the decode worker still waited for blocks when the prefill worker had computed the last one. `tail` is
the step that computes the rest of the prompt on the decode worker and samples. What is left, `rest`, is the gateway,
queues and messages; prefill, exposed, tail and rest make up the whole.
"""

from __future__ import annotations

import argparse
import random
import statistics
from typing import Any

import httpx

from loadtest.cluster import cluster

LENGTHS = (256, 1024, 4080)
VOCABULARY = 6000
PARTS = ("prefill", "fetch", "exposed", "verify", "tail", "rest")


def run_prompt(url: str, token_ids: list[int]) -> dict[str, float]:
    """One request; seconds by part.

    Raises:
        RuntimeError: Its KV was not computed by the prefill worker.
    """
    body = {"model": "pydoc-mini", "prompt": token_ids, "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    reply = httpx.post(f"{url}/v1/completions", json={**body, "timing": True}, timeout=120)
    timing: dict[str, Any] = reply.raise_for_status().json()["timing"]
    session = timing["sessions"][0]
    if session["mode"] != "remote_prefill":
        raise RuntimeError(f"{len(token_ids)} tokens were served as {session['mode']}")
    ttft_s, tail_s = timing["first_token_s"], session["first_token_s"] - session["first_step_s"]
    exposed_s = max(0.0, session["first_step_s"] - session["queued_s"] - session["prefill_s"])
    return {
        "ttft": ttft_s,
        "prefill": session["prefill_s"],
        "fetch": session["fetch_s"],
        "exposed": exposed_s,
        "verify": session["verify_s"],
        "tail": tail_s,
        "rest": ttft_s - session["prefill_s"] - exposed_s - tail_s,
        "bytes": session["fetched_bytes"],
    }


def main() -> None:
    """Starts a suite, measures, prints medians and shares of the time to first token."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tls", default="tcp", help="as TANDEM_TRANSFER_UCX_TLS")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with cluster(
        prefill=1,
        decode=1,
        options=("--threads", "1", "--kv-cache-bytes", "512MiB"),
        fetches_all=True,
        ucx_tls=options.tls,
    ) as suite:
        found: dict[int, list[dict[str, float]]] = {length: [] for length in LENGTHS}
        for number in range(options.rounds + 1):
            for length, runs in found.items():
                run = run_prompt(suite.url, [rng.randrange(256, VOCABULARY) for _ in range(length)])
                if number:  # the first of each warms up
                    runs.append(run)
    print(f"UCX {options.tls}, {options.rounds} prompts each, medians; ms, and % of the time to first token")
    print(f"{'tokens':>7} {'MB':>6} {'TTFT':>8}" + "".join(f"{part:>16}" for part in PARTS))
    for length, runs in found.items():
        middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        shares = {part: statistics.median(run[part] / run["ttft"] for run in runs) for part in PARTS}
        cells = "".join(f"{middle[part] * 1e3:9.1f} {shares[part]:5.1%}" for part in PARTS)
        print(f"{length:7} {middle['bytes'] / 1e6:6.1f} {middle['ttft'] * 1e3:8.1f} {cells}")


if __name__ == "__main__":
    main()
