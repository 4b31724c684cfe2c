"""What a cluster consists of, and what is refused before anything starts."""

import socket
from pathlib import Path

import pytest

from services.cli import preflight
from services.cli.cluster import ClusterSpec, free_port, plan
from services.cli.preflight import check_port, check_shared_memory, chosen_device, served_name
from services.cli.quantities import format_bytes, parse_bytes
from services.cli.run_directory import default_run_dir, locked, prepare_run_dir, rotate_logs, supervisor_pid
from shared.errors import ConfigurationError


def cluster(run_dir: Path = Path("/run/x"), **fields) -> ClusterSpec:
    return ClusterSpec(model_dir=Path("/models/m"), served_model_name="m", run_dir=run_dir, **fields)


def test_each_worker_gets_a_sidecar_and_they_share_a_socket():
    redis_url, specs = plan(cluster(prefill=1, decode=2))
    assert [s.name for s in specs] == [
        "redis",
        *("prefill-0.transfer", "prefill-0", "decode-0.transfer", "decode-0", "decode-1.transfer", "decode-1"),
        "gateway",
    ]
    by_name = {s.name: s for s in specs}
    sidecar, worker = by_name["decode-1.transfer"].environment, by_name["decode-1"].environment
    assert sidecar["TANDEM_TRANSFER_SOCKET"] == worker["TANDEM_WORKER_TRANSFER_SOCKET"]
    assert sidecar["TANDEM_TRANSFER_WORKER_ID"] == worker["TANDEM_WORKER_WORKER_ID"] == "decode-1"
    urls = {value for s in specs for name, value in s.environment.items() if name.endswith("_REDIS_URL")}
    assert urls == {redis_url}


def test_no_prefill_workers_is_a_cluster_too():
    _, specs = plan(cluster(prefill=0))
    assert [s.role for s in specs] == ["redis", "kv_transfer", "decode", "gateway"]


def test_options_of_the_gateway_reach_it_and_absent_ones_leave_its_environment_alone():
    options = {"UNKNOWN_FIELDS": "ignore", "CHAT_TEMPLATE": ""}
    _, specs = plan(cluster(gateway_options=options))
    environment = specs[-1].environment
    assert environment["TANDEM_GATEWAY_UNKNOWN_FIELDS"] == "ignore"
    assert "TANDEM_GATEWAY_CHAT_TEMPLATE" not in environment


def test_a_redis_of_ones_own_is_not_started_and_worker_ids_become_unique():
    redis_url, specs = plan(cluster(redis_url="redis://elsewhere:6379/3"))
    _, others = plan(cluster(Path("/run/y"), redis_url="redis://elsewhere:6379/3"))
    assert redis_url == "redis://elsewhere:6379/3"
    assert "redis" not in {s.role for s in specs}
    ids, other_ids = ({s.worker_id for s in some if s.worker_id} for some in (specs, others))
    assert ids.isdisjoint(other_ids)


def test_clusters_in_different_run_directories_share_no_arena():
    assert cluster(Path("/run/x")).arena_dir != cluster(Path("/run/y")).arena_dir


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:8000"), ("0.0.0.0", "http://127.0.0.1:8000"), ("::", "http://[::1]:8000")],
)
def test_the_url_is_one_that_a_client_can_use(host, url):
    assert cluster(host=host).url == url


def test_a_taken_port_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"127\.0\.0\.1:{port}.*--port"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", free_port())


def test_caches_larger_than_shared_memory_are_refused_with_both_numbers():
    with pytest.raises(ConfigurationError, match=r"2 KV caches of 100 TiB do not fit: /dev/shm has .* 200 TiB"):
        check_shared_memory(cluster(kv_cache_bytes=100 << 40))


def test_a_run_directory_too_long_for_sockets_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="bytes exceeds"):
        prepare_run_dir(tmp_path / ("x" * 100))


def test_a_home_too_long_for_sockets_is_passed_over(monkeypatch):
    monkeypatch.setenv("HOME", "/" + "x" * 100)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert default_run_dir().name.startswith("tandem-")


def test_a_run_directory_has_one_supervisor(tmp_path):
    assert supervisor_pid(tmp_path) is None
    with locked(tmp_path):
        assert supervisor_pid(tmp_path)
        with pytest.raises(ConfigurationError, match="already runs"), locked(tmp_path):
            pass
    assert supervisor_pid(tmp_path) is None


def test_the_previous_clusters_logs_are_kept_once(tmp_path):
    (tmp_path / "gateway.log").write_text("old")
    rotate_logs(tmp_path)
    assert (tmp_path / "gateway.log.1").read_text() == "old"
    assert not (tmp_path / "gateway.log").exists()


@pytest.mark.parametrize(
    ("text", "count"), [("512MiB", 512 << 20), ("2 GB", 2 * 10**9), ("1.5g", 15 * 10**8), ("64", 64), ("1ki", 1024)]
)
def test_amounts_of_memory_are_read_as_people_write_them(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "lots", "-1", "5 apples"])
def test_what_is_no_amount_of_memory_is_refused(text):
    with pytest.raises(ConfigurationError, match="amount of memory"):
        parse_bytes(text)


def test_amounts_are_printed_in_three_digits():
    assert [format_bytes(n) for n in (0, 1023, 1536, 512 << 20, 3 << 40)] == [
        *("0 B", "1023 B", "1.5 KiB", "512 MiB"),
        "3 TiB",
    ]


@pytest.mark.parametrize(
    ("model", "name"), [("Qwen/Qwen3-0.6B", "Qwen3-0.6B"), ("/models/m/", "m"), ("pydoc-mini", "pydoc-mini")]
)
def test_the_served_name_is_the_last_part(model, name):
    assert served_name(model) == name


@pytest.mark.parametrize(
    ("visible", "wanted", "chosen"),
    [(None, "auto", "cuda"), ("0", "auto", "cuda"), ("", "auto", "cpu"), ("-1", "auto", "cpu"), ("", "cuda", "cuda")],
)
def test_a_gpu_is_taken_unless_the_environment_hides_it(monkeypatch, tmp_path, visible, wanted, chosen):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(preflight, "DEVICES", tmp_path)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert chosen_device(wanted) == chosen
