"""Fixtures for all tests: a real Redis."""

import socket

import pytest
from hypothesis import HealthCheck, settings

from shared.directory.redis_server import RedisServer

pytest_plugins = ["tests.side_by_side"]

# How long an example takes says more about the machine's other work than about the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory):
    """URL of one real Redis for the whole run, database 0."""
    with RedisServer() as server:
        yield server.start(tmp_path_factory.mktemp("redis"))


@pytest.fixture
def fresh_redis_url(redis_url):
    """URL of an empty database of that Redis; nobody else uses it during the test."""
    base, _, _ = redis_url.rpartition("/")
    host, _, port = base.removeprefix("redis://").partition(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(b"SELECT 1\r\nFLUSHDB\r\n")
        received = b""
        while received.count(b"+OK") < 2:
            received += connection.recv(64)
    return f"{base}/1"


@pytest.fixture
def short_path(tmp_path_factory):
    """A directory like `tmp_path`, but not named after the test: names of Unix sockets are short."""
    return tmp_path_factory.mktemp("at")


@pytest.fixture
def redis_server(tmp_path):
    """A Redis that the test may stop, pause or flush; started, on a port of its own."""
    with RedisServer() as server:
        server.start(tmp_path / "redis")
        yield server
