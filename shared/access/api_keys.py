"""An API key: what the client holds, and what is kept of it.

tnd-3f9c01ab27d4-<43 characters>      the client's; shown once
`---id----'                       plain, so that a record is found by it
sha256 of the whole                   kept; 256 random bits need no slow hash, guessing is hopeless anyway
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time

import msgspec

from shared.errors import InvalidRequest

_FORM = re.compile(r"tnd-([0-9a-f]{12})-[A-Za-z0-9_-]{43}")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is kept of a key.

    Attributes:
        key_id: The part of the key that names it.
        key_hash: Hex SHA-256 of the key.
        tenant: Whom it belongs to: fairness, limits and stored objects are per tenant.
        name: For people.
        priority: Of its requests, added to their own; lower is sooner.
        requests_per_minute, tokens_per_minute: Of the tenant through this key; 0 = no limit.
        max_concurrent: Requests under way at once; 0 = the gateway's default.
        models: Served names that it may use; empty = all.
        created_at: Unix seconds.
        is_revoked: It is refused.
    """

    key_id: str
    key_hash: str
    tenant: str
    name: str = ""
    priority: int = 0
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    max_concurrent: int = 0
    models: tuple[str, ...] = ()
    created_at: int = 0
    is_revoked: bool = False

    def matches(self, key: str) -> bool:
        """Whether this is the record of `key`; takes as long for a wrong one."""
        return hmac.compare_digest(self.key_hash, _hash(key)) and not self.is_revoked


def mint(tenant: str, **options: object) -> tuple[str, KeyRecord]:
    """A new key and its record; `options` are fields of `KeyRecord`.

    Raises:
        InvalidRequest: A tenant's name that is not one.
    """
    if not _TENANT.fullmatch(tenant):
        raise InvalidRequest(f"tenant {tenant!r}: letters, digits, '.', '_', '-', at most 64", param="tenant")
    key_id = secrets.token_hex(6)
    key = f"tnd-{key_id}-{secrets.token_urlsafe(32)}"
    created_at = int(time.time())
    record = KeyRecord(key_id=key_id, key_hash=_hash(key), tenant=tenant, created_at=created_at, **options)  # type: ignore[arg-type]
    return key, record


def key_id_of(key: str) -> str:
    """The part that names the record; "" of what is no key of ours."""
    match = _FORM.fullmatch(key)
    return match[1] if match else ""


def fixed_record(key: str) -> KeyRecord:
    """The record of a key that the operator chose (`TANDEM_GATEWAY_API_KEY`): one tenant, no limits."""
    return KeyRecord(key_id="fixed", key_hash=_hash(key), tenant="default", name="TANDEM_GATEWAY_API_KEY")


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
