"""Workers dial members of the directory, of equal fingerprint, and believe no address: F22, F28."""

import asyncio
from dataclasses import replace

import pytest

from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from services.cli.certificates import fleet_members, issue_certificates
from shared.directory.records import TransferRecord, WorkerRecord
from shared.errors import WorkerLost
from shared.identity import Fingerprint, Incarnation, WorkerId
from shared.rpc import TlsFiles, bind_tcp, new_server, rpc_errors
from shared.worker.peers import Peers

pytestmark = pytest.mark.timeout(60)

OURS = Fingerprint("ours")
WORKER = WorkerRecord(
    worker_id=WorkerId("p0"),
    role="prefill",
    model="m",
    fingerprint=OURS,
    incarnation=Incarnation("p0-1"),
    address="127.0.0.1:1",
    pid=1,
    block_size=16,
    max_model_len=64,
    vocab_size=10,
    block_bytes=1,
    started_at=0.0,
)
TRANSFER = TransferRecord(WorkerId("p0"), Incarnation("t0-1"), OURS, "127.0.0.1:1", 0, 1)
REF = pb.PeerRef(worker_id="p0", incarnation="p0-1")


class StandInDirectory:
    def __init__(self, worker=WORKER, transfer=TRANSFER):
        self.records, self.sidecars = (worker,), (transfer,)

    def workers(self):
        return self.records

    def transfers(self):
        return self.sidecars


class Prefiller(rpc.WorkerServicer):
    calls = 0

    async def Prefill(self, request, context):
        self.calls += 1
        yield pb.PrefillProgress(sealed_blocks=1)
        await asyncio.sleep(30)


@pytest.fixture
def dial():
    made = []

    def make(worker=WORKER, transfer=TRANSFER, ref=REF, tls=None):
        made.append(Peers(StandInDirectory(worker, transfer), OURS, tls))
        return made[-1].prefill_worker(ref)

    return make


@pytest.mark.parametrize(
    ("worker", "transfer", "ref"),
    [
        (replace(WORKER, fingerprint=Fingerprint("theirs")), TRANSFER, REF),
        (WORKER, replace(TRANSFER, fingerprint=Fingerprint("theirs")), REF),
        (replace(WORKER, role="decode"), TRANSFER, REF),
        (replace(WORKER, incarnation=Incarnation("p0-2")), TRANSFER, REF),
        (WORKER, TRANSFER, pb.PeerRef(worker_id="p1", incarnation="p0-1")),
        (WORKER, replace(TRANSFER, worker_id=WorkerId("p1")), REF),
    ],
    ids=["fingerprint", "transfer_fingerprint", "role", "restarted", "not_a_member", "no_transfer"],
)
async def test_what_is_not_a_member_of_equal_fingerprint_is_not_dialled(dial, worker, transfer, ref):
    assert dial() is not None
    assert dial(worker, transfer, ref) is None


@pytest.mark.parametrize("impostor", ["", "gateway", "decode.d0", "prefill.p1", "stranger"])
async def test_a_forged_address_is_dialled_in_vain(dial, tmp_path, impostor):
    """Somebody wrote another address into the record: whoever listens there hears nothing of the prompt."""
    fleet = issue_certificates(tmp_path / "fleet", fleet_members(["p0", "p1"], ["d0"]))
    strangers = issue_certificates(tmp_path / "strangers", fleet_members(["p0"], ["d0"]))
    caller = TlsFiles(fleet / "decode.d0")
    servers = []

    async def serve(tls):
        servicer, server = Prefiller(), new_server()
        rpc.add_WorkerServicer_to_server(servicer, server)
        servers.append(server)
        address = bind_tcp(server, "127.0.0.1", 0, tls=tls)
        await server.start()
        return servicer, replace(WORKER, address=address)

    honest, record = await serve(TlsFiles(fleet / "prefill.p0"))
    peer = dial(record, tls=caller)
    assert (await peer.stub.Prefill(pb.PrefillRequest(token_ids=[1])).read()).sealed_blocks == 1

    identity = {"": None, "stranger": TlsFiles(strangers / "prefill.p0")}
    rogue, forged = await serve(identity[impostor] if impostor in identity else TlsFiles(fleet / impostor))
    with pytest.raises(WorkerLost), rpc_errors():
        await dial(forged, tls=caller).stub.Prefill(pb.PrefillRequest(token_ids=[1])).read()
    assert (honest.calls, rogue.calls) == (1, 0)
    for server in servers:
        await server.stop(0)


async def test_without_usable_certificates_nobody_is_dialled_and_the_prompt_is_computed_here(dial, tmp_path):
    assert dial(tls=TlsFiles(tmp_path / "missing")) is None
