"""Whatever is asked of any API: the same reply aggregated, disaggregated, and while the worker that makes it dies."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import dataclass, field, replace

import httpx
import pytest

from loadtest.fleet import Fleet
from tests.e2e.api_asks import ASKS, Ask, Target, generation, streamed_generation, unbatched
from tests.e2e.field_values import CHATS, COMPLETIONS, FILLER

REQUESTS = {
    **{f"completion-{name}": ("/v1/completions", {"prompt": FILLER, **COMPLETIONS[name]}) for name in COMPLETIONS},
    **{
        f"chat-{name}": ("/v1/chat/completions", {"messages": [{"role": "user", "content": FILLER}], **CHATS[name]})
        for name in CHATS
    },
}
STREAMED = ["completion-json", "completion-penalties", "completion-stop", "chat-required", "chat-scores"]
ALL: dict[str, Ask] = {
    **{name: generation(*request) for name, request in REQUESTS.items()},
    **{f"stream-{name}": streamed_generation(*REQUESTS[name]) for name in STREAMED},
    **ASKS,
}


def _api_of(name: str) -> str:
    return name.removeprefix("stream-").partition("-")[0]


APIS = {_api_of(name) for name in ALL}
ALONE = {"batches": unbatched}
"""What stands for the aggregated reply where an API has none of its own: batches are run by any gateway."""
MARKS = ("http_request_id", "grpc_request_id", "custom_id")
SHORT = 12
ROUNDS = 30  # at most; fast processors are done before anything happens to them


@dataclass
class Struck:
    """What came of one request.

    Attributes:
        aggregated: Its reply in aggregated serving, where nothing happened.
        replies: Those of disaggregated serving: where nothing happened, and of rounds in which a worker died.
        has_moved: It went on at another worker in one of them.
    """

    aggregated: object
    replies: list[object] = field(default_factory=list)
    has_moved: bool = False


@pytest.fixture(scope="module")
def struck(suite) -> dict[str, Struck]:
    return asyncio.run(_strike(suite))


async def _strike(suite) -> dict[str, Struck]:
    async with Fleet(suite.redis_url) as fleet, httpx.AsyncClient(timeout=120, limits=httpx.Limits()) as http:
        target = Target(http, suite.url, suite.grpc)
        calm = await _undisturbed(target, Target(http, suite.local_url, suite.local_grpc))
        give_up_s = time.monotonic() + 120
        for _ in range(ROUNDS):
            await fleet.until_ready(3)
            # Short ones are over before anything can happen to them, so more of them are asked.
            left = [name for name, seen in calm.items() if not seen.has_moved]
            names = left * max(1, min(8, 48 // len(left)))
            tasks = [asyncio.create_task(ALL[name](replace(target, name=name))) for name in names]
            if victim := await _busiest(fleet, min(SHORT, len(names) // 3), tasks):
                os.kill(victim.pid, signal.SIGKILL)
            for name, reply in zip(names, await asyncio.gather(*tasks), strict=True):
                calm[name].replies.append(reply)
            for name in _moved(suite):
                calm[name].has_moved = True
            if not _missing(calm) or time.monotonic() > give_up_s:
                break
        await fleet.until_ready(3)
        await fleet.until_free()
    return calm


async def _undisturbed(target: Target, local: Target) -> dict[str, Struck]:
    """Chats and completions are asked in aggregated serving only: other tests compare them with disaggregated."""
    aggregated = await asyncio.gather(*(ALONE.get(name, ask)(local) for name, ask in ALL.items()))
    calm = {name: Struck(reply) for name, reply in zip(ALL, aggregated, strict=True)}
    for name, reply in zip(ASKS, await asyncio.gather(*(ask(target) for ask in ASKS.values())), strict=True):
        calm[name].replies.append(reply)
    return calm


def _missing(struck: dict[str, Struck]) -> set[str]:
    """Requests that ought to have moved and did not: a few short ones may slip through, a whole API may not."""
    spared = {name for name, seen in struck.items() if not seen.has_moved}
    is_enough = len(spared) <= len(struck) // 5 and {_api_of(name) for name in set(struck) - spared} == APIS
    return set() if is_enough else spared


def _moved(suite) -> set[str]:
    """Names of requests that went on at another worker, by the gateway's log."""
    lines = [line for event in ("session_migrated", "embedding_moved") for line in suite.gateway_log(event)]
    names = {line[mark].partition(":")[0] for line in lines for mark in MARKS if mark in line}
    return names & set(ALL)


async def _busiest(fleet: Fleet, sequences: int, tasks: list[asyncio.Task]):
    """A decode worker as soon as it generates so many sequences, or as many as there will be; None if all is over."""
    deadline_s = time.monotonic() + 3
    while not all(task.done() for task in tasks):
        workers = [status for status in await fleet.statuses() if status.role == "decode" and status.running]
        busiest = max(workers, key=lambda status: status.running, default=None)
        if busiest and (busiest.running >= sequences or time.monotonic() > deadline_s):
            return busiest
        await asyncio.sleep(0.002)
    return None


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", ALL)
def test_replies_are_equal_in_every_mode(struck, name):
    seen = struck[name]
    assert seen.replies
    assert all(reply == seen.aggregated for reply in seen.replies)


def test_nearly_everything_was_really_struck(struck):
    assert _missing(struck) == set()
