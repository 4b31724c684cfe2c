"""Bodies and replies of `/v1/files` and `/v1/batches`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from services.gateway.schemas.body import Body
from services.gateway.schemas.reply import JsonObject, Reply

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")


class FileObject(Reply):
    """A file that is kept."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class FileList(Reply):
    """Files, newest first unless asked otherwise."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ExpiresAfter(Body):
    """When a file goes: so long after it was made."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2_592_000)


class FileUpload(Body):
    """The parts of an upload, without the file's bytes. In a form, a field's own fields are named `field[name]`."""

    file: str = Field(json_schema_extra={"format": "binary"})
    purpose: Literal["batch", "user_data"]
    expires_after: ExpiresAfter | None = None


class BatchBody(Body):
    """What to run."""

    input_file_id: str = Field(max_length=128)
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None


class BatchObject(BaseModel):
    """A batch, and how far it is."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["batch"]
    endpoint: str
    status: Status
    input_file_id: str


class BatchList(Reply):
    """Batches, newest first."""

    object: Literal["list"] = "list"
    data: list[JsonObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
