"""The keys that open a gateway."""

from __future__ import annotations

from shared.access.api_keys import KeyRecord, fixed_record, key_id_of
from shared.access.key_store import KnownKeys
from shared.errors import NotAuthenticated


class Keyring:
    """All keys that open this gateway: those of a store, and one that the operator may have set."""

    def __init__(self, known: KnownKeys | None, fixed_key: str) -> None:
        self._known = known
        self._fixed = fixed_record(fixed_key) if fixed_key else None

    @property
    def is_empty(self) -> bool:
        """No keys are asked for."""
        return self._known is None and self._fixed is None

    async def identify(self, key: str) -> KeyRecord:
        """The record of a key.

        Raises:
            NotAuthenticated: There is none, or it is revoked.
        """
        if self._fixed is not None and self._fixed.matches(key):
            return self._fixed
        key_id = key_id_of(key)
        record = await self._known.find(key_id) if self._known is not None and key_id else None
        if record is None or not record.matches(key):
            raise NotAuthenticated("the API key is not valid here")
        return record

    async def record_of(self, key_id: str) -> KeyRecord:
        """The record of a key that opened this gateway before, as it is now.

        Raises:
            NotAuthenticated: There is none any more, or it was revoked.
        """
        if self._fixed is not None and key_id == self._fixed.key_id:
            return self._fixed
        record = await self._known.find(key_id) if self._known is not None else None
        if record is None or record.is_revoked:
            raise NotAuthenticated(f"the API key {key_id[:64]!r} is no longer valid here")
        return record
