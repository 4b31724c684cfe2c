"""Tokens that go straight to the client: what it reads is what it would have read, and a slow one is waited for."""

from __future__ import annotations

import asyncio
import socket
from typing import ClassVar

import httpx
import orjson
import pytest

from services.gateway.http_protocol import HttpProtocol
from services.gateway.replies import sse
from services.gateway.replies.direct_line import DirectLine
from services.gateway.sessions.session import Mailbox, Session
from shared.engine.sampling_params import SamplingParams
from shared.identity import pack_tokens

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
BODIES = {
    "completion": ("/v1/completions", {"prompt": "hi"}, True),
    "choices of prompts": ("/v1/completions", {"prompt": ["hi", "ho"], "n": 2}, True),
    "chat with usage": ("/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}}, True),
    "messages": ("/v1/messages", CHAT, True),
    "a stop token that shows": ("/v1/completions", {"prompt": "hi", "skip_special_tokens": False}, False),
    "stop string": ("/v1/completions", {"prompt": "hi", "stop": "second"}, False),
    "logprobs": ("/v1/completions", {"prompt": "hi", "logprobs": 1}, False),
    "usage in every chunk": (
        "/v1/completions",
        {"prompt": "hi", "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        False,
    ),
}  # path, what is asked for, whether it goes by line


@pytest.fixture
def sent(monkeypatch):
    """Counts the tokens that went by line."""
    tokens = []
    send = DirectLine.send

    def note(line, token_id):
        is_sent = send(line, token_id)
        if is_sent:
            tokens.append(token_id)
        return is_sent

    monkeypatch.setattr(DirectLine, "send", note)
    return tokens


def read(content: bytes) -> tuple[dict[int, str], set[str], bytes]:
    """Of a stream: each choice's text, how its events look apart from text and numbers, and its last event."""
    texts: dict[int, str] = {}
    looks: set[str] = set()
    events = content.split(b"\n\n")
    for event in events:
        data = event.partition(b"data: ")[2]
        if not data.startswith(b"{"):
            continue
        fields = orjson.loads(data)
        for choice in fields.get("choices", [fields]):
            index = choice.get("index", 0)
            delta = choice.get("delta") or {}
            text = choice.get("text") or delta.get("content") or delta.get("text") or ""
            texts[index] = texts.get(index, "") + text
        looks.add(repr(_look(fields)))
    return texts, looks, events[-2]


def _look(node: object) -> object:
    if isinstance(node, dict):
        return {key: _look(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_look(part) for part in node[:1]]
    return type(node).__name__


@pytest.mark.parametrize("name", BODIES)
async def test_a_reader_cannot_tell_lines_from_the_long_way(running, text_ids, monkeypatch, sent, name):
    running.worker.script.token_ids = text_ids('first Zürich 🦊, then the second "one" and\nthe third')
    path, fields, goes_by_line = BODIES[name]
    body = {"model": "pydoc-mini", "max_tokens": 100, "stream": True, **fields}
    by_line = await running.http.post(path, json=body)
    assert bool(sent) == goes_by_line
    monkeypatch.setattr(sse, "lay_lines", lambda *_: None)
    sent.clear()
    long_way = await running.http.post(path, json=body)
    assert not sent
    assert by_line.status_code == long_way.status_code == 200
    assert read(by_line.content) == read(long_way.content)


async def test_a_line_is_on_only_while_the_task_waits():
    session = Session(pack_tokens([1]), SamplingParams(max_tokens=9), 1, mailbox := Mailbox())
    [choice], lined = session.choices, []
    choice.line = lambda token_id: token_id < 10 and not lined.append(token_id)
    session.note_token = lambda: None
    choice.push(1)
    assert await mailbox.take() == ([choice], [])
    assert choice.take() == ([1], [])
    waiting = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    choice.push(2)
    choice.push(99)  # is not taken by the line, so the task gets it, and what follows it
    choice.push(3)
    assert await waiting == ([choice], [])
    assert choice.take() == ([99, 3], [])
    assert (lined, choice.token_ids) == ([2], [1, 2, 99, 3])


async def test_head_and_first_tokens_leave_together(running):
    host, port = running.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = orjson.dumps({"model": "pydoc-mini", "prompt": "hi", "max_tokens": 3, "stream": True})
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
    first = await reader.read(1 << 16)
    writer.close()
    assert first.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"data: {" in first


class SmallBuffers(HttpProtocol):
    """A connection whose system buffers hold few events."""

    transports: ClassVar[list[asyncio.WriteTransport]] = []

    def connection_made(self, transport) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.transports.append(transport)
        super().connection_made(transport)


async def test_a_slow_reader_gets_everything_in_fewer_pieces_and_little_is_kept_for_it(
    start_gateway, monkeypatch, text_ids, model_files, sent
):
    monkeypatch.setattr("services.gateway.server.HttpProtocol", SmallBuffers)
    monkeypatch.setattr(SmallBuffers, "transports", [])
    tokens = (text_ids("The quick brown fox. ") * 200)[:1000]
    body = orjson.dumps({"model": "pydoc-mini", "prompt": "hi", "max_tokens": 1000, "stream": True})
    async with start_gateway() as running:
        running.worker.script.token_ids = tokens
        url = httpx.URL(running.url)
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((url.host, url.port))
        client.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=client, limit=1024)
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await running.worker.wait_for(lambda: running.worker.submits and not running.open_sessions, timeout_s=30)
        kept = sum(transport.get_write_buffer_size() for transport in SmallBuffers.transports)
        assert 0 < kept < 70_000
        content = await asyncio.wait_for(reader.read(), 30)
        writer.close()
    assert 0 < len(sent) < 500
    assert content.count(b"data: {") < 700
    parts = [part for part in content.split(b"\n\n") if b"data: {" in part]
    texts = [orjson.loads(part.partition(b"data: ")[2])["choices"][0]["text"] for part in parts]
    assert "".join(texts) == model_files.decode(tokens)
