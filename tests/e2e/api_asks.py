"""Every API of a gateway, asked; the answers without what may differ from one time to the next."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import httpx

from protos import kserve_pb2 as pb
from protos import kserve_pb2_grpc as rpc
from shared.rpc import open_channel
from tests.e2e.field_values import FILLER, MODEL, SCHEMA, TOOLS

# Ids, times, and what a cache holds.
_VARYING = {"id", "created", "created_at", "completed_at", "expires_at", "timing", "call_id", "request_id", "item_id"}
_VARYING |= {"prompt_tokens_details", "input_tokens_details", "previous_response_id", "response_id"}
LIST = {
    "type": "object",
    "properties": {"items": {"type": "array", "items": {"type": "integer"}, "minItems": 40, "maxItems": 40}},
    "required": ["items"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Target:
    """A gateway; what is asked of it is marked in its log by the name."""

    http: httpx.AsyncClient
    url: str
    grpc: str
    name: str = ""

    async def post(self, path: str, fields: dict) -> dict:
        """The JSON reply."""
        reply = await self.http.post(f"{self.url}{path}", json=fields, headers={"x-request-id": self.name})
        assert reply.status_code == 200, reply.text
        return reply.json()

    async def events(self, path: str, fields: dict) -> list[dict]:
        """All events of a stream but its last word."""
        headers, events = {"x-request-id": self.name}, []
        async with self.http.stream("POST", f"{self.url}{path}", json=fields, headers=headers) as stream:
            assert stream.status_code == 200, await stream.aread()
            async for line in stream.aiter_lines():
                if line.startswith("data: {"):
                    events.append(json.loads(line[6:]))
                    assert "error" not in events[-1] or events[-1]["error"] is None, line
        return events


Ask = Callable[[Target], Awaitable[object]]


def comparable(content: object) -> object:
    """The content without ids and times; numbers that sums in another order make differ, rounded."""
    if isinstance(content, dict):
        if "cache_read_input_tokens" in content:  # Anthropic's counts tell what was computed from what was cached
            cached = content["cache_read_input_tokens"]
            content = {**content, "input_tokens": content["input_tokens"] + cached, "cache_read_input_tokens": 0}
        return {key: comparable(value) for key, value in content.items() if key not in _VARYING}
    if isinstance(content, list):
        return [comparable(item) for item in content]
    return round(content, 2) if isinstance(content, float) else content


def generation(path: str, fields: dict) -> Ask:
    """A whole chat or completion."""

    async def ask(target: Target) -> object:
        body = {"model": MODEL, "max_tokens": 160, "cache_salt": uuid.uuid4().hex, "timing": True, **fields}
        return comparable(await target.post(path, body))

    return ask


def streamed_generation(path: str, fields: dict) -> Ask:
    """The words, calls, scores and ends of every choice of a stream."""

    async def ask(target: Target) -> object:
        choices: dict[int, dict] = {}
        body = {"model": MODEL, "max_tokens": 160, "cache_salt": uuid.uuid4().hex, "stream": True, **fields}
        for event in await target.events(path, body):
            for choice in event.get("choices", ()):
                delta, logprobs = choice.get("delta", choice), choice.get("logprobs") or {}
                seen = choices.setdefault(choice["index"], {"text": "", "calls": "", "tokens": [], "finish": None})
                seen["text"] += delta.get("text") or delta.get("content") or ""
                for call in delta.get("tool_calls") or ():
                    seen["calls"] += call["function"].get("name", "") + call["function"].get("arguments", "")
                seen["tokens"] += logprobs.get("tokens") or [entry["token"] for entry in logprobs.get("content") or ()]
                seen["finish"] = choice["finish_reason"] or seen["finish"]
        return choices

    return ask


def _response(fields: dict) -> dict:
    return {"model": MODEL, "input": FILLER, "max_output_tokens": 120, "cache_salt": uuid.uuid4().hex, **fields}


def response(**fields: object) -> Ask:
    """A whole response."""

    async def ask(target: Target) -> object:
        return comparable(await target.post("/v1/responses", _response(fields)))

    return ask


def streamed_response(**fields: object) -> Ask:
    """A response's last event, and what its deltas add up to."""

    async def ask(target: Target) -> object:
        events = await target.events("/v1/responses", _response({**fields, "stream": True}))
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        deltas: dict[str, str] = {}
        for event in events:
            if event["type"].endswith(".delta"):
                deltas[event["type"]] = deltas.get(event["type"], "") + event["delta"]
        return deltas, comparable(events[-1]["response"])

    return ask


