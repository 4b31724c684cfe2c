"""What clients may send as HTTP: nothing is waited for, or kept, without end, and every refusal has a reason."""

from __future__ import annotations

import asyncio
import json

import orjson
import pytest

from services.gateway import http_protocol

BODY = orjson.dumps({"model": "pydoc-mini", "prompt": "hi", "max_tokens": 1})
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"
LAST_CHUNK = b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY)


async def connect(running):
    host, port = running.url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


async def reply_to(running, *pieces: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the first reply, if the connection is closed behind it."""
    reader, writer = await connect(running)
    for piece in pieces:
        writer.write(piece)
        await asyncio.sleep(0)
    async with asyncio.timeout(20):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    status, *headers = head.decode().split("\r\n")
    return int(status.split()[1]), dict(line.split(": ", 1) for line in headers), body


def assert_error(reply, status: int, *words: str) -> None:
    assert reply[0] == status
    assert (reply[1]["content-type"], reply[1]["connection"]) == ("application/json", "close")
    error = json.loads(reply[2])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert all(word in error["message"] for word in words), error


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00",
        b"GREET /live HTTP/1.1\r\n\r\n",
        POST + b"content-length: many\r\n\r\n",
        POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        CHUNKED + b"zz\r\n",
    ],
    ids=["tls", "method", "length", "two-lengths", "chunk-size"],
)
async def test_what_is_no_http_is_refused_in_openais_shape(running, sent):
    assert_error(await reply_to(running, sent), 400, "no HTTP request")


async def test_body_in_another_transfer_coding_is_refused(running):
    head = POST + b"connection: close\r\ntransfer-encoding: gzip, chunked\r\n\r\n"
    status, _, body = await reply_to(running, head + LAST_CHUNK + b"\r\n")
    assert (status, "'gzip'" in json.loads(body)["error"]["message"]) == (400, True)


async def test_a_head_without_end_is_refused_and_a_long_one_is_not(running):
    start = b"GET /live HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-long: "
    assert (await reply_to(running, start + b"a" * (32 << 10), b"\r\n\r\n"))[0] == 200
    reader, writer = await connect(running)
    writer.write(start)
    while not reader.at_eof() and not reader._buffer:
        writer.write(b"a" * 4096)
        await asyncio.sleep(0.001)
    async with asyncio.timeout(20):
        assert b"more than 65536 bytes" in await reader.read()
    writer.close()


@pytest.mark.parametrize("part", [b"x-trailer: ", b"", b"5;extension="], ids=["trailer", "trailers", "extension"])
async def test_what_a_chunked_body_has_beside_the_body_ends(running, part):
    reader, writer = await connect(running)
    writer.write(CHUNKED + (b"" if part.startswith(b"5") else LAST_CHUNK) + part)
    while not reader._buffer:
        writer.write(b"a" * 4096 if part else b"x-trailer: a\r\n" * 300)
        await asyncio.sleep(0.001)
    async with asyncio.timeout(20):
        got = await reader.read()
    assert b" 431 " in got
    assert b"chunk sizes and trailers have more than 65536 bytes" in got
    writer.close()


async def test_trailers_are_no_headers(running):
    late = b"x-request-timeout-s: soon\r\nconnection: close\r\n\r\n"
    head = POST + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    status, _, body = await reply_to(running, head + LAST_CHUNK, late)
    assert (status, b"choices" in body) == (200, True)


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b"GET /live HT", ("12 bytes", "0.2 s")),
        (POST + b"content-length: 50\r\n\r\n{", ("request's body", "0.3 s")),
        (CHUNKED + b"5\r\n", ("request's body", "0.3 s")),
    ],
    ids=["head", "body", "chunk"],
)
async def test_a_client_that_stops_in_the_middle_is_waited_for_so_long(running, monkeypatch, sent, words):
    monkeypatch.setattr(http_protocol, "HEAD_S", 0.2)
    monkeypatch.setattr(http_protocol, "BODY_PAUSE_S", 0.3)
    assert_error(await reply_to(running, sent), 408, *words)


async def test_bytes_that_trickle_give_a_head_no_more_time(running, monkeypatch):
    monkeypatch.setattr(http_protocol, "HEAD_S", 0.3)
    reader, writer = await connect(running)
    writer.write(b"GET /live HTTP/1.1\r\n")
    async with asyncio.timeout(20):
        while b" 408 " not in reader._buffer:  # not read: bytes that come too late reset the connection
            writer.write(b"a: b\r\n")
            await asyncio.sleep(0.02)
    writer.close()


async def test_a_connection_on_which_nothing_comes_is_closed(running, monkeypatch):
    monkeypatch.setattr(http_protocol, "HEAD_S", 0.1)
    reader, writer = await connect(running)
    async with asyncio.timeout(20):
        assert await reader.read() == b""
    writer.close()


async def test_a_reply_takes_the_time_it_takes(running, monkeypatch):
    monkeypatch.setattr(http_protocol, "HEAD_S", 0.1)
    monkeypatch.setattr(http_protocol, "BODY_PAUSE_S", 0.1)
    running.worker.script.step_s = 0.4
    head = POST + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(BODY)
    reply = await reply_to(running, head + BODY, b"GET /live HTTP/1.1\r\n")
    assert (reply[0], b"choices" in reply[2]) == (200, True)
