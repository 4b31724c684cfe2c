"""The commands as a user types them, as far as they go without a cluster."""

import re
import socket
import subprocess
import sys

import pytest


def tandem(*arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "services.cli", *arguments], capture_output=True, text=True, timeout=timeout_s
    )


def test_a_missing_model_is_refused_before_anything_starts(tmp_path):
    result = tandem("up", "--model", "./no/such/model", "--run-dir", str(tmp_path))
    assert result.returncode == 1
    assert "no/such/model" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "state.json").exists()


def test_an_unsupported_model_is_named_with_what_is_supported(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    (model / "model.safetensors").write_bytes(b"")
    result = tandem("up", "--model", str(model), "--run-dir", str(tmp_path / "run"))
    assert result.returncode == 1
    assert "MambaForCausalLM" in result.stderr
    assert "LlamaForCausalLM" in result.stderr


def test_a_taken_port_is_an_error_before_anything_starts(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = tandem("up", "--port", port, "--run-dir", str(tmp_path))
    assert result.returncode == 1
    assert port in result.stderr
    assert not (tmp_path / "state.json").exists()


def test_down_without_a_cluster_says_so_and_succeeds(tmp_path):
    result = tandem("down", "--run-dir", str(tmp_path))
    assert result.returncode == 0
    assert "nothing runs" in result.stdout


@pytest.mark.parametrize("command", [["status"], ["status", "--json"], ["chat", "--once", "hello"]])
def test_asking_a_cluster_that_is_not_there_fails_with_one_line(tmp_path, command):
    result = tandem(*command, "--run-dir", str(tmp_path))
    assert result.returncode == 1
    assert "nothing runs" in result.stderr
    assert result.stdout == ""


def test_doctor_names_what_it_looked_at():
    result = tandem("doctor")
    for subject in ("python", "redis", "ucxx", "/dev/shm", "port 8000", "cpu", "gpu", "compiler"):
        assert subject in result.stdout


def test_every_command_has_help():
    overview = tandem("--help").stdout
    for command in ("up", "down", "status", "chat", "doctor", "version"):
        assert re.search(rf"^\W*{command}\s+\w", overview, re.MULTILINE)
