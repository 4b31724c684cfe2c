"""KServe's protocol with Triton's own clients, in a process of their own; a scripted worker behind."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import grpc
import pytest

from protos import kserve_pb2 as pb
from protos import kserve_pb2_grpc as rpc
from services.gateway.kserve.server import serve_grpc
from services.gateway.kserve.tensors import column, tensor_from_raw
from shared.errors import CapacityExceeded, InvalidRequest
from shared.rpc import open_channel

TEXT = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["a"]}
SCENARIOS = Path(__file__).with_name("triton_scenarios.py")


async def seen_by_triton(kind, url):
    """What the client of that kind saw."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(SCENARIOS), kind, url, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, err.decode()
    return json.loads(out)


@pytest.fixture
async def speaking(running, text_ids):
    """The gateway, whose worker always says the same."""
    running.worker.script.token_ids = text_ids("one two three four")
    running.worker.script.step_s = 0.005
    return running


def assert_common(seen, running, text_ids):
    assert (seen["live"], seen["ready"], seen["model_ready"]) == (True, True, True)
    assert "bananas" in seen["refused"]
    assert len(seen["plain"]) == 1
    assert seen["plain"][0].startswith("hione two")
    assert len(seen["batch"]) == 2
    assert all(text.startswith("one") for text in seen["batch"])
    assert seen["reasons"] == ["length", "length"]
    assert seen["num_input_tokens"] == [len(text_ids("hi")), len(text_ids("Grüße"))]
    assert seen["server"] == "tandem"
    assert {"text_input", "sampling_parameters", "stream"} <= set(seen["inputs"])
    assert seen["decoupled"] is True
    assert [(model["name"], model["state"]) for model in seen["index"]] == [("pydoc-mini", "READY")]
    assert [submit.priority for submit in running.worker.submits[:3]] == [0, 3, 3]


async def test_tritons_http_client_works_unchanged(speaking, text_ids):
    seen = await seen_by_triton("http", speaking.url.removeprefix("http://"))
    assert_common(seen, speaking, text_ids)
    assert seen["as_json"] == seen["plain"]


async def test_tritons_grpc_client_works_unchanged(start_gateway, text_ids):
    async with start_gateway(grpc_port=0) as running, serve_grpc(running.gateway) as address:
        running.worker.script.token_ids = text_ids("one two three four")
        running.worker.script.step_s = 0.005
        seen = await seen_by_triton("grpc", address)
        assert_common(seen, running, text_ids)
        for pieces in seen["pieces"].values():
            assert "".join(pieces) == "one two three four"
            assert len(pieces) > 2
        assert len(seen["errors"]) == 1
        assert "model_not_found" in seen["errors"][0]


async def test_generate_and_its_stream_say_the_same(speaking):
    path, body = "/v2/models/pydoc-mini/generate", {"text_input": "hi", "parameters": {"max_tokens": 50}}
    whole = (await speaking.http.post(path, json={**body, "exclude_input_in_output": True})).json()
    assert whole == {"model_name": "pydoc-mini", "model_version": "1", "text_output": "one two three four"}
    stream = (await speaking.http.post(f"{path}_stream", json=body)).text
    events = [json.loads(line.removeprefix("data: ")) for line in stream.split("\n\n") if line]
    assert "".join(event["text_output"] for event in events) == "one two three four"


@pytest.mark.parametrize(
    ("path", "body", "status", "told"),
    [
        ("nope/infer", {"inputs": []}, 404, "nope"),
        ("pydoc-mini/versions/2/infer", {"inputs": []}, 404, "version"),
        ("pydoc-mini/infer", {"inputs": []}, 400, "text_input"),
        ("pydoc-mini/infer", {"inputs": [], "foo": 1}, 400, "unknown field 'foo'"),
        ("pydoc-mini/generate", {"text_input": "a", "foo": 1}, 400, "unknown field 'foo'"),
        ("pydoc-mini/infer", {"inputs": [{"name": "text_input"}]}, 400, "datatype"),
        (
            "pydoc-mini/infer",
            {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [2], "data": ["a"]}]},
            400,
            "shape",
        ),
        (
            "pydoc-mini/infer",
            {"inputs": [{"name": "text_input", "datatype": "FP32", "shape": [1], "data": [1.0]}]},
            400,
            "must be BYTES",
        ),
        ("pydoc-mini/generate", {"parameters": {}}, 400, "text_input"),
        ("pydoc-mini/generate", {"text_input": "a", "stream": True}, 400, "generate_stream"),
        ("pydoc-mini/generate", {"text_input": "a", "parameters": {"max_tokens": 0}}, 400, "max_tokens"),
        ("pydoc-mini/generate", {"text_input": "a", "parameters": {"n": 2}}, 400, "one output"),
        ("pydoc-mini/generate", {"text_input": "a", "parameters": {"best_of": 2}}, 400, "one output"),
        ("pydoc-mini/generate", {"text_input": "a", "parameters": {"logprobs": 0}}, 400, "'logprobs'"),
        ("pydoc-mini/generate", {"text_input": "a", "parameters": {"prompt": "b"}}, 400, "text_input"),
        ("pydoc-mini/infer", {"inputs": [TEXT, TEXT]}, 400, "two inputs 'text_input'"),
        ("pydoc-mini/infer", {"inputs": [TEXT | {"foo": 1}]}, 400, "unknown field 'inputs[0].foo'"),
        ("pydoc-mini/infer", {"inputs": [TEXT | {"parameters": {"shared_memory_region": "r"}}]}, 400, "shared_memory"),
        (
            "pydoc-mini/infer",
            {"inputs": [TEXT], "outputs": [{"name": "text_output", "parameters": {"classification": 2}}]},
            400,
            "classification",
        ),
    ],
)
async def test_refusals_have_the_protocols_shape(running, path, body, status, told):
    reply = await running.http.post(f"/v2/models/{path}", json=body)
    assert reply.status_code == status
    assert list(reply.json()) == ["error"]
    assert told in reply.json()["error"]


