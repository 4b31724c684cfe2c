"""The gateway as a process: its imports, its start, its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from services.gateway.settings import GatewaySettings
from shared.errors import ConfigurationError

COMMAND = [sys.executable, "-m", "services.gateway"]


def environment(**settings):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TANDEM_")}
    return {**kept, **{f"TANDEM_GATEWAY_{name.upper()}": str(value) for name, value in settings.items()}}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_gateway_imports_neither_torch_nor_transformers():
    check = "import services.gateway.__main__, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60).stdout == "[]\n"


def test_process_serves_without_workers_and_ends_cleanly(fresh_redis_url, tmp_path):
    port, log = free_port(), tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            COMMAND, env=environment(port=port, redis_url=fresh_redis_url), stdout=out, stderr=out
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 30
        while True:
            assert time.monotonic() < deadline, log.read_text()
            try:
                assert httpx.get(f"{url}/live").status_code == 200
                break
            except httpx.TransportError:
                time.sleep(0.05)
        assert httpx.get(f"{url}/ready").status_code == 503
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "pydoc-mini"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"port": "many"}, "PORT"), ({"prot": 1}, "PROT"), ({"model": "/nowhere"}, "/nowhere")],
)
def test_unusable_setting_ends_the_start_with_one_line(settings, said):
    result = subprocess.run(
        COMMAND,
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert said in result.stderr.splitlines()[-1].upper() + result.stderr.splitlines()[-1]


def test_taken_port_is_named(fresh_redis_url):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = subprocess.run(
            COMMAND, env=environment(port=port, redis_url=fresh_redis_url), capture_output=True, text=True, timeout=60
        )
    assert result.returncode == 2
    assert f"127.0.0.1:{port}" in result.stderr.splitlines()[-1]


def test_settings_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("TANDEM_GATEWAY_PLACEMENT", "local")
    assert GatewaySettings.from_environment().placement == "local"
    monkeypatch.setenv("TANDEM_GATEWAY_PLACEMENT", "elsewhere")
    with pytest.raises(ConfigurationError, match="placement"):
        GatewaySettings.from_environment()


def wait_until(condition, timeout_s=40):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_several_processes_share_a_port_and_their_metrics(fresh_redis_url, tmp_path):
    import psutil

    port, log = free_port(), tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            COMMAND, env=environment(port=port, redis_url=fresh_redis_url, workers=2), stdout=out, stderr=out
        )
    url = f"http://127.0.0.1:{port}"
    body = {"model": "nope", "prompt": "hi"}

    def children():
        return [child for child in psutil.Process(process.pid).children() if child.is_running()]

    def failures():
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("tandem_request_failures_total{"))

    try:
        wait_until(lambda: log.read_text().count("listening ") == 2)
        for _ in range(20):
            assert httpx.post(f"{url}/v1/completions", json=body).status_code == 404
        assert failures() == 20
        victim = children()[0]
        victim.kill()
        wait_until(lambda: log.read_text().count("listening ") == 3)
        assert httpx.get(f"{url}/live").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def test_children_end_with_a_killed_parent(fresh_redis_url, tmp_path):
    import psutil

    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            COMMAND, env=environment(port=0, redis_url=fresh_redis_url, workers=2), stdout=out, stderr=out
        )
    wait_until(lambda: log.read_text().count("listening ") == 2)
    children = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert len(gone) == 2
    assert not alive
