"""`/v1/files`."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

import orjson
from fastapi import APIRouter
from fastapi.params import Query
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.types import Message, Receive

from services.gateway.access.caller import current_caller
from services.gateway.batches.schemas import FileList, FileObject, FileUpload
from services.gateway.gateway import Gateway
from services.gateway.openapi import described
from services.gateway.pages import page
from services.gateway.requests.body_reader import validate
from services.gateway.responses.schemas import DeletedReply
from shared.errors import Cancelled, InvalidRequest, RequestTooLarge

_FORM_BYTES = 64 << 10  # what a form has beside the file


def router(gateway: Gateway) -> APIRouter:
    """The file endpoints."""
    routes = APIRouter(tags=["files"])
    files = gateway.files

    @routes.post("/v1/files", **described(FileUpload, FileObject, body_type="multipart/form-data"))
    async def upload_file(request: Request) -> Response:
        """Keeps a file."""
        stored = await _uploaded(gateway, request)
        return stored.response()

    @routes.get("/v1/files", **described(None, FileList))
    async def list_files(
        purpose: str = "",
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
        after: str = "",
    ) -> Response:
        """The caller's files."""
        found = await asyncio.to_thread(files.all_of, current_caller().tenant)
        found = [one for one in found if purpose in ("", one.purpose)]
        shown, has_more = page(found if order == "desc" else found[::-1], [one.id for one in found], limit, after)
        ids = [one.id for one in shown]
        first, last = (ids[0], ids[-1]) if ids else (None, None)
        return FileList(data=shown, first_id=first, last_id=last, has_more=has_more).response()

    @routes.get("/v1/files/{file_id}", **described(None, FileObject))
    async def retrieve_file(file_id: str) -> Response:
        """What is known of a file."""
        return (await asyncio.to_thread(files.get, file_id, current_caller().tenant)).response()

    @routes.get("/v1/files/{file_id}/content", **described(None, None, media_type="application/octet-stream"))
    async def retrieve_content(file_id: str) -> Response:
        """Its bytes."""
        path = await asyncio.to_thread(files.path, file_id, current_caller().tenant)
        return FileResponse(path, media_type="application/octet-stream")

    @routes.delete("/v1/files/{file_id}", **described(None, DeletedReply))
    async def delete_file(file_id: str) -> Response:
        """Forgets a file."""
        await asyncio.to_thread(files.delete, file_id, current_caller().tenant)
        content = {"id": file_id, "object": "file", "deleted": True}
        return Response(orjson.dumps(content), media_type="application/json")

    return routes


async def _uploaded(gateway: Gateway, request: Request) -> FileObject:
    """Parses the form; its file goes to disk while it arrives."""
    limited = Request(request.scope, _limited(request, gateway.settings.max_file_bytes))
    try:
        async with limited.form(max_files=1, max_fields=8) as form:
            upload = form.get("file")
            if not isinstance(upload, UploadFile):
                raise InvalidRequest("the part 'file' is required: a file in a multipart/form-data body", param="file")
            wanted = validate(_fields(form), FileUpload, gateway.settings.unknown_fields)
            tenant, name = current_caller().tenant, (upload.filename or "file")[:256]
            ttl_s = wanted.expires_after.seconds if wanted.expires_after else None
            return await asyncio.to_thread(gateway.files.add, upload.file, name, wanted.purpose, tenant, ttl_s=ttl_s)
    except HTTPException as exc:  # Starlette's, of a form that is none
        raise InvalidRequest(f"the form cannot be read: {exc.detail}") from exc
    except ClientDisconnect as exc:
        raise Cancelled("the client left while it sent the file") from exc


def _fields(form: FormData) -> dict[str, object]:
    """The form's fields as JSON would say them: `a[b]` is b of a, and numbers are numbers."""
    fields: dict[str, object] = {}
    for path, value in form.multi_items():
        text = path if isinstance(value, UploadFile) else value
        name, bracket, inner = path.partition("[")
        if not bracket:
            fields[name] = text
            continue
        nested = fields.setdefault(name, {})
        if isinstance(nested, dict):
            nested[inner.removesuffix("]")] = int(text) if text.isdecimal() else text
    return fields


def _limited(request: Request, max_bytes: int) -> Receive:
    """The body's parts as they come, up to the limit."""
    size = 0

    async def receive() -> Message:
        nonlocal size
        message = await request.receive()
        size += len(message.get("body", b""))
        if size > max_bytes + _FORM_BYTES:
            raise RequestTooLarge(f"the file is larger than {max_bytes} bytes, the limit")
        return message

    return receive
