"""The kernel drops what is not meant for UCX's listeners, before anybody reads it."""

import socket

import pytest

from shared.transfer import listen_filter as module
from shared.transfer.listen_filter import MAX_SOURCES, ListenFilter, interface_addresses, listening_sockets, may_filter


@pytest.fixture
def listener():
    with socket.create_server(("0.0.0.0", 0)) as sock:
        yield sock


def inode_of(sock):
    return next(inode for inode, descriptor in listening_sockets().items() if descriptor == sock.fileno())


def can_connect(listener, to="127.0.0.1", source="127.0.0.1"):
    with socket.socket() as sock:
        sock.bind((source, 0))
        sock.settimeout(0.3)
        try:
            sock.connect((to, listener.getsockname()[1]))
        except TimeoutError:
            return False
        return True


def test_only_the_chosen_address_answers(listener):
    assert can_connect(listener, "127.0.0.2")
    ListenFilter(["127.0.0.1", "127.0.0.3"], admits_all=True).attach([inode_of(listener)])
    assert [can_connect(listener, f"127.0.0.{i}") for i in range(1, 5)] == [True, False, True, False]


def test_only_admitted_sources_get_through_and_open_connections_stay(listener):
    listen_filter = ListenFilter([], admits_all=False)
    listen_filter.attach([inode_of(listener)])
    assert not can_connect(listener, source="127.0.0.5")
    listen_filter.admit("127.0.0.5")
    with socket.socket() as open_one:
        open_one.bind(("127.0.0.5", 0))
        open_one.connect(listener.getsockname())
        accepted, _ = listener.accept()
        listen_filter.admit("127.0.0.6")
        assert can_connect(listener, source="127.0.0.6")
        assert not can_connect(listener, source="127.0.0.7")
        open_one.sendall(b"still here")
        assert accepted.recv(64) == b"still here"
        accepted.close()


def test_both_ends_are_checked_and_many_sources_fit(listener):
    listen_filter = ListenFilter(["127.0.0.1"], admits_all=False)
    listen_filter.attach([inode_of(listener)])
    for i in range(MAX_SOURCES + 10):
        listen_filter.admit(f"127.1.{i // 250}.{i % 250 + 1}")
    newest = MAX_SOURCES + 9
    assert can_connect(listener, source=f"127.1.{newest // 250}.{newest % 250 + 1}")
    assert can_connect(listener, source="127.1.0.11")
    assert not can_connect(listener, source="127.1.0.10")  # the eleventh to have been pushed out
    assert not can_connect(listener, to="127.0.0.2", source="127.1.0.11")


def test_a_source_that_is_no_ipv4_address_lifts_the_restriction(listener):
    listen_filter = ListenFilter([], admits_all=False)
    listen_filter.attach([inode_of(listener)])
    listen_filter.admit("fe80::1")
    assert listen_filter.admits_all
    assert can_connect(listener, source="127.0.0.9")


def test_interfaces_have_addresses():
    assert interface_addresses()["lo"] == "127.0.0.1"


def test_a_filter_that_drops_nothing_asks_the_kernel_for_nothing(listener, monkeypatch):
    monkeypatch.setattr(module, "_attach", lambda sock, program: pytest.fail("attached"))
    listen_filter = ListenFilter([], admits_all=True)
    listen_filter.attach([inode_of(listener)])
    listen_filter.admit("127.0.0.5")
    assert can_connect(listener)


def test_a_kernel_that_refuses_filters_is_known_by_trying(monkeypatch):
    def refuse(sock, program):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(module, "_attach", refuse)
    assert not may_filter()
