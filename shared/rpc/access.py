"""Which role may call what, where mutual TLS says who calls."""

from __future__ import annotations

from collections.abc import Mapping

from shared.errors import PeerNotAllowed
from shared.rpc.tls import PeerIdentity, PeerRole, peer_identity

_EVERYBODY = frozenset(PeerRole)

CALLERS: Mapping[str, frozenset[PeerRole]] = {
    "/tandem.Worker/Generate": frozenset({PeerRole.GATEWAY}),
    "/tandem.Worker/Embed": frozenset({PeerRole.GATEWAY}),
    "/tandem.Worker/Prefill": frozenset({PeerRole.DECODE}),
    "/tandem.Worker/Status": _EVERYBODY,
    "/tandem.KvFetch/Fetch": frozenset({PeerRole.TRANSFER}),
    "/tandem.KvFetch/Fetches": frozenset({PeerRole.TRANSFER}),
    "/tandem.KvFetch/TransferStatus": _EVERYBODY,
}
"""What is not named here is served on Unix sockets only."""


def check_caller(method: str, auth_context: Mapping[str, object]) -> PeerIdentity:
    """The caller, if its role may call `method`.

    Raises:
        PeerNotAllowed: It may not, or has no role.
    """
    caller = peer_identity(auth_context)
    if caller is None:
        raise PeerNotAllowed(f"{method}: the caller's certificate names no role of this fleet")
    if caller.role not in CALLERS.get(method, frozenset()):
        raise PeerNotAllowed(f"{method} is not for the role {caller.role}")
    return caller
