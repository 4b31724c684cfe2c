"""A gateway in this process, between a real Redis and fake workers: real gRPC servers with scripted tokens."""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import openai
import pytest

from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from services.gateway.app import create_app
from services.gateway.assembly import assemble
from services.gateway.served_model import load_model
from services.gateway.server import HttpServer, address_of, bind
from services.gateway.settings import GatewaySettings
from shared.directory.client import Directory
from shared.directory.records import WorkerLoad, WorkerRecord
from shared.errors import StaleIncarnation, TandemError
from shared.identity import Fingerprint, WorkerId, new_incarnation, unpack_tokens
from shared.rpc import bind_tcp, new_server

MODEL_DIR = Path("shared/assets/pydoc-mini")
EOS = 3


@dataclass
class Script:
    """What a fake worker does with a session.

    Attributes:
        token_ids: Of every choice; the fake appends the end-of-sequence token and stops, unless max_tokens comes first.
        step_s: Pause between steps.
        tokens_per_step: Tokens of each choice in one message.
        failure: Fails the session with this instead.
        die_after: Ends the stream without a word after so many tokens of a choice.
        give_up_after: Hands the session back after so many tokens of a choice, as a draining worker does.
        cached_tokens: Reported when the session starts.
        hold: Sends nothing until the session is aborted.
        hangs: Likewise, and answers no call either.
        hold_prompt: Likewise, for sessions with this prompt.
        answers_abort: Sends a last word on choices that were aborted one by one.
    """

    token_ids: list[int] = field(default_factory=lambda: [300, 301, 302])
    step_s: float = 0.0
    tokens_per_step: int = 1
    failure: TandemError | None = None
    die_after: int | None = None
    give_up_after: int | None = None
    cached_tokens: int | None = None
    hold: bool = False
    hangs: bool = False
    hold_prompt: list[int] | None = None
    answers_abort: bool = True


