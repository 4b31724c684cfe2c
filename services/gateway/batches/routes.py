"""`/v1/batches`."""

from __future__ import annotations

import asyncio
from typing import Annotated

import orjson
from fastapi import APIRouter
from fastapi.params import Query
from starlette.requests import Request
from starlette.responses import Response

from services.gateway.access.caller import current_caller
from services.gateway.batches.records import check_batch
from services.gateway.batches.schemas import BatchBody, BatchList, BatchObject
from services.gateway.gateway import Gateway
from services.gateway.openapi import described
from services.gateway.pages import page
from services.gateway.requests.body_reader import parse_body, read_body
from shared.errors import InvalidRequest, NotFound, PermissionDenied


def router(gateway: Gateway) -> APIRouter:
    """The batch endpoints."""
    routes = APIRouter(tags=["batches"])
    records = gateway.batches

    @routes.post("/v1/batches", **described(BatchBody, BatchObject))
    async def create_batch(request: Request) -> Response:
        """Runs the requests of a file when there is room."""
        raw = await read_body(request, gateway.settings.max_body_bytes)
        body, caller = parse_body(raw, BatchBody, gateway.settings.unknown_fields), current_caller()
        check_batch(body)
        if not caller.may_use(gateway.model.name):
            raise PermissionDenied(f"this API key does not allow the model {gateway.model.name!r}", param="model")
        try:
            file = await asyncio.to_thread(gateway.files.get, body.input_file_id, caller.tenant)
        except NotFound as exc:
            raise NotFound(exc.message, param="input_file_id") from exc
        if file.purpose != "batch":
            raise InvalidRequest(f"the file's purpose is {file.purpose!r}, not 'batch'", param="input_file_id")
        return _json((await records.create(body, caller)).content)

    @routes.get("/v1/batches", **described(None, BatchList))
    async def list_batches(limit: Annotated[int, Query(ge=1, le=100)] = 20, after: str = "") -> Response:
        """The caller's batches."""
        found = await records.all_of(current_caller().tenant)
        shown, has_more = page(found, [record.batch_id for record in found], limit, after)
        ids = [record.batch_id for record in shown]
        first, last = (ids[0], ids[-1]) if ids else (None, None)
        content = [record.content for record in shown]
        return BatchList(data=content, first_id=first, last_id=last, has_more=has_more).response()

    @routes.get("/v1/batches/{batch_id}", **described(None, BatchObject))
    async def retrieve_batch(batch_id: str) -> Response:
        """How far a batch is."""
        return _json((await records.get(batch_id, current_caller().tenant)).content)

    @routes.post("/v1/batches/{batch_id}/cancel", **described(None, BatchObject))
    async def cancel_batch(batch_id: str) -> Response:
        """Ends a batch; the results that there are stay."""
        record = await records.get(batch_id, current_caller().tenant)
        if not record.is_open:
            raise InvalidRequest(f"the batch is {record.content['status']}: there is nothing to cancel")
        await records.ask_to_cancel(batch_id)
        return _json((await records.get(batch_id, current_caller().tenant)).content)

    return routes


def _json(content: dict[str, object]) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
