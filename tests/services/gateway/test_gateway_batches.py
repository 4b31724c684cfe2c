"""OpenAI's Files and Batch APIs with OpenAI's client: results on disk, state in a real Redis."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

from services.gateway.batches.lines import ResultFile
from services.gateway.batches.records import WINDOWS
from shared.errors import CapacityExceeded, Overloaded


def line(custom_id, endpoint="/v1/completions", **fields):
    body = {"model": "pydoc-mini", "prompt": f"prompt {custom_id}", "max_tokens": 8, **fields}
    return {"custom_id": custom_id, "method": "POST", "url": endpoint, "body": body}


async def upload(running, lines):
    content = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines).encode()
    return await running.openai.files.create(file=("input.jsonl", content), purpose="batch")


async def create(running, lines, endpoint="/v1/completions"):
    file = await upload(running, lines)
    return await running.openai.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"a": "b"}
    )


async def ended(running, batch_id, *statuses):
    async with asyncio.timeout(30):
        while (batch := await running.openai.batches.retrieve(batch_id)).status not in statuses:
            await asyncio.sleep(0.03)
    return batch


async def results(running, file_id):
    text = (await running.openai.files.content(file_id)).text
    return {one["custom_id"]: one for one in map(json.loads, text.splitlines())}


@pytest.fixture
def start(start_gateway, tmp_path):
    """A gateway that looks for batches often, and keeps its files here."""
    return lambda **settings: start_gateway(
        **{"files_dir": tmp_path / "files", "batch_poll_s": 0.05, "background_alive_s": 0.5, **settings}
    )


async def test_files_are_kept_listed_and_forgotten(start):
    async with start() as running:
        files = running.openai.files
        first = await files.create(file=("a.jsonl", b'{"a": 1}\n'), purpose="batch")
        second = await files.create(file=("b.jsonl", b"x" * 1000), purpose="user_data")
        assert (first.filename, first.bytes, first.purpose) == ("a.jsonl", 9, "batch")
        assert (await files.content(first.id)).content == b'{"a": 1}\n'
        assert await files.retrieve(second.id) == second
        assert {file.id async for file in files.list()} == {first.id, second.id}
        assert [file.id async for file in files.list(purpose="batch")] == [first.id]
        assert (await files.delete(first.id)).deleted
        for file_id in (first.id, "file-nope", "..%2F..%2Fetc%2Fpasswd"):
            with pytest.raises(openai.NotFoundError):
                await files.retrieve(file_id)


async def test_uploads_that_cannot_be_kept_say_why(start):
    async with start(max_file_bytes=1 << 20) as running:
        for purpose, content, status in (("fine-tune", b"a", 400), ("batch", b"a" * (2 << 20), 413)):
            with pytest.raises(openai.APIStatusError) as caught:
                await running.openai.files.create(file=("a", content), purpose=purpose)
            assert caught.value.status_code == status
        reply = await running.http.post("/v1/files", data={"purpose": "batch"})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "file")
        no_form = {"content": b"a", "headers": {"content-type": "multipart/form-data; boundary=b"}}
        reply = await running.http.post("/v1/files", **no_form)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_request")
        assert "the form cannot be read" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "60"}, "expires_after.seconds"),
        ({"expires_after[anchor]": "last_active_at", "expires_after[seconds]": "3600"}, "expires_after.anchor"),
        ({"expires_after": "soon"}, "expires_after"),
        ({"bananas": "1"}, "bananas"),
    ],
)
async def test_wrong_fields_of_an_upload_are_named(start, fields, param):
    async with start() as running:
        form = {"files": {"file": ("a", b"a")}, "data": {"purpose": "batch", **fields}}
        reply = await running.http.post("/v1/files", **form)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
        assert not list(running.gateway.settings.files_dir.glob("file-*"))


async def test_files_and_results_go_when_they_were_told_to(start):
    async with start() as running:
        until = {"anchor": "created_at", "seconds": 7200}
        content = json.dumps(line("a")).encode()
        file = await running.openai.files.create(file=("a", content), purpose="batch", expires_after=until)
        assert file.expires_at - file.created_at == 7200
        batch = await running.openai.batches.create(
            input_file_id=file.id,
            endpoint="/v1/completions",
            completion_window="24h",
            output_expires_after={**until, "seconds": 3600},
        )
        batch = await ended(running, batch.id, "completed")
        output = await running.openai.files.retrieve(batch.output_file_id)
        assert output.expires_at - output.created_at == 3600


async def test_expired_files_are_gone(start):
    async with start(file_ttl_s=1) as running:
        file = await upload(running, [line("a")])
        await asyncio.sleep(1.1)
        with pytest.raises(openai.NotFoundError):
            await running.openai.files.retrieve(file.id)
        assert not list(running.gateway.settings.files_dir.glob("file-*"))


async def test_a_batch_answers_every_request_at_low_priority(start, text_ids):
    async with start() as running:
        running.worker.script.token_ids = text_ids("ok")
        batch = await create(running, [line("a"), line("b", n=2), line("c", temperature=5.0)])
        assert (batch.status, batch.metadata) == ("validating", {"a": "b"})
        batch = await ended(running, batch.id, "completed")
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (3, 2, 1)
        good = await results(running, batch.output_file_id)
        assert good["a"]["response"]["body"]["choices"][0]["text"] == "ok"
        assert len(good["b"]["response"]["body"]["choices"]) == 2
        bad = await results(running, batch.error_file_id)
        assert bad["c"]["response"]["status_code"] == 400
        assert "temperature" in bad["c"]["response"]["body"]["error"]["message"]
        assert {submit.priority for submit in running.worker.submits} == {1000}
        assert [one.id async for one in running.openai.batches.list()] == [batch.id]


@pytest.mark.parametrize(
    ("endpoint", "body", "where"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}, "choices"),
        ("/v1/embeddings", {"input": "hi"}, "data"),
        ("/v1/responses", {"input": "hi"}, "output"),
    ],
)
async def test_other_endpoints_run_in_batches_too(start, endpoint, body, where):
    async with start() as running:
        one = {"custom_id": "a", "method": "POST", "url": endpoint, "body": {"model": "pydoc-mini", **body}}
        batch = await ended(running, (await create(running, [one], endpoint)).id, "completed", "failed")
        [result] = (await results(running, batch.output_file_id)).values()
        assert result["response"]["body"][where]


async def test_an_input_that_cannot_be_run_fails_the_batch_line_by_line(start):
    wrong = [
        ("{", "invalid_json_line"),
        ("[]", "invalid_json_line"),
        (line("a"), "duplicate_custom_id"),
        (line("b", "/v1/embeddings"), "url_mismatch"),
        (line("c") | {"method": "GET"}, "invalid_method"),
        (line("d") | {"custom_id": 5}, "invalid_request"),
        (line("e") | {"body": "x"}, "invalid_request"),
        (line("f", stream=True), "invalid_request"),
        (line("g") | {"priority": 1}, "invalid_request"),
        (line("h", prompt="x" * 5000), "request_too_large"),
    ]
    async with start(max_body_bytes=4096) as running:
        batch = await create(running, [line("a"), *(sent for sent, _ in wrong), "", line("z")])
        batch = await ended(running, batch.id, "failed")
        assert [(error.line, error.code) for error in batch.errors.data] == [
            (number, code) for number, (_, code) in enumerate(wrong, start=2)
        ]
        assert "4096" in batch.errors.data[-1].message
        assert (batch.output_file_id, batch.request_counts.total) == (None, 0)
        assert not running.worker.submits


@pytest.mark.parametrize("content", [b"", b"\n \n"])
async def test_a_file_without_requests_fails_the_batch(start, content):
    async with start() as running:
        file = await running.openai.files.create(file=("a.jsonl", content), purpose="batch")
        make = running.openai.batches.create
        batch = await make(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        batch = await ended(running, batch.id, "failed")
        [error] = batch.errors.data
        assert (error.code, error.param, error.line) == ("empty_file", "input_file_id", None)


async def test_a_batch_that_is_refused_says_why(start):
    async with start(max_batch_requests=2) as running:
        file = await upload(running, [line(str(i)) for i in range(3)])
        make = running.openai.batches.create
        for change, told in (
            ({"endpoint": "/v1/nope"}, "endpoint"),
            ({"completion_window": "1h"}, "given 24h"),
            ({"metadata": {"a" * 65: "b"}}, "65"),
        ):
            arguments = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h", **change}
            with pytest.raises(openai.BadRequestError, match=told):
                await make(**arguments)
        with pytest.raises(openai.NotFoundError) as missing:
            await make(input_file_id="file-nope", endpoint="/v1/completions", completion_window="24h")
        assert missing.value.param == "input_file_id"
        batch = await make(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        assert "more than 2" in (await ended(running, batch.id, "failed")).errors.data[0].message


async def test_cancelling_keeps_what_is_done(start, text_ids):
    async with start(batch_concurrency=2) as running:
        running.worker.script.hold_prompt = text_ids("prompt held")
        batch = await create(running, [line("a"), line("held"), line("b")])
        async with asyncio.timeout(30):
            while (await running.openai.batches.retrieve(batch.id)).request_counts.completed < 2:
                await asyncio.sleep(0.02)
        assert (await running.openai.batches.cancel(batch.id)).status == "cancelling"
        batch = await ended(running, batch.id, "cancelled")
        assert set(await results(running, batch.output_file_id)) == {"a", "b"}
        await running.worker.wait_for(lambda: running.worker.aborts)
        with pytest.raises(openai.BadRequestError, match="cancelled"):
            await running.openai.batches.cancel(batch.id)


async def test_what_is_not_done_in_the_window_expires(start, text_ids, monkeypatch):
    monkeypatch.setitem(WINDOWS, "24h", 4.0)
    async with start() as running:
        running.worker.script.hold_prompt = text_ids("prompt held")
        batch = await create(running, [line("a"), line("held")])
        batch = await ended(running, batch.id, "expired")
        assert set(await results(running, batch.output_file_id)) == {"a"}
        late = (await results(running, batch.error_file_id))["held"]
        assert (late["response"], late["error"]["code"]) == (None, "batch_expired")


async def test_a_full_engine_delays_and_never_fails_a_request(start):
    async with start() as running:
        running.worker.script.failure = Overloaded("full")
        batch = await create(running, [line("a")])
        await running.worker.wait_for(lambda: running.worker.submits)
        running.worker.script.failure = None
        assert (await ended(running, batch.id, "completed")).request_counts.completed == 1


async def test_a_restarted_gateway_goes_on_where_the_last_one_was(start, text_ids):
    async with start() as first:
        first.worker.script.hold_prompt = text_ids("prompt held")
        batch = await create(first, [line("a"), line("held"), line("bad", temperature=5.0)])
        async with asyncio.timeout(30):
            while (await first.openai.batches.retrieve(batch.id)).request_counts.completed < 1:
                await asyncio.sleep(0.02)
        first.worker.script.failure = CapacityExceeded("never asked again")
    async with start() as second:
        batch = await ended(second, batch.id, "completed")
        assert set(await results(second, batch.output_file_id)) == {"a", "held"}
        assert set(await results(second, batch.error_file_id)) == {"bad"}
        assert len(second.worker.submits) == 1


def test_a_line_that_a_crash_cut_off_is_forgotten(tmp_path):
    path = tmp_path / "results"
    path.write_bytes(b'{"custom_id": "a"}\n{"custom_id": "b"')
    file = ResultFile(path)
    assert file.done == {"a"}
    file.add("b", b'{"custom_id": "b"}\n')
    file.close()
    assert ResultFile(path).done == {"a", "b"}
