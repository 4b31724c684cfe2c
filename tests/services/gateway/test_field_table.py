"""The table of fields is what the code does, and names every endpoint that reads a JSON body of ours."""

from __future__ import annotations

from services.gateway.field_table import ENDPOINTS, FILE, table


def test_the_table_is_what_the_schemas_say():
    message = "run `python -m services.gateway.field_table`"
    assert FILE.read_text(encoding="utf-8") == table(), message


async def test_every_endpoint_with_a_body_is_in_the_table(running):
    document = (await running.http.get("/openapi.json")).json()
    with_bodies = {
        path
        for path, operations in document["paths"].items()
        if "application/json" in operations.get("post", {}).get("requestBody", {}).get("content", {})
    }
    kserve = {path for path in with_bodies if path.startswith("/v2/")}  # Triton's protocol has tensors, not fields
    assert with_bodies - kserve == set(ENDPOINTS)
