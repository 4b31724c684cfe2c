"""Streaming users for locust: time to first token, time between tokens, tokens per second.

    locust -f loadtest/locustfile.py --headless -u 32 -r 8 -t 60s --host http://127.0.0.1:8000

Locust's table then has four rows: the whole request, `TTFT` and `ITL` (milliseconds, one sample per token after the
first), and `tokens` (response_length is the number of output tokens).
"""

from __future__ import annotations

import json
import random
import time
from typing import Any

from locust import HttpUser, between, events, task

from loadtest.workload import draw

_totals = {"tokens": 0, "started_s": 0.0}


@events.test_start.add_listener
def _start(**_: Any) -> None:
    _totals["tokens"], _totals["started_s"] = 0, time.monotonic()


@events.test_stop.add_listener
def _report(**_: Any) -> None:
    elapsed_s = time.monotonic() - _totals["started_s"]
    print(f"output tokens: {_totals['tokens']}, {_totals['tokens'] / elapsed_s:.1f} tokens/s over {elapsed_s:.1f} s")


class StreamingUser(HttpUser):
    """Asks, reads the stream to its end, thinks for a moment, asks again."""

    wait_time = between(0.05, 0.5)

    def on_start(self) -> None:
        """Learns the served model's name."""
        self.rng = random.Random(id(self))
        self.model = self.client.get("/v1/models", name="/v1/models").json()["data"][0]["id"]

    @task
    def chat(self) -> None:
        """One streamed chat completion."""
        request = draw(self.rng)
        started_s = last_s = time.perf_counter()
        num_chunks, num_tokens = 0, 0
        with self.client.post(
            "/v1/chat/completions",
            json=request.body(self.model),
            stream=True,
            catch_response=True,
            name=f"chat {request.kind}",
        ) as response:
            if response.status_code != 200:
                response.failure(f"HTTP {response.status_code}")
                return
            for raw in response.iter_lines():
                line = raw.decode() if isinstance(raw, bytes) else raw
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    response.failure(event["error"]["message"])
                    return
                if event.get("usage"):
                    num_tokens = event["usage"]["completion_tokens"]
                if event["choices"] and event["choices"][0]["delta"].get("content"):
                    now_s = time.perf_counter()
                    self._fire("ITL" if num_chunks else "TTFT", now_s - last_s)
                    last_s, num_chunks = now_s, num_chunks + 1
            _totals["tokens"] += num_tokens
            self._fire("tokens", time.perf_counter() - started_s, num_tokens)

    def _fire(self, name: str, seconds: float, length: int = 0) -> None:
        self.environment.events.request.fire(
            request_type="SSE",
            name=name,
            response_time=1e3 * seconds,
            response_length=length,
            exception=None,
            context={},
        )
