"""`tandem up --tls`: a suite whose services talk to certified members only, and gives the same answers."""

from __future__ import annotations

import subprocess
import sys
import uuid

import grpc
import pytest

from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from shared.rpc import PeerRole, TlsFiles, open_channel

pytestmark = pytest.mark.e2e

LONG = "The report was read twice and filed. Nobody asked for a second copy. " * 20


@pytest.fixture(scope="module")
def sealed(start_another):
    return start_another("--tls", "--prefill", "1", "--decode", "1", "--threads", "1", "--kv-cache-bytes", "32MiB")


def issue(directory, *options):
    command = [sys.executable, "-m", "services.cli", "certs", str(directory), *options]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def ask(suite):
    extra = {"cache_salt": uuid.uuid4().hex, "timing": True}
    reply = suite.client().completions.create(
        model="pydoc-mini", prompt=LONG, max_tokens=8, temperature=0, extra_body=extra
    )
    return reply.choices[0].text, reply.model_dump()["timing"]["sessions"][0]


async def call_status(worker, tls):
    async with open_channel(
        worker["address"], tls=tls, peer=(PeerRole(worker["role"]), worker["worker_id"])
    ) as channel:
        return await rpc.WorkerStub(channel).Status(pb.StatusRequest(), timeout=5)


def test_requests_are_served_and_blocks_fetched_over_certified_connections(sealed, suite):
    text, timing = ask(sealed)
    assert timing["mode"] == "remote_prefill"
    assert timing["fetched_blocks"] > 10
    assert text == ask(suite)[0]
    sealed.wait_for_baseline()


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    directory = tmp_path_factory.mktemp("strangers")
    issue(directory)
    return TlsFiles(directory / "operator")


async def test_workers_answer_members_only(sealed, strangers):
    workers = sealed.status()["workers"]
    assert len(workers) == 2  # asked by `tandem status` with the operator's certificate
    assert all(worker["transfer"]["attached"] for worker in workers)
    own = TlsFiles(sealed.run_dir / "tls" / "operator")
    for worker in workers:
        assert (await call_status(worker, own)).incarnation == worker["incarnation"]
        for outsider in (None, strangers):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call_status(worker, outsider)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_renewed_certificates_need_no_restart(sealed):
    names = sorted((sealed.run_dir / "tls").glob("*/tls.crt"))
    before = {name: name.read_bytes() for name in names}
    issue(sealed.run_dir / "tls", "--prefill", "prefill-0", "--decode", "decode-0")
    assert all(name.read_bytes() != content for name, content in before.items())
    _, timing = ask(sealed)
    assert timing["mode"] == "remote_prefill"
    assert len(sealed.status()["workers"]) == 2