async def test_numbers_may_be_text_and_texts_stay_what_they_are(running):
    parameters = {"temperature": "0.5", "max_tokens": "3", "stop": "1", "user": "7", "best_of": 1, "logprobs": None}
    sampling = TEXT | {"name": "sampling_parameters", "data": [json.dumps(parameters)]}
    for body in ({"inputs": [TEXT, sampling]}, {"inputs": [TEXT], "parameters": parameters}):
        reply = await running.http.post("/v2/models/pydoc-mini/infer", json=body)
        assert reply.status_code == 200, reply.text
    for submit in running.worker.submits:
        assert (submit.sampling.temperature, submit.sampling.max_tokens) == (0.5, 3)


async def test_what_grpc_says_of_a_tensor_and_is_not_served_is_refused(start_gateway):
    async with start_gateway(grpc_port=0) as running, serve_grpc(running.gateway) as address:
        request = pb.ModelInferRequest(model_name="pydoc-mini")
        for _ in range(2):
            text = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
            text.contents.bytes_contents.append(b"hi")
        async with open_channel(address) as channel:
            call = rpc.GRPCInferenceServiceStub(channel).ModelInfer
            for told in ("two inputs", "classification", "shared_memory_region"):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call(request)
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert told in caught.value.details()
                if told == "two inputs":
                    del request.inputs[1]
                    request.outputs.add(name="text_output").parameters["classification"].int64_param = 2
                else:
                    del request.outputs[:]
                    request.inputs[0].parameters["shared_memory_region"].string_param = "r"


async def test_a_stream_that_fails_at_once_has_a_status(running):
    running.worker.script.failure = CapacityExceeded("too big")
    reply = await running.http.post("/v2/models/pydoc-mini/generate_stream", json={"text_input": "a"})
    assert (reply.status_code, reply.json()) == (400, {"error": "too big"})


@pytest.mark.parametrize(
    ("datatype", "elements"),
    [("BYTES", (b"", "ä".encode(), b"x" * 300)), ("BOOL", (True, False)), ("INT32", (-1, 2)), ("FP32", (0.5, -2.0))],
)
def test_tensors_survive_the_wire(datatype, elements):
    tensor = column("t", datatype, elements)
    assert tensor_from_raw("t", datatype, tensor.shape, tensor.packed()) == tensor


@pytest.mark.parametrize("raw", [b"\x01", b"\x05\x00\x00\x00ab", b"\xff\xff\xff\xff"])
def test_bytes_that_end_too_early_are_refused(raw):
    with pytest.raises(InvalidRequest, match="end inside"):
        tensor_from_raw("t", "BYTES", [1], raw)


async def test_a_key_that_http_asks_for_is_asked_for_here_too(start_gateway):
    async with start_gateway(api_key="sk-chosen", grpc_port=0) as running, serve_grpc(running.gateway) as address:
        request = pb.ModelInferRequest(model_name="pydoc-mini")
        text = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
        text.contents.bytes_contents.append(b"hi")
        async with open_channel(address) as channel:
            call = rpc.GRPCInferenceServiceStub(channel).ModelInfer
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(request)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            reply = await call(request, metadata=[("authorization", "Bearer sk-chosen")])
            assert reply.outputs[0].name == "text_output"
        assert (await running.http.get("/v2/health/ready")).status_code == 200
        assert (await running.http.get("/v2/models/pydoc-mini")).status_code == 401