class FakeWorker(rpc.WorkerServicer):
    """One decode worker: records what it was asked, plays its script."""

    def __init__(self, worker_id: str = "decode-0") -> None:
        self.script = Script()
        self.submits: list[pb.Submit] = []
        self.aborts: list[pb.Abort] = []
        self.embeds: list[pb.EmbedRequest] = []
        self.hellos: list[pb.Hello] = []
        self.record = WorkerRecord(
            worker_id=WorkerId(worker_id),
            role="decode",
            model="pydoc-mini",
            fingerprint=Fingerprint("fp"),
            incarnation=new_incarnation(),
            address="",
            pid=1,
            block_size=16,
            max_model_len=1024,
            vocab_size=6144,
            block_bytes=4096,
            started_at=1.0,
            load=WorkerLoad(total_blocks=100, free_blocks=100),
            ready=True,
        )
        self._server = None
        self._plays: dict[str, asyncio.Task] = {}
        self._aborted: dict[str, set[int]] = {}

    async def start(self) -> None:
        self._server = new_server()
        rpc.add_WorkerServicer_to_server(self, self._server)
        self.record = replace(self.record, address=bind_tcp(self._server, "127.0.0.1", 0))
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    async def wait_for(self, condition, timeout_s: float = 20.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.005)

    async def Embed(self, request, context):
        """Vectors that tell the input: its length, its first token, then zeros."""
        self.embeds.append(request)
        if self.script.hangs:
            await asyncio.Event().wait()
        if self.script.failure is not None:
            raise self.script.failure
        size = request.dimensions or 256
        rows = [[len(i.token_ids), i.token_ids[0], *[0] * (size - 2)] for i in request.inputs]
        return pb.EmbedReply(size=size, vectors=array("f", [x for row in rows for x in row]).tobytes())

    async def Status(self, request, context):
        """For whoever wonders why nothing comes."""
        if self.script.hangs:
            await asyncio.Event().wait()
        return pb.StatusReply()

    async def Generate(self, request_iterator, context):
        hello = (await anext(request_iterator)).hello
        self.hellos.append(hello)
        if hello.incarnation != self.record.incarnation:
            raise StaleIncarnation("the call meant an earlier life")
        outputs: asyncio.Queue = asyncio.Queue()
        reader = asyncio.create_task(self._read(request_iterator, outputs))
        yield pb.StepOutput()
        try:
            while (output := await outputs.get()) is not None:
                yield output
        finally:
            reader.cancel()
            for play in self._plays.values():
                play.cancel()

    async def _read(self, commands, outputs) -> None:
        async for command in commands:
            if command.HasField("submit"):
                self.submits.append(command.submit)
                self._aborted[command.submit.session_id] = set()
                play = asyncio.create_task(self._play(command.submit, outputs))
                self._plays[command.submit.session_id] = play
            elif command.HasField("abort"):
                self.aborts.append(command.abort)
                if command.abort.sequences:
                    self._aborted[command.abort.session_id].update(command.abort.sequences)
                elif play := self._plays.get(command.abort.session_id):
                    play.cancel()

    async def _play(self, submit: pb.Submit, outputs: asyncio.Queue) -> None:
        script = self.script
        if script.failure is not None:
            failure = pb.Failure(session_id=submit.session_id, code=script.failure.code, message=script.failure.message)
            outputs.put_nowait(pb.StepOutput(failures=[failure]))
            return
        if script.hold or script.hangs or unpack_tokens(submit.prompt_tokens) == script.hold_prompt:
            await asyncio.Event().wait()
        resumed = submit.resumed or [pb.ResumedChoice()] * submit.num_choices
        numbers = {submit.first_sequence + c: choice for c, choice in enumerate(resumed) if not choice.is_finished}
        choices = {number: self._tokens(submit) for number in numbers}
        sent = {number: len(choice.output_token_ids) for number, choice in numbers.items()}
        if script.cached_tokens is not None:
            started = pb.Started(session_id=submit.session_id, cached_tokens=script.cached_tokens)
            outputs.put_nowait(pb.StepOutput(started=[started]))
        while choices:
            await asyncio.sleep(script.step_s)
            output = pb.StepOutput()
            for sequence, tokens in list(choices.items()):
                if sequence in self._aborted[submit.session_id]:
                    if script.answers_abort:
                        self._finish(output, sequence, pb.FINISH_REASON_ABORT, submit, sent[sequence])
                    del choices[sequence]
                    continue
                for token_id in tokens[sent[sequence] : sent[sequence] + script.tokens_per_step]:
                    self._add(output, sequence, token_id, submit)
                    sent[sequence] += 1
                if sent[sequence] == len(tokens):
                    reason = pb.FINISH_REASON_STOP if tokens[-1] == EOS else pb.FINISH_REASON_LENGTH
                    self._finish(output, sequence, reason, submit, sent[sequence])
                    del choices[sequence]
            outputs.put_nowait(output)
            if script.give_up_after is not None and max(sent.values()) >= script.give_up_after:
                failure = pb.Failure(session_id=submit.session_id, code="worker_draining", message="draining")
                outputs.put_nowait(pb.StepOutput(failures=[failure]))
                return
            if script.die_after is not None and max(sent.values()) >= script.die_after:
                outputs.put_nowait(None)
                return

    def _tokens(self, submit: pb.Submit) -> list[int]:
        return [*self.script.token_ids, EOS][: submit.sampling.max_tokens]

    def _add(self, output, sequence, token_id, submit) -> None:
        if submit.sampling.HasField("num_logprobs"):
            tops = [token_id, 290, 291, 292][: submit.sampling.num_logprobs]
            output.logprobs.append(
                pb.TokenLogprobs(
                    index=len(output.token_ids),
                    logprob=-0.5,
                    top_token_ids=tops,
                    top_logprobs=[-0.5 - i for i in range(len(tops))],
                )
            )
        output.sequences.append(sequence)
        output.token_ids.append(token_id)

    def _finish(self, output, sequence, reason, submit, num_tokens) -> None:
        output.finishes.append(
            pb.Finish(
                sequence=sequence,
                reason=reason,
                stop_token_id=EOS if reason == pb.FINISH_REASON_STOP else -1,
                prompt_tokens=len(unpack_tokens(submit.prompt_tokens)),
                cached_tokens=16,
                output_tokens=num_tokens,
                timeline=pb.Timeline(mode="local", first_token_s=0.25, local_blocks=1),
            )
        )


