"""One engine in a process of its own, told by lines of JSON what to do next: nobody's threads disturb the others'.

python -m loadtest.engine.contestant tandem:bfloat16 DIRECTORY
< {"do": "decode", "batch": 8, "context": 128, "steps": 32}
> {"seconds": 0.0173}
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Protocol

from loadtest.engine.requests import TokenRequest, draw_requests


class Contestant(Protocol):
    """What is measured of an engine. Every method runs once and returns seconds."""

    vocab_size: int

    def decode(self, batch: int, context: int, steps: int) -> float:
        """Mean time of a step that gives each of `batch` sequences its next token.

        The first step finds `context` tokens of each in the cache; a later call with the same numbers mostly finds the
        caches as they were, so that rounds are short.
        """

    def prefill(self, tokens: int) -> float:
        """One prompt, to its first output token."""

    def workload(self, requests: list[TokenRequest], how: str) -> float:
        """All requests, greedily, from the first to the last token; `how` names the engine's own way."""


class Remote:
    """The parent's end of a contestant's process."""

    def __init__(self, name: str, directory: Path, threads: int) -> None:
        self.name = name
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if name.startswith("tandem"):
            environment["OMP_WAIT_POLICY"] = "passive"  # as the command line starts its engines
        self._process = subprocess.Popen(
            [sys.executable, "-m", "loadtest.engine.contestant", name, str(directory), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._reply()

    def run(self, **what: object) -> float:
        """Seconds that the contestant took.

        Raises:
            RuntimeError: Its process ended.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return float(self._reply()["seconds"])

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _reply(self) -> dict[str, float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                reply: dict[str, float] = json.loads(line)
                return reply
        raise RuntimeError(f"{self.name} ended with exit code {self._process.wait()}")


def make(name: str, directory: Path, threads: int) -> Contestant:
    """The engine `kind:variant` on a checkpoint."""
    kind, variant = name.split(":")
    if kind == "tandem":
        from loadtest.engine.tandem_contestant import TandemContestant

        return TandemContestant(directory, variant, threads)
    if kind == "llama.cpp":
        from loadtest.engine.llama_cpp_contestant import LlamaCppContestant

        return LlamaCppContestant(directory, variant, threads)
    from loadtest.engine.transformers_contestant import TransformersContestant

    return TransformersContestant(directory, variant, threads)


def main() -> None:
    """Serves one contestant until its standard input ends."""
    name, directory, threads = sys.argv[1:]
    contestant = make(name, Path(directory), int(threads))
    requests = draw_requests(contestant.vocab_size)
    print(json.dumps({"ready": 1}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        match task.pop("do"):
            case "decode":
                seconds = contestant.decode(**task)
            case "prefill":
                seconds = contestant.prefill(**task)
            case _:
                seconds = contestant.workload(requests[: task["count"]], task["how"])
        print(json.dumps({"seconds": seconds}), flush=True)
    os._exit(0)  # some engines' threads do not end by themselves


if __name__ == "__main__":
    main()