def background_response(**fields: object) -> Ask:
    """A response that is fetched when it is done."""

    async def ask(target: Target) -> object:
        made = await target.post("/v1/responses", _response({**fields, "background": True}))
        async with asyncio.timeout(120):
            while made["status"] in ("queued", "in_progress"):
                await asyncio.sleep(0.05)
                made = (await target.http.get(f"{target.url}/v1/responses/{made['id']}")).json()
        return comparable(made)

    return ask


def chained_response(**fields: object) -> Ask:
    """The answer to a second turn."""

    async def ask(target: Target) -> object:
        first = await target.post("/v1/responses", _response({"temperature": 0, "max_output_tokens": 8}))
        turn = {"input": "Go on.", "previous_response_id": first["id"], **fields}
        return comparable(await target.post("/v1/responses", _response(turn)))

    return ask


def _message(fields: dict) -> dict:
    turns = [{"role": "user", "content": FILLER}]
    salted = {"cache_salt": uuid.uuid4().hex, "temperature": 0}
    return {"model": MODEL, "messages": turns, "max_tokens": 120, **salted, **fields}


def message(**fields: object) -> Ask:
    """A whole message of Anthropic's API."""

    async def ask(target: Target) -> object:
        return comparable(await target.post("/v1/messages", _message(fields)))

    return ask


def streamed_message(**fields: object) -> Ask:
    """What a message's events add up to."""

    async def ask(target: Target) -> object:
        blocks: list[dict] = []
        end: dict = {}
        for event in await target.events("/v1/messages", _message({**fields, "stream": True})):
            match event["type"]:
                case "content_block_start":
                    blocks.append({"block": comparable(event["content_block"]), "said": ""})
                case "content_block_delta":
                    blocks[-1]["said"] += event["delta"].get("text") or event["delta"].get("partial_json") or ""
                case "message_delta":
                    end = {**event["delta"], "output_tokens": event["usage"]["output_tokens"]}
        return blocks, end

    return ask


async def embeddings(target: Target) -> object:
    """Vectors of several texts, as many as keep a worker busy for a while."""
    texts = [f"{number}. {FILLER * 3}" for number in range(6)]
    body = {"model": MODEL, "input": texts, "cache_salt": uuid.uuid4().hex}
    reply = await target.post("/v1/embeddings", body)
    return [[round(number, 4) for number in item["embedding"]] for item in reply["data"]], reply["usage"]


def _kserve(fields: dict) -> dict:
    return {"max_tokens": 120, "temperature": 1.0, "ignore_eos": True, "cache_salt": uuid.uuid4().hex, **fields}


async def infer(target: Target) -> object:
    """KServe's tensors as JSON, two prompts at a time."""
    text = {"name": "text_input", "datatype": "BYTES", "shape": [2], "data": [FILLER, FILLER + "Again."]}
    flags = [
        {"name": f"return_{name}", "datatype": "BOOL", "shape": [1], "data": [True]}
        for name in ("finish_reason", "num_output_tokens")
    ]
    body = {"inputs": [text, *flags], "parameters": _kserve({"seed": 21})}
    return comparable(await target.post(f"/v2/models/{MODEL}/infer", body))


async def generate(target: Target) -> object:
    """Triton's `generate`."""
    body = {"text_input": FILLER, "parameters": _kserve({"seed": 22}), "return_finish_reason": True}
    return comparable(await target.post(f"/v2/models/{MODEL}/generate", body))


async def generate_stream(target: Target) -> object:
    """What Triton's `generate_stream` adds up to."""
    body = {"text_input": FILLER, "parameters": _kserve({"seed": 23})}
    events = await target.events(f"/v2/models/{MODEL}/generate_stream", body)
    return "".join(event["text_output"] for event in events)


def _infer_message(name: str, *, stream: bool, seed: int) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=MODEL, id=name)
    text = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    text.contents.bytes_contents.append(FILLER.encode())
    fields = request.inputs.add(name="sampling_parameters", datatype="BYTES", shape=[1])
    fields.contents.bytes_contents.append(json.dumps(_kserve({"seed": seed})).encode())
    if stream:
        request.inputs.add(name="stream", datatype="BOOL", shape=[1]).contents.bool_contents.append(True)
    return request


