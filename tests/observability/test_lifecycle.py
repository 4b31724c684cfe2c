"""Exit codes and signals of a service process, as its supervisor sees them."""

import signal
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.timeout(30)


class Service:
    """A process whose `main` has the given body; it says "ready" when it runs."""

    def __init__(self, body):
        source = "\n".join(
            [
                "import asyncio, sys, threading, time",
                "import structlog",
                "from shared.errors import ConfigurationError",
                "from shared.lifecycle import run_service",
                "async def main(stop):",
                textwrap.indent(textwrap.dedent(body), "    "),
                "run_service(main, 'sample')",
            ]
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def wait_ready(self):
        assert self.process.stdout.readline() == "ready\n"

    def end(self):
        out, err = self.process.communicate(timeout=15)
        return self.process.returncode, out, err


def test_a_service_that_returns_exits_with_zero():
    code, out, _ = Service("print(type(asyncio.get_running_loop()).__module__)").end()
    assert (code, out) == (0, "uvloop\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_service_drain_and_exit_with_zero(number):
    service = Service("print('ready', flush=True); await stop.wait(); await asyncio.sleep(0.2); print('drained')")
    service.wait_ready()
    service.process.send_signal(number)
    code, out, _ = service.end()
    assert (code, out) == (0, "drained\n")


def test_a_repeated_sigterm_does_not_cut_the_drain_short():
    service = Service("print('ready', flush=True); await stop.wait(); await asyncio.sleep(0.5); print('drained')")
    service.wait_ready()
    service.process.send_signal(signal.SIGINT)
    service.process.send_signal(signal.SIGTERM)
    service.process.send_signal(signal.SIGTERM)
    code, out, _ = service.end()
    assert (code, out) == (0, "drained\n")


def test_a_second_ctrl_c_ends_the_drain_but_still_cleans_up():
    service = Service("""
        print('ready', flush=True)
        await stop.wait()
        print('ready', flush=True)
        try:
            await asyncio.sleep(60)
        finally:
            print('cleaned')
    """)
    service.wait_ready()
    service.process.send_signal(signal.SIGINT)
    service.wait_ready()
    service.process.send_signal(signal.SIGINT)
    code, out, err = service.end()
    assert (code, out) == (130, "cleaned\n")
    assert "Traceback" not in err


def test_a_configuration_error_is_one_clear_line():
    code, _, err = Service("raise ConfigurationError('port 80: not ours')").end()
    assert (code, err) == (2, "sample: port 80: not ours\n")


def test_a_configuration_error_inside_a_task_group_is_found():
    code, _, err = Service("""
        async def fail():
            raise ConfigurationError('no model')
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
    """).end()
    assert (code, err) == (2, "sample: no model\n")


def test_any_other_failure_is_logged_with_its_traceback_and_ends_the_process_despite_threads():
    code, _, err = Service("""
        threading.Thread(target=time.sleep, args=(60,)).start()
        raise KeyError('defect')
    """).end()
    assert code == 1
    assert "service_failed" in err
    assert "KeyError: 'defect'" in err


def test_an_error_in_a_task_that_nobody_awaits_is_logged():
    code, _, err = Service("""
        async def fail():
            raise KeyError('lost')
        task = asyncio.create_task(fail())
        await asyncio.sleep(0)
        del task
    """).end()
    assert code == 0
    assert "unhandled_error" in err
    assert "KeyError: 'lost'" in err
