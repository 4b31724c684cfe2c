"""Mutual TLS over real sockets: who is let in, who is believed, and what a renewal changes."""

import asyncio
import datetime
import os
import shutil
import stat

import pytest
from cryptography import x509

from protos import kv_transfer_pb2 as kv_pb
from protos import kv_transfer_pb2_grpc as kv_rpc
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from services.cli.certificates import Member, fleet_members, issue_certificates
from shared.errors import ConfigurationError, PeerNotAllowed, TandemError, WorkerLost
from shared.rpc import ChannelPool, PeerRole, TlsFiles, bind_tcp, bind_unix, new_server, open_channel, rpc_errors
from shared.rpc.access import CALLERS
from shared.rpc.tls import peer_identity, peer_name, peer_uri

pytestmark = pytest.mark.timeout(60)

ODD_ID = "Worker_7/ä"
HOSTS = ["h.example", "10.0.0.7"]


class Echo(rpc.WorkerServicer):
    async def Status(self, request, context):
        return pb.StatusReply(worker_id="d0")

    async def Prefill(self, request, context):
        yield pb.PrefillProgress(sealed_blocks=1)
        await asyncio.sleep(30)

    async def Generate(self, request_iterator, context):
        async for _ in request_iterator:
            yield pb.StepOutput()


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    directory = tmp_path_factory.mktemp("certs")
    return issue_certificates(directory, [*fleet_members(["p0"], ["d0", ODD_ID]), *fleet_members()])


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    return issue_certificates(tmp_path_factory.mktemp("others"), fleet_members())


def files(authority, role, member_id=""):
    return TlsFiles(authority / Member(PeerRole(role), member_id).directory_name)


async def serve(tls, **options):
    server = new_server(checks_callers=True, **options)
    rpc.add_WorkerServicer_to_server(Echo(), server)
    address = bind_tcp(server, "127.0.0.1", 0, tls=tls)
    await server.start()
    return server, address


@pytest.fixture
async def decode(authority):
    server, address = await serve(files(authority, "decode", "d0"))
    yield address
    await server.stop(0)


async def status(address, tls, peer=(PeerRole.DECODE, "d0")):
    async with open_channel(address, tls=tls, peer=peer) as channel:
        with rpc_errors():
            return await rpc.WorkerStub(channel).Status(pb.StatusRequest(), timeout=5)


async def test_members_of_one_authority_talk_whatever_the_address_says(decode, authority):
    assert (await status(decode, files(authority, "gateway"))).worker_id == "d0"
    assert (await status(decode, files(authority, "gateway"), peer=None)).worker_id == "d0"  # 127.0.0.1 is in it


async def test_plaintext_a_stranger_and_a_caller_without_certificate_are_refused(decode, authority, strangers):
    with pytest.raises(WorkerLost):
        await status(decode, None)
    with pytest.raises(WorkerLost):
        await status(decode, files(strangers, "gateway"))
    _, writer = await asyncio.open_connection(*decode.rsplit(":", 1))
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    writer.close()
    assert (await status(decode, files(authority, "gateway"))).worker_id == "d0"


@pytest.mark.parametrize("claim", [("decode", "d1"), ("prefill", "d0"), ("gateway", "d0")])
async def test_an_address_where_another_member_answers_is_not_believed(decode, authority, claim):
    with pytest.raises(WorkerLost):
        await status(decode, files(authority, "gateway"), peer=(PeerRole(claim[0]), claim[1]))


async def test_a_pool_certificate_speaks_for_every_member_of_its_role_and_no_other(authority):
    server, address = await serve(files(authority, "decode"))
    for member_id in ("d0", "d1", "any-name", ODD_ID):
        assert (await status(address, files(authority, "gateway"), (PeerRole.DECODE, member_id))).worker_id == "d0"
    with pytest.raises(WorkerLost):
        await status(address, files(authority, "gateway"), (PeerRole.PREFILL, "d0"))
    await server.stop(0)


@pytest.mark.parametrize(
    ("role", "member_id", "may_generate", "may_prefill"),
    [
        ("gateway", "", True, False),
        ("decode", "d0", False, True),
        ("decode", "", False, True),
        ("transfer", "d0", False, False),
        ("operator", "", False, False),
    ],
)
async def test_a_role_may_call_what_is_its_business(decode, authority, role, member_id, may_generate, may_prefill):
    tls = files(authority, role, member_id)
    async with open_channel(decode, tls=tls, peer=(PeerRole.DECODE, "d0")) as channel:
        stub = rpc.WorkerStub(channel)

        async def allowed(call):
            try:
                with rpc_errors():
                    await call.read()
            except PeerNotAllowed:
                return False
            return True

        generate = stub.Generate()
        if may_generate:  # who may not is told without a word; a word that crosses the refusal would hide it
            await generate.write(pb.GenerateCommand())
        assert await allowed(generate) is may_generate
        assert await allowed(stub.Prefill(pb.PrefillRequest())) is may_prefill
        assert (await stub.Status(pb.StatusRequest())).worker_id == "d0"


def test_every_rpc_that_is_served_over_tcp_has_callers():
    for service, module in (("Worker", rpc), ("KvFetch", kv_rpc)):
        methods = {name for name in vars(getattr(module, f"{service}Servicer")) if name[0].isupper()}
        assert {f"/tandem.{service}/{name}" for name in methods} <= CALLERS.keys()
    assert kv_pb.FetchRequest.DESCRIPTOR.full_name == "tandem.FetchRequest"


