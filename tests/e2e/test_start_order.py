"""Services find each other whatever the order in which they start (F21), and a successor of each is found too (F17)."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from services.cli.cluster import ClusterSpec, free_port, plan
from services.cli.process import with_our_packages
from services.cli.run_directory import prepare_run_dir
from shared.models.resolve import resolve_model

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

PROMPT = "The report was read twice and filed. Nobody asked for a second copy. " * 12


class Processes:
    """The processes of a suite, without the supervisor that would start them in order."""

    def __init__(self, run_dir: Path) -> None:
        spec = ClusterSpec(
            model_dir=resolve_model("pydoc-mini"),
            served_model_name="pydoc-mini",
            run_dir=prepare_run_dir(run_dir),
            port=free_port(),
            kv_cache_bytes=32 << 20,
            tier_bytes=8 << 20,
        )
        spec.arena_dir.mkdir(mode=0o700, exist_ok=True)
        self.arena_dir, self.url = spec.arena_dir, spec.url
        _, specs = plan(spec)
        self.specs = {process.name: process for process in specs}
        self.running: dict[str, subprocess.Popen] = {}

    def start(self, name: str) -> None:
        spec = self.specs[name]
        environment = {**with_our_packages(os.environ), **spec.environment, "TANDEM_GATEWAY_PLACEMENT": "remote"}
        with spec.log_path.open("ab") as log:
            self.running[name] = subprocess.Popen(spec.command, env=environment, stdout=log, stderr=log)

    def until_prefilled_remotely(self, timeout_s: float = 90) -> None:
        deadline = time.monotonic() + timeout_s
        said = ""
        while time.monotonic() < deadline:
            assert all(process.poll() is None for process in self.running.values())
            try:
                body = {"model": "pydoc-mini", "prompt": PROMPT, "max_tokens": 4, "timing": True}
                body["cache_salt"] = str(time.monotonic())
                reply = httpx.post(f"{self.url}/v1/completions", json=body, timeout=30)
            except httpx.TransportError as exc:
                said = repr(exc)
            else:
                said = reply.text
                if reply.status_code == 200 and reply.json()["timing"]["sessions"][0]["mode"] == "remote_prefill":
                    return
            time.sleep(0.2)
        raise AssertionError(said)

    def stop(self) -> None:
        for process in self.running.values():
            process.send_signal(signal.SIGKILL)
            process.wait()
        for leftover in self.arena_dir.glob("*"):
            leftover.unlink()
        self.arena_dir.rmdir()


@pytest.fixture
def processes(short_path):
    processes = Processes(short_path)
    yield processes
    processes.stop()


def test_a_gateway_that_starts_first_and_a_redis_that_starts_last_are_fine(processes):
    for name in reversed(processes.specs):
        processes.start(name)
        time.sleep(0.7)
    processes.until_prefilled_remotely()


def test_the_successor_of_a_killed_process_is_found_at_its_new_address(processes):
    for name in processes.specs:
        processes.start(name)
    processes.until_prefilled_remotely()
    for name in ("prefill-0", "decode-0.transfer", "decode-0"):
        process = processes.running.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()
        processes.start(name)
        processes.until_prefilled_remotely()
