"""Bodies and replies of `/v1/files` and `/v1/batches`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from services.gateway.schemas.body import Body, Refusal
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


class FileUpload(BaseModel):
    """The parts of an upload."""

    file: str = Field(json_schema_extra={"format": "binary"})
    purpose: Literal["batch", "user_data"]


class BatchBody(Body):
    """What to run."""

    refused: ClassVar[dict[str, Refusal]] = {
        "output_expires_after": Refusal("results are kept as long as other files"),
    }

    input_file_id: str = Field(max_length=128)
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None


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
