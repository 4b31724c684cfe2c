"""A certificate authority for one fleet, and a certificate for each of its services: `tandem certs`, `tandem up --tls`.

DIR/
ca.crt, ca.key               the authority; ca.key stays with whoever issues
MEMBER/tls.crt, tls.key, ca.crt      one directory per member: a service's `tls_dir`, or a Kubernetes secret

MEMBER is `gateway`, `operator` (for `tandem status`), `decode.ID`, `prefill.ID`, `transfer.ID`; without worker ids it
is `decode`, `prefill` and `transfer`, whose certificates speak for any worker of that role.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared.errors import ConfigurationError
from shared.rpc.tls import AUTHORITIES_FILE, CERTIFICATE_FILE, KEY_FILE, TRUST_DOMAIN, PeerRole, peer_name, peer_uri

_AUTHORITY_DAYS = 3650
_CLOCK_SKEW = datetime.timedelta(minutes=5)
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_AUTHORITY_KEY = "ca.key"


@dataclass(frozen=True, slots=True)
class Member:
    """Whom a certificate is for; no id = any member of that role."""

    role: PeerRole
    member_id: str = ""

    @property
    def directory_name(self) -> str:
        """Under the directory of the authority."""
        label = peer_name(self.role, self.member_id).partition(".")[0]
        return f"{self.role}.{label}" if self.member_id else str(self.role)


@dataclass(frozen=True, slots=True)
class _Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    bundle: bytes  # it, and its predecessors as long as they are valid


def fleet_members(prefill_ids: Sequence[str] = (), decode_ids: Sequence[str] = ()) -> list[Member]:
    """Everybody in a fleet of these workers; of any workers, where none is named."""
    if not prefill_ids and not decode_ids:
        return [Member(role) for role in PeerRole]
    members = [Member(PeerRole.GATEWAY), Member(PeerRole.OPERATOR)]
    members += [Member(PeerRole.PREFILL, worker_id) for worker_id in prefill_ids]
    members += [Member(PeerRole.DECODE, worker_id) for worker_id in decode_ids]
    members += [Member(PeerRole.TRANSFER, worker_id) for worker_id in (*prefill_ids, *decode_ids)]
    return members


def issue_certificates(
    directory: Path, members: Sequence[Member], *, hosts: Sequence[str] = (), days: int = 365
) -> Path:
    """Issues a certificate for each member, each time anew; the authority is made once and renewed in time.

    Running services take renewed certificates up by themselves. A renewed authority is trusted beside its predecessor
    until that expires, so that old and new certificates work together.

    Args:
        directory: Made if missing, for this user alone.
        members: Whom to issue for; others keep what they have.
        hosts: Names and addresses for every certificate, on top of localhost.
        days: Validity of the certificates.

    Returns:
        The absolute directory.

    Raises:
        ConfigurationError: The directory cannot be used.
    """
    absolute = directory.expanduser().absolute()
    try:
        absolute.mkdir(parents=True, exist_ok=True, mode=0o700)
        authority = _authority(absolute, days)
        for member in members:
            _issue(authority, absolute / member.directory_name, member, hosts, days)
    except OSError as exc:
        raise ConfigurationError(f"certificates in {absolute}: {exc}") from exc
    except ValueError as exc:
        raise ConfigurationError(f"certificates in {absolute}: not what an earlier run left there: {exc}") from exc
    return absolute


def _authority(directory: Path, days: int) -> _Authority:
    """The one in use, unless it ends before the certificates that it is to sign."""
    bundle_path, key_path = directory / AUTHORITIES_FILE, directory / _AUTHORITY_KEY
    now = datetime.datetime.now(datetime.UTC)
    known: list[x509.Certificate] = []
    if bundle_path.exists() and key_path.exists():
        known = x509.load_pem_x509_certificates(bundle_path.read_bytes())
        known = [certificate for certificate in known if certificate.not_valid_after_utc > now]
        key = serialization.load_pem_private_key(key_path.read_bytes(), None)
        if known and known[0].not_valid_after_utc > now + datetime.timedelta(days=days + 1):
            if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != known[0].public_key():
                raise ValueError(f"{key_path} is not the key of {bundle_path}")
            return _Authority(known[0], key, _pem(known))
    fresh_key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{TRUST_DOMAIN} authority {now:%Y-%m-%d}")])
    certificate = (
        _builder(name, name, fresh_key, now, max(_AUTHORITY_DAYS, 2 * days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(fresh_key.public_key()), critical=False)
        .sign(fresh_key, hashes.SHA256())
    )
    bundle = _pem([certificate, *known])
    _write(key_path, _key_pem(fresh_key))
    _write(bundle_path, bundle)
    return _Authority(certificate, fresh_key, bundle)


def _issue(authority: _Authority, directory: Path, member: Member, hosts: Sequence[str], days: int) -> None:
    directory.mkdir(exist_ok=True, mode=0o700)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, member.directory_name[:64])])
    certificate = (
        _builder(name, authority.certificate.subject, key, datetime.datetime.now(datetime.UTC), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName(list(_names(member, hosts))), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    # The certificate comes last: a reader that finds it finds its key too, or knows that they do not match yet.
    _write(directory / AUTHORITIES_FILE, authority.bundle)
    _write(directory / KEY_FILE, _key_pem(key))
    _write(directory / CERTIFICATE_FILE, _pem([certificate]))


def _names(member: Member, hosts: Sequence[str]) -> Iterator[x509.GeneralName]:
    any_member = f"*.{member.role}.{TRUST_DOMAIN}"
    yield x509.DNSName(peer_name(member.role, member.member_id) if member.member_id else any_member)
    yield x509.UniformResourceIdentifier(peer_uri(member.role, member.member_id))
    for host in dict.fromkeys((*_LOCAL_NAMES, *hosts)):
        try:
            yield x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            yield x509.DNSName(host)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    now: datetime.datetime,
    days: int,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificates: Sequence[x509.Certificate]) -> bytes:
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in certificates)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes) -> None:
    """Replaces a file in one step; only this user may read it."""
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    fresh.replace(path)
