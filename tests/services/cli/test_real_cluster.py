"""`tandem up` with the real services, in the foreground, as in a terminal."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from services.cli.state_file import read_state, start_ticks

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

TANDEM = [sys.executable, "-m", "services.cli"]


def wait_for(condition, timeout_s: float = 90):
    deadline_s = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < deadline_s, "not in time"
        time.sleep(0.1)
    return result


def up(run_dir: Path, *options: str, **popen) -> subprocess.Popen:
    """In a process group of its own, so that a signal to the group is a terminal's Ctrl-C."""
    command = [*TANDEM, "up", "--run-dir", str(run_dir), "--port", "0", "--kv-cache-bytes", "32MiB", *options]
    with (run_dir / "up.out").open("w") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, process_group=0, **popen)


def ready_state(run_dir: Path, supervisor: subprocess.Popen):
    def look():
        assert supervisor.poll() is None, (run_dir / "up.out").read_text()
        state = read_state(run_dir)
        return state if state and state.is_ready else None

    return wait_for(look)


def pids(state) -> list[int]:
    return [process.pid for process in state.processes]


def nothing_left(state) -> None:
    wait_for(lambda: not any(start_ticks(pid) for pid in pids(state)), 20)
    assert not Path(state.arena_dir).exists()
    assert not [path.name for path in Path(state.run_dir).iterdir() if ".sock" in path.name or "state" in path.name]


@pytest.fixture
def run_dir(short_path):
    yield short_path
    subprocess.run([*TANDEM, "down", "--run-dir", str(short_path)], check=True, timeout=120)


def test_a_cluster_heals_and_goes_without_a_trace_on_ctrl_c(run_dir):
    supervisor = up(run_dir)
    state = ready_state(run_dir, supervisor)
    by_name = {process.name: process for process in state.processes}

    again = subprocess.run([*TANDEM, "up", "--run-dir", str(run_dir)], capture_output=True, text=True, timeout=60)
    assert again.returncode == 1
    assert "already runs" in again.stderr

    for victim in ("decode-0.transfer", "prefill-0"):
        os.kill(by_name[victim].pid, signal.SIGKILL)
    healed = wait_for(
        lambda: (
            (now := read_state(run_dir))
            and now.is_ready
            and sum(process.restarts for process in now.processes) == 2
            and now
        )
    )
    answer = subprocess.run(
        [*TANDEM, "chat", "--run-dir", str(run_dir), "--once", "What does json.dumps do?"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Serialize" in answer.stdout, answer.stderr
    status = subprocess.run([*TANDEM, "status", "--json", "--run-dir", str(run_dir)], capture_output=True, timeout=60)
    workers = json.loads(status.stdout)["workers"]
    assert {worker["worker_id"]: worker["ready"] for worker in workers} == {"decode-0": True, "prefill-0": True}

    os.killpg(supervisor.pid, signal.SIGINT)
    assert supervisor.wait(60) == 0
    nothing_left(healed)
    output = (run_dir / "up.out").read_text()
    assert f"curl -N {state.url}/v1/chat/completions" in output
    assert "prefill-0            restarting: was killed by SIGKILL" in output


def test_processes_end_with_a_supervisor_that_is_killed_and_down_cleans_up(run_dir):
    supervisor = up(run_dir, "--prefill", "0")
    state = ready_state(run_dir, supervisor)
    supervisor.kill()
    supervisor.wait()
    wait_for(lambda: not any(start_ticks(pid) for pid in pids(state)), 30)
    subprocess.run([*TANDEM, "down", "--run-dir", str(run_dir)], check=True, timeout=60)
    nothing_left(state)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{state.url}/live")


def test_a_service_that_cannot_start_ends_everything_with_its_log(run_dir):
    environment = {**os.environ, "TANDEM_WORKER_NO_SUCH_SETTING": "1"}
    supervisor = up(run_dir, "--prefill", "0", env=environment)
    assert supervisor.wait(60) == 1
    output = (run_dir / "up.out").read_text()
    assert "error: decode-0 exited with status" in output
    assert "TANDEM_WORKER_NO_SUCH_SETTING" in output
    assert not (run_dir / "state.json").exists()


def test_ctrl_c_while_starting_leaves_nothing(run_dir):
    supervisor = up(run_dir)
    state = wait_for(lambda: (now := read_state(run_dir)) and len([p for p in now.processes if p.pid]) == 6 and now)
    os.killpg(supervisor.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        supervisor.wait(60)
    assert supervisor.returncode == 0
    nothing_left(state)