@pytest.fixture
def fake_prefill_record():
    """The record of a prefill worker that nobody calls."""
    return replace(FakeWorker("prefill-0").record, role="prefill", incarnation="prefill-life", address="127.0.0.1:1")


class RunningGateway:
    """The gateway under test and its clients."""

    def __init__(self, url: str, gateway, workers: dict[str, FakeWorker]) -> None:
        self.url = url
        self.gateway = gateway
        self.workers = workers
        self.http = httpx.AsyncClient(base_url=url, timeout=20, verify=False)  # loading certificates is slow
        self.openai = openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20, http_client=self.http
        )

    @property
    def worker(self) -> FakeWorker:
        return next(iter(self.workers.values()))

    @property
    def open_sessions(self) -> int:
        """Sessions that the gateway has at its workers."""
        return sum(self.gateway.health.workers.snapshot().open_sessions.values())

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels."""
        lines = self.gateway.metrics.exposition()[0].decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.partition("{")[0].partition(" ")[0] == name)


@pytest.fixture(scope="session")
def served_model():
    """The bundled checkpoint as a gateway sees it."""
    return load_model(GatewaySettings(model=str(MODEL_DIR)), created=1)


@pytest.fixture(scope="session")
def model_files(served_model):
    """Its tokenizer."""
    return served_model.tokenizer


@pytest.fixture
def text_ids(model_files):
    """`text_ids("some text")`: its token ids."""
    return lambda text: model_files.encode(text, add_special_tokens=False)


@pytest.fixture
def start_gateway(fresh_redis_url, served_model):
    """`async with start_gateway(num_workers=1, **settings) as running`: one gateway and its fake workers."""

    @contextlib.asynccontextmanager
    async def start(num_workers: int = 1, others: tuple = (), model_override=None, **overrides):
        defaults = {"model": str(MODEL_DIR), "redis_url": fresh_redis_url, "port": 0, "worker_wait_s": 2.0}
        settings = GatewaySettings(**{**defaults, **overrides})
        workers = {f"decode-{i}": FakeWorker(f"decode-{i}") for i in range(num_workers)}
        async with contextlib.AsyncExitStack() as stack:
            directory = await stack.enter_async_context(Directory(settings.redis_url, heartbeat_s=0.2))
            for worker in workers.values():
                await worker.start()
                stack.push_async_callback(worker.stop)
                await directory.announce(lambda worker=worker: worker.record)
            for record in others:
                await directory.announce(lambda record=record: record)
            # A busy machine may take longer than a request in production would wait.
            watched = await stack.enter_async_context(
                Directory(settings.redis_url, heartbeat_s=0.2, lookup_timeout_s=2.0)
            )
            gateway = await stack.enter_async_context(
                assemble(settings, model_override or served_model, watched, "gateway-test")
            )
            listener = stack.enter_context(bind("127.0.0.1", 0))
            stop = asyncio.Event()
            server = HttpServer(create_app(gateway), drain_s=1, last_requests_s=0)
            serving = asyncio.create_task(server.serve_until(listener, stop))
            running = RunningGateway(f"http://{address_of(listener, '127.0.0.1')}", gateway, workers)
            try:
                async with asyncio.timeout(30):
                    while len(gateway.health.report()["decode_workers"]) < num_workers:
                        await asyncio.sleep(0.02)
                yield running
            finally:
                await running.http.aclose()
                stop.set()
                await serving

    return start


@pytest.fixture
async def running(start_gateway):
    """A gateway with one fake decode worker."""
    async with start_gateway() as gateway:
        yield gateway
