"""What a restart costs the next turn of a conversation: `python -m loadtest.warm_restart_bench`.

One decode worker with its sidecar. A long prompt is answered; the worker is killed (or stopped, `--signal TERM`); its
next life answers the same prompt plus one more turn. Beside it, in turn, the same prompt under another cache salt, that
nobody has KV for: the time to first token with and without what the last life left, on the same worker.

It also kills the sidecar and measures from there until it serves its worker again; the worker keeps its KV meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import time
import uuid

import httpx

from loadtest.cluster import RunningCluster, cluster

SENTENCE = "The report was read twice and filed, and nobody asked for a second copy of it. "
POLL_S = 0.05
LIMIT_S = 120.0


def _first_token(url: str, prompt: str, salt: str) -> tuple[float, dict[str, object]]:
    """Seconds to the first token, and the server's timeline."""
    body = {"model": "pydoc-mini", "prompt": prompt, "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    body |= {"cache_salt": salt, "timing": True, "stream": True}
    started_s = time.perf_counter()
    ttft_s, timing = 0.0, {}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if not ttft_s and event.get("choices") and event["choices"][0].get("text"):
                ttft_s = time.perf_counter() - started_s
            if event.get("timing"):
                timing = event["timing"]["sessions"][0]
    return ttft_s, timing


def _pid(suite: RunningCluster, name: str) -> int:
    processes = suite.status()["processes"]
    assert isinstance(processes, list)
    return int(next(process["pid"] for process in processes if process["name"] == name))


def _worker(suite: RunningCluster) -> dict[str, object]:
    workers = suite.status()["workers"]
    assert isinstance(workers, list)
    return workers[0] if workers else {}


def _wait(condition: object, what: str) -> None:
    assert callable(condition)
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError(what)
        time.sleep(POLL_S)


def _restart(suite: RunningCluster, number: signal.Signals) -> float:
    """Ends the worker; returns the seconds until its next life is ready."""
    before = _worker(suite)["incarnation"]
    started_s = time.monotonic()
    os.kill(_pid(suite, "decode-0"), number)

    def is_back() -> bool:
        worker = _worker(suite)
        return bool(worker) and worker["incarnation"] != before and bool(worker["ready"])

    _wait(is_back, "the worker does not come back")
    return time.monotonic() - started_s


def _sidecar_back_s(suite: RunningCluster) -> float:
    """Kills the sidecar; returns the seconds until its successor says that a worker is attached."""
    process = next(p for p in suite.status()["processes"] if p["name"] == "decode-0.transfer")  # type: ignore[attr-defined]
    log = suite.run_dir / "logs" / "decode-0.transfer.log"
    before = log.read_text().count("worker_attached")
    started_s = time.monotonic()
    os.kill(process["pid"], signal.SIGKILL)
    while log.read_text().count("worker_attached") == before:
        if time.monotonic() - started_s > LIMIT_S:
            raise TimeoutError("the sidecar does not come back")
        time.sleep(0.01)
    return time.monotonic() - started_s


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sentences", type=int, default=80, help="of the prompt, about 18 tokens each")
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    arguments = parser.parse_args()
    number = signal.Signals[f"SIG{arguments.signal}"]
    warm, cold, hot, restarts, sidecars = [], [], [], [], []
    with cluster(prefill=0, decode=1, options=("--kv-cache-bytes", "256MiB")) as suite:
        for _ in range(arguments.rounds):
            prompt, salt = SENTENCE * arguments.sentences, uuid.uuid4().hex
            _first_token(suite.url, prompt, salt)
            hot.append(_first_token(suite.url, prompt + "And then? ", salt)[0])
            restarts.append(_restart(suite, number))
            _first_token(suite.url, "Warm.", uuid.uuid4().hex)
            ttft_s, timing = _first_token(suite.url, prompt + "And then? ", salt)
            warm.append(ttft_s)
            cold.append(_first_token(suite.url, prompt + "And then? ", uuid.uuid4().hex)[0])
            print(f"warm {ttft_s * 1e3:8.1f} ms  cold {cold[-1] * 1e3:8.1f} ms  of the warm one: {timing}", flush=True)
        for _ in range(arguments.rounds):
            sidecars.append(_sidecar_back_s(suite))
    print(f"TTFT without a restart {statistics.median(hot) * 1e3:8.1f} ms")
    print(f"TTFT after SIG{arguments.signal}, KV adopted {statistics.median(warm) * 1e3:8.1f} ms")
    print(f"TTFT computed anew {statistics.median(cold) * 1e3:8.1f} ms")
    ratio = statistics.median(a / b for a, b in zip(warm, cold, strict=True))
    print(f"warm / cold {ratio:.3f}   worker ready again after {statistics.median(restarts):.1f} s")
    print(f"sidecar killed: attached again after {statistics.median(sidecars):.2f} s, at most {max(sidecars):.2f} s")


if __name__ == "__main__":
    main()
