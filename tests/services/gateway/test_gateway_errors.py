"""Every failure is one reply in OpenAI's shape, and leaves nothing behind."""

from __future__ import annotations

import gzip

import openai
import orjson
import pytest

from shared.errors import CapacityExceeded, InternalError, Overloaded

BODY = {"model": "pydoc-mini", "prompt": "hi", "max_tokens": 4}


def assert_openai_error(reply, status, code):
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (status, code)
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "code"),
    [
        ("POST", "/v1/completions", b"{", 400, "invalid_request"),
        ("POST", "/v1/completions", b"\xff\xfe", 400, "invalid_request"),
        ("POST", "/v1/completions", b"[1]", 400, "invalid_request"),
        ("POST", "/v1/chat/completions", b'{"model": 1}', 400, "invalid_request"),
        ("POST", "/v1/chat/completions", b'{"model": "nope", "messages": [{"role": "user"}]}', 404, "model_not_found"),
        ("GET", "/v1/models/nope", b"", 404, "model_not_found"),
        ("GET", "/v1/nope", b"", 404, "not_found"),
        ("GET", "/v1/completions", b"", 405, "method_not_allowed"),
    ],
)
async def test_refusals_have_openais_shape(running, method, path, content, status, code):
    reply = await running.http.request(method, path, content=content)
    assert assert_openai_error(reply, status, code)["type"] == "invalid_request_error"


@pytest.mark.parametrize("chunked", [False, True])
async def test_body_above_the_limit_is_refused_with_both_numbers(start_gateway, chunked):
    async with start_gateway(max_body_bytes=2000) as running:

        async def pieces():
            for _ in range(30):
                yield b"x" * 100

        reply = await running.http.post("/v1/completions", content=pieces() if chunked else b"x" * 3000)
        error = assert_openai_error(reply, 413, "request_too_large")
        assert "2000" in error["message"]
        assert chunked or "3000" in error["message"]
        assert (await running.http.get("/live")).status_code == 200


async def test_compressed_body_is_refused_by_its_encoding(running):
    reply = await running.http.post(
        "/v1/completions", content=gzip.compress(b"{}"), headers={"content-encoding": "gzip"}
    )
    assert "'gzip'" in assert_openai_error(reply, 400, "invalid_request")["message"]


async def test_prompt_with_max_tokens_above_the_context_names_both_numbers(running):
    reply = await running.http.post("/v1/completions", json={**BODY, "prompt": [5] * 1000, "max_tokens": 25})
    error = assert_openai_error(reply, 400, "context_length_exceeded")
    assert "1025" in error["message"]
    assert "1024" in error["message"]
    assert not running.worker.submits


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status"),
    [(CapacityExceeded("needs 12 blocks, the worker has 10"), 400), (Overloaded("the queue is full"), 429)],
)
async def test_workers_refusal_becomes_the_status(running, stream, failure, status):
    running.worker.script.failure = failure
    reply = await running.http.post("/v1/completions", json={**BODY, "stream": stream})
    error = assert_openai_error(reply, status, failure.code)
    assert error["message"] == failure.message
    assert ("retry-after" in reply.headers) is (status == 429)


async def test_official_client_raises_its_own_errors(running):
    with pytest.raises(openai.NotFoundError):
        await running.openai.completions.create(model="nope", prompt="hi")
    with pytest.raises(openai.BadRequestError) as caught:
        await running.openai.completions.create(model="pydoc-mini", prompt="hi", temperature=9)
    assert caught.value.param == "temperature"


async def test_no_worker_is_a_503_after_a_bounded_wait(start_gateway):
    async with start_gateway(num_workers=0, worker_wait_s=0.1) as running:
        reply = await running.http.post("/v1/completions", json=BODY)
        assert_openai_error(reply, 503, "unavailable")
        assert reply.headers["retry-after"]
        ready = await running.http.get("/ready")
        assert ready.status_code == 503
        assert "decode worker" in ready.json()["reason"]


async def test_worker_lost_in_a_stream_is_an_error_event_and_done(start_gateway, text_ids):
    async with start_gateway(max_lost_workers=1) as running:
        running.worker.script.token_ids = text_ids("a few tokens and then nothing")
        running.worker.script.die_after = 3
        reply = await running.http.post("/v1/completions", json={**BODY, "max_tokens": 50, "stream": True})
        events = [event.removeprefix("data: ") for event in reply.text.split("\n\n") if event]
        assert events[-1] == "[DONE]"
        assert orjson.loads(events[-2])["error"]["code"] == "worker_lost"
        assert orjson.loads(events[0])["choices"][0]["text"]


async def test_lost_worker_is_a_503_and_found_again(start_gateway):
    async with start_gateway(max_lost_workers=1) as running:
        running.worker.script.die_after = 1
        reply = await running.http.post("/v1/completions", json=BODY)
        assert_openai_error(reply, 503, "worker_lost")
        running.worker.script.die_after = None
        reply = await running.http.post("/v1/completions", json=BODY)
        assert reply.status_code == 200
        assert len(running.worker.hellos) == 2


async def test_request_that_outlives_its_limit_is_a_408(start_gateway):
    async with start_gateway(request_timeout_s=0.2) as running:
        running.worker.script.hold = True
        reply = await running.http.post("/v1/completions", json=BODY)
        assert_openai_error(reply, 408, "request_timeout")
        await running.worker.wait_for(lambda: running.worker.aborts)


async def test_limit_holds_for_every_prompt_of_a_batch(start_gateway):
    async with start_gateway(request_timeout_s=0.3) as running:
        running.worker.script.hold_prompt = [9]
        reply = await running.http.post("/v1/completions", json={**BODY, "prompt": [[5], [9]]})
        assert_openai_error(reply, 408, "request_timeout")


async def test_failures_are_counted_by_code(running):
    await running.http.post("/v1/completions", content=b"{")
    text = (await running.http.get("/metrics")).text
    assert 'tandem_request_failures_total{code="invalid_request"} 1.0' in text


@pytest.mark.parametrize(
    ("method", "path", "culprit"),
    [
        ("POST", "/v1/completions", "services.gateway.pipeline.Pipeline.completion"),
        ("GET", "/ready", "services.gateway.health.Health.report"),
    ],
    ids=["on the short way", "in the framework"],
)
async def test_defect_is_answered_in_openais_shape_and_counted_once(running, monkeypatch, method, path, culprit):
    def fail(*_):
        raise RuntimeError("a defect")

    monkeypatch.setattr(culprit, fail)
    reply = await running.http.request(method, path, json={"model": "pydoc-mini", "prompt": "hi"})
    error = assert_openai_error(reply, 500, InternalError.code)
    assert "a defect" not in error["message"]
    assert running.metric("tandem_request_failures_total") == 1
