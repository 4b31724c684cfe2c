"""What the gateway itself costs: a real gateway and Redis, and a FAKE worker at the gRPC seam that answers at once.

    python -m loadtest.gateway_bench [--workers 1 2] [--streams 64] [--step-ms 10] [--tokens 200] [--prompts 100]

Nothing is computed behind the gateway, so these are no figures of serving a model. Added latency is the whole way of a
prompt of 4,000 tokens from the client to its first event, the fake worker's own time included, one after the other on
one connection, as clients keep theirs. The text's words are few and soon known to the gateway, as those of documents
about one matter are; a new one costs it some microseconds, and a text that is not ASCII is tokenized by the library,
which takes about four times as long. Tokens per gateway core are tokens over the CPU seconds of the gateway's
processes: cores that share their work with others slow the clock more than this figure. The worker takes one step for
all sequences at a time, as an engine does; `--step-ms 0`: as fast as it can.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import orjson
import psutil
import uvloop

from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from shared.directory.client import Directory
from shared.directory.records import WorkerLoad, WorkerRecord
from shared.directory.redis_server import RedisServer
from shared.identity import TOKEN_BYTES, Fingerprint, WorkerId, new_incarnation
from shared.rpc import bind_tcp, new_server

MODEL = "pydoc-mini"
PROMPT_TOKENS = 4000
MAX_MODEL_LEN = 16_384
WORD_IDS = range(300, 6000)
CONNECTIONS_AT_A_TIME = 32
WARM_UP = 10
LAST_CHUNK = b"0\r\n\r\n"


class FakeWorker(rpc.WorkerServicer):
    """Every session gets the tokens it asks for: one per step, no step but the first before `step_s` has passed."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s

    async def Generate(self, request_iterator, context):  # type: ignore[no-untyped-def]  # noqa: N802
        """Plays one gateway's sessions."""
        await anext(request_iterator)
        yield pb.StepOutput()
        sessions: dict[str, tuple[range, int, int]] = {}  # sequences, tokens left, prompt tokens
        fresh = asyncio.Event()
        reader = asyncio.create_task(self._read(request_iterator, sessions, fresh))
        step = 0
        try:
            while not reader.done():
                if not sessions:
                    fresh.clear()
                    await fresh.wait()
                yield self._step(sessions, step)
                step += 1
                with contextlib.suppress(TimeoutError):
                    fresh.clear()
                    await asyncio.wait_for(fresh.wait(), self._step_s)
        finally:
            reader.cancel()

    async def _read(self, commands, sessions, fresh) -> None:  # type: ignore[no-untyped-def]
        async for command in commands:
            if command.HasField("submit"):
                submit = command.submit
                sequences = range(submit.first_sequence, submit.first_sequence + submit.num_choices)
                prompt_tokens = len(submit.prompt_tokens) // TOKEN_BYTES
                sessions[submit.session_id] = (sequences, submit.sampling.max_tokens, prompt_tokens)
                fresh.set()
            elif command.HasField("abort"):
                sessions.pop(command.abort.session_id, None)

    @staticmethod
    def _step(sessions: dict[str, tuple[range, int, int]], step: int) -> pb.StepOutput:
        output, token_id = pb.StepOutput(), WORD_IDS[step * 7 % len(WORD_IDS)]
        for session_id, (sequences, left, prompt_tokens) in list(sessions.items()):
            output.sequences.extend(sequences)
            output.token_ids.extend([token_id] * len(sequences))
            if left > 1:
                sessions[session_id] = (sequences, left - 1, prompt_tokens)
                continue
            del sessions[session_id]
            for sequence in sequences:
                output.finishes.add(
                    sequence=sequence,
                    reason=pb.FINISH_REASON_LENGTH,
                    stop_token_id=-1,
                    prompt_tokens=prompt_tokens,
                    output_tokens=1,
                    timeline=pb.Timeline(mode="local"),
                )
        return output


