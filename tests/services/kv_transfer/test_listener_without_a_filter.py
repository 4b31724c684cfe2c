"""Hardened kernels let only privileged processes filter their sockets; containers have no such privilege."""

import shutil
import subprocess
import sys

import pytest

from services.kv_transfer import service
from services.kv_transfer.settings import TransferSettings
from shared.errors import ConfigurationError

WITHOUT_CAPABILITIES = ["setpriv", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]


def settings(tmp_path, **fields):
    return TransferSettings(worker_id="w", socket=tmp_path / "s", **fields)


@pytest.fixture
def no_filters(monkeypatch):
    monkeypatch.setattr(service, "may_filter", lambda: False)


def test_auto_goes_without_and_any_never_needs_one(no_filters, tmp_path):
    assert not service._filters_listener(settings(tmp_path))
    assert not service._filters_listener(settings(tmp_path, ucx_admit="any"))


@pytest.mark.parametrize("wish", [{"ucx_admit": "callers"}, {"ucx_interfaces": "lo"}])
def test_what_was_asked_for_and_cannot_be_kept_is_an_error_that_says_what_can(no_filters, tmp_path, wish):
    with pytest.raises(ConfigurationError, match=f"{next(iter(wish))}.*CAP_NET_ADMIN.*ucx_admit=auto"):
        service._filters_listener(settings(tmp_path, **wish))


def capabilities_can_be_dropped():
    command = [*WITHOUT_CAPABILITIES, "/bin/true"]
    return shutil.which("setpriv") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.e2e
@pytest.mark.skipif(not capabilities_can_be_dropped(), reason="needs root and setpriv (util-linux)")
async def test_processes_without_capabilities_move_blocks_on_any_kernel(cluster, make_hashes, monkeypatch):
    popen = subprocess.Popen

    def without_capabilities(command, **options):
        assert command[0] == sys.executable
        return popen([*WITHOUT_CAPABILITIES, *command], **options)

    monkeypatch.setattr(subprocess, "Popen", without_capabilities)
    holder, puller = await cluster.pair()
    hashes = make_hashes(8)
    holder.seal(hashes)
    assert all((await puller.pull(holder, hashes, list(range(8)))).verified)
