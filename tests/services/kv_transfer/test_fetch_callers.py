"""Who may ask for blocks, and in whose name."""

import pytest

from services.kv_transfer.fetch import _check_requester, source_address
from shared.errors import PeerNotAllowed
from shared.rpc.tls import PeerRole, peer_uri


class Context:
    def __init__(self, *names):
        self._names = [name.encode() for name in names]

    def auth_context(self):
        return {"x509_subject_alternative_name": self._names} if self._names else {}


def test_a_certificate_of_one_sidecar_asks_in_its_own_name_only():
    one = Context("localhost", peer_uri(PeerRole.TRANSFER, "decode-0"))
    _check_requester("decode-0", one)
    with pytest.raises(PeerNotAllowed, match="decode-0 asks in the name of decode-1"):
        _check_requester("decode-1", one)
    _check_requester("decode-1", Context(peer_uri(PeerRole.TRANSFER)))  # one certificate for the whole pool
    _check_requester("decode-1", Context())  # plaintext: nobody knows


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:10.0.0.7:41234", "10.0.0.7"),
        ("ipv6:[::1]:41234", "ipv6:[::1]:41234"),
        ("unix:/run/x.sock", "unix:/run/x.sock"),
    ],
)
def test_the_address_of_a_caller_is_what_grpc_says(peer, address):
    assert source_address(peer) == address
