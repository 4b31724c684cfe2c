"""A real suite for the end-to-end tests: every process, a real Redis, real UCX, started as a user starts it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import pytest

from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from shared.identity import pack_tokens
from shared.rpc import open_channel
from tests.e2e.looking import looker

TANDEM = [sys.executable, "-m", "services.cli"]


@dataclass(frozen=True)
class Suite:
    """A suite that is up; `local_url` is a second gateway that places everything without prefill workers.

    `grpc` and `local_grpc` are where the two speak KServe's protocol over gRPC, if they do.
    """

    url: str
    run_dir: Path
    redis_url: str
    local_url: str = ""
    grpc: str = ""
    local_grpc: str = ""

    def client(self, url: str = "") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{url or self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def status(self) -> dict:
        """What `tandem status --json` says."""
        return looker().look(self.run_dir)

    def blocks_in_use(self) -> dict[str, int]:
        """Per worker: blocks that are neither free nor evictable."""
        return {
            worker["worker_id"]: sum(worker["blocks"][state] for state in ("used", "pinned", "quarantined"))
            for worker in self.status()["workers"]
        }

    def gateway_log(self, event: str) -> list[dict]:
        """Lines of the gateway's log with that event, where it writes JSON."""
        return logged(self.run_dir / "logs" / "gateway.log", event)

    def wait_for_baseline(self, timeout_s: float = 20.0) -> None:
        """Every worker's blocks are free or evictable again."""
        deadline = time.monotonic() + timeout_s
        while any(held := self.blocks_in_use().values()):
            assert time.monotonic() < deadline, f"blocks still held: {held}"
            time.sleep(0.05)


def logged(log_file: Path, event: str) -> list[dict]:
    """Lines of a log of JSON objects with that event."""
    lines = (line for line in log_file.read_text().splitlines() if line.startswith("{") and event in line)
    return [line for line in map(json.loads, lines) if line.get("event") == event]


def start_suite(run_dir: Path, *options: str, drain_timeout_s: float = 0.5, **gateway_settings: str) -> Suite:
    environment = {
        "TANDEM_GATEWAY_PLACEMENT": "remote",  # whatever that costs here: what is handed over is what most tests are of
        **os.environ,
        "TANDEM_WORKER_DRAIN_TIMEOUT_S": str(drain_timeout_s),
    }
    environment |= {f"TANDEM_GATEWAY_{name.upper()}": value for name, value in gateway_settings.items()}
    command = [*TANDEM, "up", "--detach", "--port", "0", "--run-dir", str(run_dir), *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    state = json.loads((run_dir / "state.json").read_text())
    return Suite(url=state["url"], run_dir=run_dir, redis_url=state["redis_url"])


def stop_suite(suite: Suite) -> None:
    subprocess.run([*TANDEM, "down", "--run-dir", str(suite.run_dir)], check=True, timeout=120)


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    """One prefill and two decode workers with the bundled model, and a second gateway without prefill workers."""
    run_dir = tmp_path_factory.mktemp("suite")
    options = ("--prefill", "1", "--decode", "2", "--threads", "1", "--kv-cache-bytes", "64MiB")
    suite = start_suite(run_dir, *options, grpc_port="0", log_format="json")
    try:
        with local_gateway(suite) as local_url:
            [grpc], [local_grpc] = (
                [line["address"] for line in logged(run_dir / "logs" / name, "listening_grpc")]
                for name in ("gateway.log", "gateway-local.log")
            )
            yield Suite(suite.url, suite.run_dir, suite.redis_url, local_url, grpc, local_grpc)
    finally:
        stop_suite(suite)


@pytest.fixture(scope="module")
def start_another(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Suite]]:
    """`start_another(*options)`: a suite of the module's own, stopped at its end."""
    suites: list[Suite] = []

    def start(*options: str) -> Suite:
        suites.append(start_suite(tmp_path_factory.mktemp("another"), *options))
        return suites[-1]

    yield start
    for suite in suites:
        stop_suite(suite)


@contextlib.contextmanager
def local_gateway(suite: Suite) -> Iterator[str]:
    """A second gateway, which never prefills remotely; yields its URL."""
    settings = {"PORT": "0", "REDIS_URL": suite.redis_url, "PLACEMENT": "local", "GRPC_PORT": "0", "LOG_FORMAT": "json"}
    settings["BATCH_POLL_S"] = "86400"  # batches are the other one's
    environment = {**os.environ, **{f"TANDEM_GATEWAY_{name}": value for name, value in settings.items()}}
    log_file = suite.run_dir / "logs" / "gateway-local.log"
    with log_file.open("wb") as log:
        gateway = subprocess.Popen([sys.executable, "-m", "services.gateway"], env=environment, stderr=log, stdout=log)
    try:
        yield _url_of(suite, gateway, log_file)
    finally:
        gateway.terminate()
        gateway.wait(30)


def _url_of(suite: Suite, gateway: subprocess.Popen, log_file: Path) -> str:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        assert gateway.poll() is None, log_file.read_text()
        for process in suite.status()["processes"]:
            if process["role"] == "gateway" and process["pid"] == gateway.pid:
                url = f"http://{process['address']}"
                if httpx.get(f"{url}/ready").status_code == 200:
                    return url
        time.sleep(0.2)
    raise AssertionError(log_file.read_text())


NOBODY = pb.PeerRef(worker_id="nobody", incarnation="0123456789abcdef")
"""A prefill worker that does not exist."""


@dataclass
class Generated:
    token_ids: list[int] = field(default_factory=list)
    finish: pb.Finish | None = None
    failure: pb.Failure | None = None


async def _generate(worker: dict, prompt: list[int], *, max_tokens: int = 8, **submit_fields) -> Generated:
    """One greedy session on the worker that `tandem status --json` described; holders are asked whatever it costs."""
    result = Generated()
    if submit_fields.get("holders"):
        # Else a worker may find that computing is cheaper, as on a busy machine with a fast engine it is.
        submit_fields.setdefault("prefill_candidates", [NOBODY])
    async with open_channel(worker["address"]) as channel:
        call = rpc.WorkerStub(channel).Generate()
        hello = pb.Hello(gateway_id="test", incarnation=worker["incarnation"], fingerprint=worker["fingerprint"])
        await call.write(pb.GenerateCommand(hello=hello))
        await call.read()  # accepted; a refusal is raised here
        submit = pb.Submit(
            session_id="direct",
            num_choices=1,
            prompt_tokens=pack_tokens(prompt),
            sampling=pb.SamplingParams(
                temperature=0, top_p=1, repetition_penalty=1, max_tokens=max_tokens, ignore_eos=True
            ),
            **submit_fields,
        )
        await call.write(pb.GenerateCommand(submit=submit))
        async with asyncio.timeout(60):
            while isinstance(message := await call.read(), pb.StepOutput):
                result.token_ids += message.token_ids
                if message.finishes or message.failures:
                    result.finish = message.finishes[0] if message.finishes else None
                    result.failure = message.failures[0] if message.failures else None
                    break
        call.cancel()
    return result


@pytest.fixture
def generate():
    """`generate(worker, prompt, **submit_fields)`: speaks to one worker without a gateway."""
    return _generate
