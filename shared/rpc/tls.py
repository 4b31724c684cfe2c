"""Mutual TLS between services: where the files are, what they prove, how they are loaded anew.

A directory holds what a Kubernetes TLS secret holds, under the same names: `tls.crt`, `tls.key`, `ca.crt`. A
certificate says who its bearer is twice: as a DNS name, which whoever dials checks against the member that it means,
and as a URI, from which a server takes the caller's role:

    decode-0.decode.tandem        spiffe://tandem/decode/decode-0        one worker
    *.decode.tandem               spiffe://tandem/decode                 any worker of a pool

So an address in the directory is not believed: whoever answers there has to be who the record says. Unix sockets are
not encrypted; their file mode keeps others out.
"""

from __future__ import annotations

import hashlib
import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from urllib.parse import quote, unquote

import grpc
import structlog

from shared.errors import ConfigurationError

CERTIFICATE_FILE = "tls.crt"
KEY_FILE = "tls.key"
AUTHORITIES_FILE = "ca.crt"

TRUST_DOMAIN = "tandem"

_URI_PREFIX = f"spiffe://{TRUST_DOMAIN}/"
_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")

_log = structlog.get_logger(__name__)


class PeerRole(StrEnum):
    """What a certificate may say that its bearer is."""

    GATEWAY = "gateway"
    PREFILL = "prefill"
    DECODE = "decode"
    TRANSFER = "transfer"
    OPERATOR = "operator"


_ROLES = frozenset(str(role) for role in PeerRole)


def peer_name(role: PeerRole, member_id: str) -> str:
    """DNS name in the certificate of one member; ids that are no DNS label appear as their hash."""
    label = member_id
    if not _DNS_LABEL.fullmatch(member_id):
        label = f"id-{hashlib.blake2b(member_id.encode(), digest_size=16).hexdigest()}"
    return f"{label}.{role}.{TRUST_DOMAIN}"


def peer_uri(role: PeerRole, member_id: str = "") -> str:
    """URI in the certificate of one member; without an id, of any member of that role."""
    return f"{_URI_PREFIX}{role}/{quote(member_id, safe='')}" if member_id else f"{_URI_PREFIX}{role}"


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """What the caller's certificate says; `member_id` is "" where it speaks for every member of the role."""

    role: PeerRole
    member_id: str


def peer_identity(auth_context: Mapping[str, object]) -> PeerIdentity | None:
    """Who the caller of an RPC proved to be; None without a certificate that names one of our roles."""
    names = auth_context.get("x509_subject_alternative_name", ())
    for raw in names if isinstance(names, list | tuple) else ():
        name = raw.decode(errors="replace") if isinstance(raw, bytes) else str(raw)
        if name.startswith(_URI_PREFIX):
            role, _, member_id = name.removeprefix(_URI_PREFIX).partition("/")
            if role in _ROLES:
                return PeerIdentity(PeerRole(role), unquote(member_id))
    return None


@dataclass(frozen=True, slots=True)
class _Material:
    """One consistent reading of the three files."""

    version: tuple[int, ...]
    certificate: bytes
    key: bytes
    authorities: bytes


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The identity of this process. Reads the files when needed, so that renewed ones count without a restart."""

    directory: Path

    def check(self) -> None:
        """Reads the files once, for an error at start-up instead of at the first handshake.

        Raises:
            ConfigurationError: A file is missing, unreadable, or the key is not the certificate's.
        """
        self._read()

    @property
    def version(self) -> tuple[int, ...]:
        """Changes when the files are replaced; () while one of them is missing."""
        try:
            found = [path.stat() for path in self._paths()]
        except OSError:
            return ()
        # The inode too: a renewed secret is another directory behind the same link.
        return tuple(number for file in found for number in (file.st_mtime_ns, file.st_ino))

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Credentials for one new channel.

        Raises:
            ConfigurationError: The files cannot be used.
        """
        material = self._read()
        return grpc.ssl_channel_credentials(material.authorities, material.key, material.certificate)

    def server_credentials(self) -> grpc.ServerCredentials:
        """Credentials that demand a certificate of every caller; each handshake takes the newest usable files.

        Raises:
            ConfigurationError: The files cannot be used.
        """
        material = self._read()
        return grpc.dynamic_ssl_server_credentials(
            _configuration(material),
            self._renewal(material.version),  # type: ignore[arg-type] # None = nothing new, as documented
            require_client_authentication=True,
        )

    def _renewal(self, version: tuple[int, ...]) -> Callable[[], grpc.ServerCertificateConfiguration | None]:
        seen = version

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal seen
            if self.version == seen:
                return None
            try:
                material = self._read()
            except ConfigurationError as exc:
                _log.error("certificate_not_renewed", error=exc.message)
                return None  # what is loaded may still be valid
            seen = material.version
            _log.info("certificate_renewed", directory=str(self.directory))
            return _configuration(material)

        return fetch

    def _paths(self) -> tuple[Path, Path, Path]:
        return (
            self.directory / CERTIFICATE_FILE,
            self.directory / KEY_FILE,
            self.directory / AUTHORITIES_FILE,
        )

    def _read(self) -> _Material:
        certificate, key, authorities = self._paths()
        version = self.version
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, key)  # proves that they belong together
            context.load_verify_locations(authorities)
            material = _Material(version, certificate.read_bytes(), key.read_bytes(), authorities.read_bytes())
        except OSError as exc:  # an SSLError is one
            raise ConfigurationError(f"TLS files in {self.directory}: {exc}") from exc
        if not version or self.version != version:
            raise ConfigurationError(f"TLS files in {self.directory} changed while they were read")
        return material


def _configuration(material: _Material) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(material.key, material.certificate)], material.authorities)
