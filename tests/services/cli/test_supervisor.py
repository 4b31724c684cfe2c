"""The supervisor, with tiny programs in place of the services."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from services.cli.process import ProcessSpec, ProcessState, python_module, with_our_packages
from services.cli.state_file import start_ticks
from services.cli.supervisor import Backoff, Readiness, StartFailed, Supervisor

SERVE = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1]); name = sys.argv[2]
def stop(*_):
    with (folder / "stopped").open("a") as log:
        log.write(name + "\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
(folder / name).write_text(str(os.getpid()))
while True:
    time.sleep(0.05)
"""
DIE_AT_START = "print('no such model'); raise SystemExit(3)"
IGNORE_SIGTERM = SERVE.replace("signal.signal(signal.SIGTERM, stop)", "signal.signal(signal.SIGTERM, signal.SIG_IGN)")


async def serves(folder: Path, process) -> Readiness:
    """Ready when the program of this very life has written its pid."""
    try:
        return Readiness((folder / process.spec.name).read_text() == str(process.pid))
    except FileNotFoundError:
        return Readiness(False, "not there yet")


def spec(folder: Path, name: str, role: str, program: str = SERVE, **fields) -> ProcessSpec:
    command = (sys.executable, "-S", "-c", program, str(folder), name)
    return ProcessSpec(
        name=name, role=role, command=command, log_path=folder / f"{name}.log", **{"restart_after_s": 0.05, **fields}
    )


def supervisor(folder: Path, *specs: ProcessSpec, **options) -> Supervisor:
    return Supervisor(specs, lambda process: serves(folder, process), **options)


async def until(condition, timeout_s: float = 15) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)


async def test_all_come_up_and_go_down_in_order(tmp_path):
    roles = {"redis": "redis", "side": "kv_transfer", "decode-0": "decode", "prefill-0": "prefill", "front": "gateway"}
    cluster = supervisor(tmp_path, *(spec(tmp_path, name, role) for name, role in roles.items()))
    await cluster.bring_up(20)
    assert cluster.is_ready
    pids = [process.pid for process in cluster.processes]
    await cluster.shut_down()
    stopped = (tmp_path / "stopped").read_text().split()
    assert stopped[0] == "front"
    assert set(stopped[1:3]) == {"decode-0", "prefill-0"}
    assert stopped[3:] == ["side", "redis"]
    assert not any(start_ticks(pid) for pid in pids)
    assert {process.state for process in cluster.processes} == {ProcessState.STOPPED}


async def test_a_killed_process_is_shown_and_restarted(tmp_path):
    seen = []
    cluster = supervisor(
        tmp_path,
        spec(tmp_path, "decode-0", "decode"),
        on_change=lambda: seen.append((process.state, process.detail)),
    )
    process = cluster.processes[0]
    await cluster.bring_up(20)
    first = process.pid
    os.kill(first, signal.SIGKILL)
    await until(lambda: process.state is ProcessState.READY and process.pid != first)
    await cluster.shut_down()
    assert process.restarts == 1
    assert any(state is ProcessState.RESTARTING and "killed by SIGKILL" in detail for state, detail in seen)


async def test_a_process_that_fails_at_start_fails_the_cluster_with_its_log(tmp_path):
    cluster = supervisor(
        tmp_path, spec(tmp_path, "decode-0", "decode", DIE_AT_START), spec(tmp_path, "front", "gateway")
    )
    with pytest.raises(StartFailed, match="decode-0 exited with status 3") as caught:
        await cluster.bring_up(20)
    assert caught.value.log_lines == ["no such model"]
    await cluster.shut_down()
    assert cluster.processes[0].state is ProcessState.FAILED
    assert all(process.pid is None for process in cluster.processes)


async def test_a_program_that_does_not_exist_fails_the_cluster(tmp_path):
    missing = ProcessSpec(
        name="decode-0", role="decode", command=("/does/not/exist",), log_path=tmp_path / "decode-0.log"
    )
    cluster = supervisor(tmp_path, missing)
    with pytest.raises(StartFailed) as caught:
        await cluster.bring_up(20)
    assert "/does/not/exist" in "\n".join(caught.value.log_lines)
    await cluster.shut_down()


async def test_a_process_that_is_never_ready_fails_the_cluster_in_time(tmp_path):
    cluster = supervisor(tmp_path, spec(tmp_path, "decode-0", "decode", "import time; time.sleep(60)"))
    started_s = time.monotonic()
    with pytest.raises(StartFailed, match=r"not ready after 0\.5 s \(not there yet\)"):
        await cluster.bring_up(0.5)
    await cluster.shut_down()
    assert time.monotonic() - started_s < 10


async def test_a_process_that_ignores_sigterm_is_killed_after_its_grace(tmp_path):
    cluster = supervisor(tmp_path, spec(tmp_path, "decode-0", "decode", IGNORE_SIGTERM, stop_grace_s=0.3))
    await cluster.bring_up(20)
    pid = cluster.processes[0].pid
    await cluster.shut_down()
    assert not start_ticks(pid)


async def test_hurrying_kills_at_once(tmp_path):
    cluster = supervisor(tmp_path, spec(tmp_path, "decode-0", "decode", IGNORE_SIGTERM, stop_grace_s=60))
    await cluster.bring_up(20)
    stopping = asyncio.create_task(cluster.shut_down())
    await asyncio.sleep(0.1)
    cluster.hurry()
    async with asyncio.timeout(30):
        await stopping


def test_backoff_doubles_up_to_its_limit():
    backoff = Backoff(limit_s=30)
    assert [backoff.delay_s(n, 0.5) for n in (1, 2, 3, 7, 500)] == [0.5, 1, 2, 30, 30]


def test_children_end_with_a_supervisor_that_is_killed(tmp_path):
    program = f"""
        import asyncio, pathlib, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_supervisor import spec, supervisor
        async def main():
            folder = pathlib.Path({str(tmp_path)!r})
            cluster = supervisor(folder, spec(folder, "decode-0", "decode"))
            await cluster.bring_up(20)
            print("up", flush=True)
            await asyncio.sleep(60)
        asyncio.run(main())
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, env=with_our_packages(os.environ)
    )
    assert parent.stdout.readline() == b"up\n"
    child = int((tmp_path / "decode-0").read_text())
    parent.kill()
    parent.wait()
    deadline_s = time.monotonic() + 10
    while start_ticks(child):
        assert time.monotonic() < deadline_s, "the child outlived its supervisor"
        time.sleep(0.02)
    # SIGTERM, so that services may still clean up.
    assert (tmp_path / "stopped").read_text() == "decode-0\n"


def test_a_module_of_ours_runs_from_any_directory(tmp_path):
    (tmp_path / "json.py").write_text("raise SystemExit('shadowed')")
    result = subprocess.run(
        [*python_module("services.cli"), "--help"],
        cwd=tmp_path,
        env=with_our_packages({}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert "doctor" in result.stdout
