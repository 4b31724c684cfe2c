"""Files on disk: the content, and beside it what is known of it. Gateways that share the directory share the files.

ID.data   the bytes
ID.json   the file object and its tenant, written last: a file without it was never complete
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import IO

import orjson

from services.gateway.batches.schemas import FileObject
from shared.errors import NotFound

_ID = re.compile(r"file-[0-9a-f]{32}")


class FileStore:
    """Everything blocks; callers run it beside the event loop. Expired files go when they are looked at."""

    def __init__(self, directory: Path, ttl_s: float) -> None:
        self._directory = directory
        self._ttl_s = ttl_s

    def make_directory(self) -> Path:
        """The directory, for this user only."""
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self._directory

    def add(
        self, source: IO[bytes], filename: str, purpose: str, tenant: str, *, ttl_s: float | None = None
    ) -> FileObject:
        """Copies a stream in; it goes after `ttl_s`, and never later than other files."""
        file_id = f"file-{secrets.token_hex(16)}"
        path = self.make_directory() / f"{file_id}.data"
        with path.open("wb") as target:
            shutil.copyfileobj(source, target)
        return self._describe(file_id, filename, purpose, tenant, ttl_s)

    def adopt(self, path: Path, filename: str, purpose: str, tenant: str, *, ttl_s: float | None = None) -> FileObject:
        """Takes over a file of this directory; see `add`."""
        file_id = f"file-{secrets.token_hex(16)}"
        path.rename(self._directory / f"{file_id}.data")
        return self._describe(file_id, filename, purpose, tenant, ttl_s)

    def get(self, file_id: str, tenant: str) -> FileObject:
        """What is known of a file.

        Raises:
            NotFound: The tenant has no such file, or no more.
        """
        found = self._read(file_id) if _ID.fullmatch(file_id) else None
        if found is None or found[1] != tenant:
            raise NotFound(f"there is no file {file_id[:64]!r}, or no more", param="file_id")
        return found[0]

    def path(self, file_id: str, tenant: str) -> Path:
        """Where its content is.

        Raises:
            NotFound: The tenant has no such file, or no more.
        """
        return self._directory / f"{self.get(file_id, tenant).id}.data"

    def all_of(self, tenant: str) -> list[FileObject]:
        """Of a tenant, newest first."""
        ids = (path.stem for path in self._directory.glob("file-*.json"))
        found = [entry for file_id in ids if (entry := self._read(file_id)) is not None]
        mine = [described for described, owner in found if owner == tenant]
        return sorted(mine, key=lambda f: (f.created_at, f.id), reverse=True)

    def delete(self, file_id: str, tenant: str) -> None:
        """Removes it.

        Raises:
            NotFound: The tenant has no such file, or no more.
        """
        self._remove(self.get(file_id, tenant).id)

    def _describe(self, file_id: str, filename: str, purpose: str, tenant: str, ttl_s: float | None) -> FileObject:
        now = int(time.time())
        described = FileObject(
            id=file_id,
            bytes=(self._directory / f"{file_id}.data").stat().st_size,
            created_at=now,
            expires_at=now + int(self._ttl_s if ttl_s is None else min(ttl_s, self._ttl_s)),
            filename=filename,
            purpose=purpose,
        )
        temporary = self._directory / f"{file_id}.new"
        temporary.write_bytes(orjson.dumps({"file": described.as_json(), "tenant": tenant}))
        os.replace(temporary, self._directory / f"{file_id}.json")
        return described

    def _read(self, file_id: str) -> tuple[FileObject, str] | None:
        try:
            content = orjson.loads((self._directory / f"{file_id}.json").read_bytes())
        except FileNotFoundError:
            return None
        described = FileObject.model_validate(content["file"])
        if described.expires_at is not None and described.expires_at <= time.time():
            self._remove(file_id)
            return None
        return described, content["tenant"]

    def _remove(self, file_id: str) -> None:
        for suffix in ("json", "data"):
            (self._directory / f"{file_id}.{suffix}").unlink(missing_ok=True)
