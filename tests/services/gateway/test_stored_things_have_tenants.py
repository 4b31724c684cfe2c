"""What a tenant stored is a 404 to every other one; a batch runs as whoever made it, also after a restart."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

import grpc
import msgspec
import pytest

from protos import kserve_pb2 as pb
from protos import kserve_pb2_grpc as rpc
from services.gateway.kserve.server import serve_grpc
from shared.access.api_keys import KeyRecord, mint
from shared.access.key_store import FileKeys
from shared.rpc import open_channel

LINE = {"method": "POST", "url": "/v1/completions"}


@dataclass
class Tenants:
    """Keys of two tenants, in a file."""

    store: FileKeys
    records: dict[str, KeyRecord]
    headers: dict[str, dict[str, str]]


@pytest.fixture
async def tenants(tmp_path):
    made = Tenants(FileKeys(tmp_path / "keys.json"), {}, {})
    for tenant, options in (("acme", {"priority": 7, "requests_per_minute": 100}), ("other", {})):
        key, made.records[tenant] = mint(tenant, **options)
        made.headers[tenant] = {"authorization": f"Bearer {key}"}
        await made.store.put(made.records[tenant])
    return made


@pytest.fixture
def start(start_gateway, tmp_path):
    """A gateway with keys that takes up batches at once."""
    settings = {"files_dir": tmp_path / "files", "batch_poll_s": 0.05, "background_alive_s": 0.5}
    return lambda **more: start_gateway(api_keys=str(tmp_path / "keys.json"), **{**settings, **more})


async def make_batch(running, headers, num_lines=1):
    lines = [
        {**LINE, "custom_id": str(i), "body": {"model": "pydoc-mini", "prompt": f"prompt {i}", "max_tokens": 2}}
        for i in range(num_lines)
    ]
    files = {"file": ("in.jsonl", "\n".join(map(json.dumps, lines)))}
    reply = await running.http.post("/v1/files", files=files, data={"purpose": "batch"}, headers=headers)
    body = {"input_file_id": reply.json()["id"], "endpoint": LINE["url"], "completion_window": "24h"}
    return (await running.http.post("/v1/batches", json=body, headers=headers)).json()


async def ended(running, batch, headers):
    async with asyncio.timeout(30):
        while True:
            batch = (await running.http.get(f"/v1/batches/{batch['id']}", headers=headers)).json()
            if batch["status"] in ("completed", "failed"):
                return batch
            await asyncio.sleep(0.03)


async def test_every_stored_thing_is_a_404_to_another_tenant(start, tenants):
    async with start() as running:
        mine, theirs = tenants.headers["acme"], tenants.headers["other"]
        batch = await ended(running, await make_batch(running, mine), mine)
        background = {"model": "pydoc-mini", "input": "hi", "background": True}
        response = (await running.http.post("/v1/responses", json=background, headers=mine)).json()["id"]
        files = [batch["input_file_id"], batch["output_file_id"]]
        paths = [
            *[("GET", f"/v1/files/{file}{part}") for file in files for part in ("", "/content")],
            *[("DELETE", f"/v1/files/{file}") for file in files],
            ("GET", f"/v1/batches/{batch['id']}"),
            ("POST", f"/v1/batches/{batch['id']}/cancel"),
            ("GET", f"/v1/responses/{response}"),
            ("GET", f"/v1/responses/{response}?stream=true"),
            ("GET", f"/v1/responses/{response}/input_items"),
            ("POST", f"/v1/responses/{response}/cancel"),
            ("DELETE", f"/v1/responses/{response}"),
        ]
        for method, path in paths:
            reply = await running.http.request(method, path, headers=theirs)
            assert reply.status_code == 404, (method, path, reply.text)
        for path in ("/v1/files", "/v1/batches"):
            assert (await running.http.get(path, headers=theirs)).json()["data"] == []
            assert (await running.http.get(path, headers=mine)).json()["data"]
        follow_up = {"model": "pydoc-mini", "input": "and?", "previous_response_id": response}
        assert (await running.http.post("/v1/responses", json=follow_up, headers=theirs)).status_code == 404
        stolen = {"input_file_id": files[0], "endpoint": LINE["url"], "completion_window": "24h"}
        assert (await running.http.post("/v1/batches", json=stolen, headers=theirs)).status_code == 404
        assert (await running.http.get(f"/v1/responses/{response}", headers=mine)).status_code == 200


async def test_a_batch_taken_up_again_runs_as_its_tenant_with_its_keys_priority_and_limits(start, tenants):
    headers = tenants.headers["acme"]
    async with start() as first:
        first.worker.script.hold = True
        batch = await make_batch(first, headers, num_lines=2)
        await first.worker.wait_for(lambda: len(first.worker.submits) == 2)
    async with start() as second:
        done = await ended(second, batch, headers)
        assert done["request_counts"] == {"total": 2, "completed": 2, "failed": 0}
        assert {submit.tenant for submit in second.worker.submits} == {"acme"}
        assert {submit.priority for submit in second.worker.submits} == {1007}
        body = {"model": "pydoc-mini", "prompt": "hi", "max_tokens": 1}
        reply = await second.http.post("/v1/completions", json=body, headers=headers)
        # Upload, batch and two lines there; two lines and this one here.
        assert reply.headers["x-ratelimit-remaining-requests"] == str(100 - 7)


async def test_a_batch_waits_for_its_tenants_own_bound(start, tenants):
    record = msgspec.structs.replace(tenants.records["acme"], max_concurrent=1, requests_per_minute=0)
    await tenants.store.put(record)
    async with start() as running:
        running.worker.script.step_s = 0.03
        batch = await make_batch(running, tenants.headers["acme"], num_lines=3)
        most = 0
        while (await running.http.get(f"/v1/batches/{batch['id']}", headers=tenants.headers["acme"])).json()[
            "status"
        ] != "completed":
            most = max(most, running.open_sessions)
            await asyncio.sleep(0.005)
        assert most == 1


async def test_a_batch_whose_key_was_revoked_is_not_run(start, tenants):
    headers, record = tenants.headers["acme"], tenants.records["acme"]
    async with start(batch_poll_s=30.0) as first:
        await asyncio.sleep(0.2)  # it looked for work, and does so again much later
        batch = await make_batch(first, headers)
    await tenants.store.put(msgspec.structs.replace(record, is_revoked=True))
    key, second_record = mint("acme")
    await tenants.store.put(second_record)
    async with start() as second:
        done = await ended(second, batch, {"authorization": f"Bearer {key}"})
        assert done["status"] == "failed"
        assert done["errors"]["data"][0]["code"] == "invalid_api_key"
        assert not second.worker.submits


async def test_everything_but_probes_asks_for_a_key_over_grpc(start_gateway):
    async with (
        start_gateway(api_key="sk-chosen", grpc_port=0) as running,
        serve_grpc(running.gateway) as address,
        open_channel(address) as channel,
    ):
        stub = rpc.GRPCInferenceServiceStub(channel)
        asked = {
            stub.ServerMetadata: pb.ServerMetadataRequest(),
            stub.ModelReady: pb.ModelReadyRequest(name="pydoc-mini"),
            stub.ModelMetadata: pb.ModelMetadataRequest(name="pydoc-mini"),
            stub.ModelConfig: pb.ModelConfigRequest(name="pydoc-mini"),
            stub.RepositoryIndex: pb.RepositoryIndexRequest(),
        }
        for call, request in asked.items():
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(request)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            await call(request, metadata=[("authorization", "Bearer sk-chosen")])
        assert (await stub.ServerLive(pb.ServerLiveRequest())).live
        assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