async def serve_fake_worker(redis_url: str, step_s: float) -> None:
    """Until the process is ended."""
    server = new_server()
    rpc.add_WorkerServicer_to_server(FakeWorker(step_s), server)
    record = WorkerRecord(
        worker_id=WorkerId("decode-fake"),
        role="decode",
        model=MODEL,
        fingerprint=Fingerprint("fake"),
        incarnation=new_incarnation(),
        address=bind_tcp(server, "127.0.0.1", 0),
        pid=os.getpid(),
        block_size=16,
        max_model_len=MAX_MODEL_LEN,
        vocab_size=6144,
        block_bytes=4096,
        started_at=time.time(),
        load=WorkerLoad(total_blocks=100_000, free_blocks=100_000),
        ready=True,
    )
    await server.start()
    async with Directory(redis_url) as directory:
        await directory.announce(lambda: record)
        await asyncio.Event().wait()


@contextlib.contextmanager
def process(log_file: Path, *arguments: str, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """One of our processes, ended with the block."""
    with log_file.open("wb") as log:
        child = subprocess.Popen([sys.executable, *arguments], env={**os.environ, **settings}, stdout=log, stderr=log)
        try:
            yield child
        finally:
            child.terminate()
            child.wait(30)


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and its children so far."""
    root = psutil.Process(pid)
    times = [one.cpu_times() for one in (root, *root.children(recursive=True))]
    return sum(one.user + one.system for one in times)


async def wait_for(log_file: Path, count: int) -> str:
    """The gateway's URL once so many of its processes listen and the fake worker is known."""
    async with asyncio.timeout(60), httpx.AsyncClient() as client:
        while True:
            log = await asyncio.to_thread(log_file.read_text)
            urls = re.findall(r"http://127\.0\.0\.1:\d+", log)
            if len(urls) >= count:
                replies = [await client.get(f"{urls[-1]}/ready") for _ in range(4 * count)]
                if all(reply.status_code == 200 for reply in replies):
                    return urls[-1]
            await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def connection(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """To the gateway; for a client that costs little itself."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 20)
    try:
        yield reader, writer
    finally:
        writer.close()


def request(body: dict[str, object]) -> bytes:
    """As it is sent."""
    content = orjson.dumps(body)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: gateway\r\ncontent-length: {len(content)}\r\n\r\n"
    return head.encode() + content


async def events(url: str, body: dict[str, object]) -> AsyncIterator[bytes]:
    """What a streamed completion brings, piece by piece, on a connection of its own."""
    async with connection(url) as (reader, writer):
        writer.write(request(body))
        tail = b""
        while not tail.endswith(LAST_CHUNK) and (piece := await reader.read(1 << 16)):
            yield piece
            tail = (tail + piece)[-len(LAST_CHUNK) :]


async def first_event_s(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: dict[str, object]) -> float:
    """Seconds from sending to the first event, on a connection that is kept as clients keep theirs."""
    written = request(body)
    started = time.perf_counter()
    writer.write(written)
    await reader.readuntil(b"data: {")
    first_s = time.perf_counter() - started
    await reader.readuntil(LAST_CHUNK)
    return first_s


async def count_events(url: str, body: dict[str, object], room: asyncio.Semaphore) -> int:
    """Events of one stream."""
    count, tail = 0, b""
    async with room:
        stream = events(url, body)
        first = await anext(stream)
    count += first.count(b"data: {")
    async for piece in stream:
        count += (tail + piece).count(b"data: {")
        tail = piece[-6:]
    return count


@dataclass(frozen=True)
class PromptCost:
    """Of a streamed prompt, to its end after one token."""

    p50_ms: float
    cpu_ms: float


@dataclass(frozen=True)
class Figures:
    """Of one number of gateway processes."""

    workers: int
    ids: PromptCost
    text: PromptCost
    tokens: int
    wall_s: float
    gateway_cpu_s: float

    def as_json(self) -> dict[str, object]:
        """For people and for scripts."""
        return {
            "workers": self.workers,
            "added_latency_p50_ms_4k_token_ids": round(self.ids.p50_ms, 2),
            "added_latency_p50_ms_4k_text": round(self.text.p50_ms, 2),
            "gateway_cpu_ms_4k_token_ids": round(self.ids.cpu_ms, 2),
            "gateway_cpu_ms_4k_text": round(self.text.cpu_ms, 2),
            "tokens_per_gateway_core_s": round(self.tokens / self.gateway_cpu_s),
            "tokens_per_wall_s": round(self.tokens / self.wall_s),
            "gateway_cores_busy": round(self.gateway_cpu_s / self.wall_s, 2),
        }


def prompt_text() -> str:
    """About 4,000 tokens of documentation, as this model's tokenizer counts them."""
    from services.gateway.served_model import load_model
    from services.gateway.settings import GatewaySettings

    tokenizer = load_model(GatewaySettings(model=MODEL), created=1).tokenizer
    text = (contextlib.contextmanager.__doc__ or "") + (argparse.__doc__ or "") + (asyncio.wait_for.__doc__ or "")
    while len(tokenizer.encode(text, add_special_tokens=False)) < PROMPT_TOKENS:
        text += text
    words = text.split(" ")
    while len(tokenizer.encode(" ".join(words), add_special_tokens=False)) > PROMPT_TOKENS:
        words = words[: len(words) * 99 // 100]
    return " ".join(words)


async def prompt_cost(url: str, gateway_pid: int, bodies: list[dict[str, object]]) -> PromptCost:
    """Of one after the other; the first ones find caches cold and do not count."""
    async with connection(url) as ends:
        for body in bodies[:WARM_UP]:
            await first_event_s(*ends, body)
        before, counted = cpu_s(gateway_pid), bodies[WARM_UP:]
        timings = [await first_event_s(*ends, body) for body in counted]
    return PromptCost(statistics.median(timings) * 1e3, (cpu_s(gateway_pid) - before) / len(counted) * 1e3)


async def measure(url: str, gateway_pid: int, workers: int, text: str, options: argparse.Namespace) -> Figures:
    """Latency alone first, then streams together."""
    rng = random.Random(7)
    single = {"model": MODEL, "max_tokens": 1, "stream": True, "temperature": 0, "ignore_eos": True}
    numbers = range(options.prompts + WARM_UP)
    ids = await prompt_cost(
        url, gateway_pid, [{**single, "prompt": rng.choices(WORD_IDS, k=PROMPT_TOKENS)} for _ in numbers]
    )
    texts = await prompt_cost(url, gateway_pid, [{**single, "prompt": f"{number} {text}"} for number in numbers])
    body = {**single, "prompt": "hi", "max_tokens": options.tokens}
    room = asyncio.Semaphore(CONNECTIONS_AT_A_TIME)
    before, started = cpu_s(gateway_pid), time.perf_counter()
    counts = await asyncio.gather(*(count_events(url, body, room) for _ in range(options.streams)))
    wall_s, used_s = time.perf_counter() - started, cpu_s(gateway_pid) - before
    if min(counts) < options.tokens // 4:
        raise RuntimeError(f"streams ended early: {min(counts)} events of {options.tokens} tokens")
    tokens = options.tokens * options.streams
    return Figures(workers, ids, texts, tokens, wall_s, used_s)


def run(options: argparse.Namespace) -> list[Figures]:
    """One gateway after the other, each on a Redis of its own."""
    text, figures = prompt_text(), []
    for workers in options.workers:
        with tempfile.TemporaryDirectory() as name, RedisServer() as redis:
            directory = Path(name)
            redis_url = redis.start(directory)
            fake = ("-m", "loadtest.gateway_bench", "--serve-fake-worker", redis_url, "--step-ms", str(options.step_ms))
            settings = {"PORT": "0", "REDIS_URL": redis_url, "MODEL": MODEL, "WORKERS": str(workers)}
            environment = {f"TANDEM_GATEWAY_{setting}": value for setting, value in settings.items()}
            gateway_log = directory / "gateway.log"
            with (
                process(directory / "worker.log", *fake),
                process(gateway_log, "-m", "services.gateway", **environment) as gateway,
            ):
                url = uvloop.run(wait_for(gateway_log, workers))
                figures.append(uvloop.run(measure(url, gateway.pid, workers, text, options)))
    return figures


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="gateway processes, one bench each")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200, help="per stream")
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--prompts", type=int, default=100, help="of 4,000 tokens each, as ids and as text")
    parser.add_argument("--serve-fake-worker", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_fake_worker:
        uvloop.run(serve_fake_worker(options.serve_fake_worker, options.step_ms / 1e3))
        return
    print(json.dumps([one.as_json() for one in run(options)], indent=2))


if __name__ == "__main__":
    main()