async def test_a_renewed_certificate_counts_from_the_next_handshake_on(tmp_path):
    members = fleet_members(["p0"], ["d0"])
    authority = issue_certificates(tmp_path / "certs", members)
    server, address = await serve(files(authority, "decode", "d0"))
    gateway = files(authority, "gateway")
    pool = ChannelPool(gateway)
    before = pool.channel("d0", address, (PeerRole.DECODE, "d0"))
    call = rpc.WorkerStub(before).Generate()
    await call.write(pb.GenerateCommand())
    await call.read()

    served = await certificate_served(address)
    issue_certificates(tmp_path / "certs", members)
    assert await certificate_served(address) != served
    after = pool.channel("d0", address, (PeerRole.DECODE, "d0"))
    assert after is not before
    assert pool.channel("d0", address, (PeerRole.DECODE, "d0")) is after
    assert (await rpc.WorkerStub(after).Status(pb.StatusRequest())).worker_id == "d0"
    await call.write(pb.GenerateCommand())  # what was open goes on
    assert isinstance(await call.read(), pb.StepOutput)
    await pool.close()
    await server.stop(0)


async def test_half_written_files_leave_the_certificate_in_use(tmp_path):
    authority = issue_certificates(tmp_path / "certs", fleet_members(["p0"], ["d0"]))
    tls = files(authority, "decode", "d0")
    server, address = await serve(tls)
    (tls.directory / "tls.key").write_bytes((authority / "gateway" / "tls.key").read_bytes())
    assert (await status(address, files(authority, "gateway"))).worker_id == "d0"
    with pytest.raises(ConfigurationError, match="TLS files"):
        tls.check()
    await server.stop(0)


async def certificate_served(address):
    """DER of what a handshake shows, fetched by OpenSSL."""
    process = await asyncio.create_subprocess_exec(
        *("openssl", "s_client", "-connect", address, "-alpn", "h2"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    output, _ = await process.communicate()
    begin = output.index(b"-----BEGIN")
    return output[begin : output.index(b"-----END")]


def test_certificates_say_who_how_long_and_where(tmp_path):
    authority = issue_certificates(tmp_path / "c", fleet_members(["p0"], [ODD_ID]), hosts=HOSTS, days=30)
    certificate = x509.load_pem_x509_certificate((authority / "prefill.p0" / "tls.crt").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {"p0.prefill.tandem", "localhost", "h.example"} <= set(names.get_values_for_type(x509.DNSName))
    assert {"127.0.0.1", "::1", "10.0.0.7"} == {str(a) for a in names.get_values_for_type(x509.IPAddress)}
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://tandem/prefill/p0"]
    lifetime = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(days=29) < lifetime <= datetime.timedelta(days=30)
    for path in (authority / "ca.key", *authority.glob("*/tls.key")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not list(authority.glob("**/*.new"))


def test_a_second_run_renews_certificates_and_keeps_the_authority_until_it_would_end_too_soon(tmp_path):
    members = fleet_members()

    def read(name):
        return (tmp_path / name).read_bytes()

    issue_certificates(tmp_path, members)
    first = {name: read(name) for name in ("ca.crt", "gateway/tls.crt", "gateway/tls.key")}
    issue_certificates(tmp_path, members)
    assert read("ca.crt") == first["ca.crt"]
    assert read("gateway/tls.crt") != first["gateway/tls.crt"]
    assert read("gateway/tls.key") != first["gateway/tls.key"]
    issue_certificates(tmp_path, members, days=3650)  # longer than the authority lives
    assert len(x509.load_pem_x509_certificates(read("ca.crt"))) == 2
    assert read("gateway/ca.crt") == read("ca.crt")


async def test_old_and_new_certificates_work_together_while_the_authority_is_renewed(tmp_path):
    members = fleet_members(["p0"], ["d0"])
    issue_certificates(tmp_path / "new", members)
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    new = issue_certificates(tmp_path / "new", members, days=3650)
    server, address = await serve(files(new, "decode", "d0"))
    # A member that was not given the new bundle yet still proves itself, but cannot check the others.
    old = TlsFiles(tmp_path / "old" / "gateway")
    shutil.copy(new / "ca.crt", old.directory / "ca.crt")
    assert (await status(address, old)).worker_id == "d0"
    await server.stop(0)


async def test_a_directory_without_certificates_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigurationError, match="TLS files"):
        bind_tcp(new_server(), "127.0.0.1", 0, tls=TlsFiles(tmp_path))
    pool = ChannelPool(TlsFiles(tmp_path))
    with pytest.raises(TandemError):
        pool.channel("k", "127.0.0.1:1", (PeerRole.DECODE, "d0"))


async def test_a_unix_socket_is_for_this_user_alone(tmp_path):
    server = new_server()
    rpc.add_WorkerServicer_to_server(Echo(), server)
    mask = os.umask(0)
    try:
        bind_unix(server, tmp_path / "w.sock")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "w.sock").stat().st_mode) == 0o600
    await server.stop(0)


def test_names_of_members_cannot_be_confused():
    ids = ["d0", "D0", "d0.prefill", "d0/x", "", "-", "*", "x" * 64, ODD_ID]
    names = [peer_name(PeerRole.DECODE, i) for i in ids]
    assert len(set(names)) == len(ids)
    assert all(name.count(".") == 2 and "*" not in name for name in names)
    for role in PeerRole:
        identity = peer_identity({"x509_subject_alternative_name": [b"localhost", peer_uri(role, "a/b").encode()]})
        assert (identity.role, identity.member_id) == (role, "a/b")
    assert peer_identity({"x509_subject_alternative_name": [b"spiffe://elsewhere/gateway"]}) is None
    assert peer_identity({"x509_subject_alternative_name": [b"spiffe://tandem/king"]}) is None
    assert peer_identity({}) is None
