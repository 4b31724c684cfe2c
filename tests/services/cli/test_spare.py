"""Spare processes, with a tiny package in place of a service."""

import asyncio
import os
import signal
import sys

import pytest

from services.cli.process import ProcessSpec, ProcessState
from services.cli.spare import Spare
from services.cli.state_file import start_ticks
from services.cli.supervisor import Readiness, Supervisor

pytestmark = pytest.mark.timeout(60)

PACKAGE = """
import os, pathlib, sys, time
loaded_by = os.environ.get("NAME", "nobody")

def main():
    print("serving on", sys.stdin.read() == "", flush=True)
    where = pathlib.Path(os.environ["FOLDER"]) / os.environ["NAME"]
    where.with_suffix(".new").write_text(f"{os.getpid()} {loaded_by}")
    where.with_suffix(".new").rename(where)
    time.sleep(60)

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    package = tmp_path / "lib" / "tiny_service"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(PACKAGE)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    return "tiny_service"


def spec(folder, name, module):
    return ProcessSpec(
        name=name,
        role="kv_transfer",
        command=(sys.executable, "-P", "-m", module),
        module=module,
        log_path=folder / f"{name}.log",
        environment={"FOLDER": str(folder), "NAME": name},
        restart_after_s=0.05,
    )


def life(folder, name):
    """Pid, and under which name the code was loaded: a spare had none then."""
    try:
        pid, loaded_by = (folder / name).read_text().split()
    except FileNotFoundError:
        return None, ""
    return int(pid), loaded_by


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.02)


async def test_a_spare_becomes_whichever_process_dies_and_another_takes_its_place(tmp_path, module):
    async def serves(process):
        return Readiness(life(tmp_path, process.spec.name)[0] == process.pid)

    cluster = Supervisor([spec(tmp_path, name, module) for name in ("a", "b")], serves)
    await cluster.bring_up(20)
    spare = cluster.spares[module]
    spare._pause_s = 0.05
    assert {life(tmp_path, name)[1] for name in ("a", "b")} == {"a", "b"}

    async def killed(process):
        await until(lambda: spare.pid is not None)
        first, stand_in = process.pid, spare.pid
        os.kill(first, signal.SIGKILL)
        await until(lambda: process.pid not in (None, first) and process.state is ProcessState.READY)
        assert life(tmp_path, process.spec.name) == (stand_in, "nobody")
        assert process.spec.log_path.read_text().count("serving on True\n") == process.restarts + 1

    for index in (1, 0, 0):
        await killed(cluster.processes[index])
    await until(lambda: spare.pid is not None)
    pids = [spare.pid, *(process.pid for process in cluster.processes)]
    await cluster.shut_down()
    assert not any(start_ticks(pid) for pid in pids)


async def test_a_spare_that_died_is_as_if_there_were_none(tmp_path, module):
    spare = Spare(module)
    await spare.prepare()
    os.kill(spare.pid, signal.SIGKILL)
    await until(lambda: spare.pid is None)
    assert spare.become(spec(tmp_path, "a", module)) is None
    await spare.stop()


async def test_code_that_cannot_be_loaded_leaves_no_spare():
    spare = Spare("no_such_service")
    await spare.prepare()
    await until(lambda: spare.pid is None)
    await spare.stop()