def _texts(reply: pb.ModelInferResponse) -> list[bytes]:
    [text] = [index for index, output in enumerate(reply.outputs) if output.name == "text_output"]
    if reply.raw_output_contents:
        return [reply.raw_output_contents[text][4:]]  # after its length
    return list(reply.outputs[text].contents.bytes_contents)


async def grpc_infer(target: Target) -> object:
    """KServe over gRPC."""
    async with open_channel(target.grpc) as channel:
        stub = rpc.GRPCInferenceServiceStub(channel)
        return _texts(await stub.ModelInfer(_infer_message(target.name, stream=False, seed=24), timeout=120))


async def grpc_stream(target: Target) -> object:
    """What a stream over gRPC adds up to."""
    said = b""
    async with open_channel(target.grpc) as channel:
        call = rpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(timeout=120)
        await call.write(_infer_message(target.name, stream=True, seed=25))
        await call.done_writing()
        async for reply in call:
            assert not reply.error_message, reply.error_message
            said += b"".join(_texts(reply.infer_response))
    return said


BATCHED = [
    {"prompt": FILLER, "guided_json": SCHEMA, "temperature": 1, "seed": 31, "max_tokens": 160},
    {"prompt": FILLER, "ignore_eos": True, "temperature": 0.9, "seed": 32, "max_tokens": 120, "logprobs": 1},
]


def batch(name: str) -> Ask:
    """The replies of a batch, in the order of its lines."""

    async def ask(target: Target) -> object:
        bodies = [{"model": MODEL, "cache_salt": uuid.uuid4().hex, **fields} for fields in BATCHED]
        lines = [
            {"custom_id": f"{name}:{number}", "method": "POST", "url": "/v1/completions", "body": body}
            for number, body in enumerate(bodies)
        ]
        content = "\n".join(map(json.dumps, lines)).encode()
        upload = await target.http.post(
            f"{target.url}/v1/files", files={"file": ("batch.jsonl", content)}, data={"purpose": "batch"}
        )
        wanted = {"input_file_id": upload.json()["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        made = await target.post("/v1/batches", wanted)
        async with asyncio.timeout(120):
            while made["status"] not in ("completed", "failed", "expired", "cancelled"):
                await asyncio.sleep(0.05)
                made = (await target.http.get(f"{target.url}/v1/batches/{made['id']}")).json()
        assert made["status"] == "completed", made
        results = (await target.http.get(f"{target.url}/v1/files/{made['output_file_id']}/content")).text
        done = {result["custom_id"]: result["response"]["body"] for result in map(json.loads, results.splitlines())}
        return [comparable(done[line["custom_id"]]) for line in lines]

    return ask


async def unbatched(target: Target) -> object:
    """The same requests, asked one by one."""
    return [comparable(await target.post("/v1/completions", {"model": MODEL, **fields})) for fields in BATCHED]


_JSON = {"type": "json_schema", "name": "s", "schema": LIST}
_FUNCTIONS = [{"type": "function", **tool["function"]} for tool in TOOLS]
_SERVER_TOOLS = [{"name": "f", "input_schema": LIST}]
_FREE = {"temperature": 1, "ignore_eos": True}

ASKS: dict[str, Ask] = {
    "responses-json": response(
        text={"format": _JSON}, temperature=1, seed=41, include=["message.output_text.logprobs"]
    ),
    "responses-call": response(tools=_FUNCTIONS, tool_choice="required", temperature=1, seed=42),
    "responses-extras": response(**_FREE, seed=43, top_k=40, stop="###", repetition_penalty=1.1),
    "responses-background": background_response(**_FREE, seed=44),
    "responses-chained": chained_response(**_FREE, seed=45),
    "responses-stream": streamed_response(**_FREE, seed=46),
    "responses-stream-call": streamed_response(tools=_FUNCTIONS, tool_choice="required", temperature=1, seed=47),
    "messages": message(output_config={"format": {"type": "json_schema", "schema": LIST}}),
    "messages-call": message(tools=_SERVER_TOOLS, tool_choice={"type": "any"}),
    "messages-stream": streamed_message(output_config={"format": {"type": "json_schema", "schema": LIST}}),
    "messages-stream-call": streamed_message(tools=_SERVER_TOOLS, tool_choice={"type": "tool", "name": "f"}),
    "embeddings": embeddings,
    "kserve-infer": infer,
    "kserve-generate": generate,
    "kserve-stream": generate_stream,
    "kserve-grpc": grpc_infer,
    "kserve-grpc-stream": grpc_stream,
    "batches": batch("batches"),
}
"""By name; the first word is the API's."""
