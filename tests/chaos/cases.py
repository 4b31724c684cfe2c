"""Requests whose answers are known: each is asked once of an undisturbed suite, and must be answered so ever after."""

from __future__ import annotations

import asyncio
import json
import random
from collections import defaultdict
from dataclasses import dataclass, field

import httpx

MODEL = "pydoc-mini"
TEXT = (
    "The report was read twice and filed. Every figure in it was taken from the log of the day before. Nobody asked "
    "for a second copy. The meeting began late and ended early, as meetings do when it rains. "
)


@dataclass(frozen=True)
class Case:
    """A completion request without its cache salt."""

    name: str
    body: dict
    is_long: bool


@dataclass
class Answer:
    """What a client saw; `outcome` is "answered", "error" (with `code`), "left" or "broken"."""

    outcome: str = "broken"
    code: str = ""
    text: dict = field(default_factory=lambda: defaultdict(str))
    logprobs: dict = field(default_factory=lambda: defaultdict(list))
    finish: dict = field(default_factory=dict)
    usage: dict = field(default_factory=dict)
    migrations: int = 0
    num_replies: int = 0

    def same_as(self, other: Answer) -> bool:
        """Whether the client got the same, byte by byte."""
        parts = ("text", "logprobs", "finish")
        same_usage = all(self.usage[k] == other.usage[k] for k in ("prompt_tokens", "completion_tokens"))
        return same_usage and all(dict(getattr(self, part)) == dict(getattr(other, part)) for part in parts)


LONG_EVERY = 7
"""Every so many-th case is long, and lives through a fault; the others are short, so that many are served."""
LONG_SHARE = 0.05
"""Of the requests: one that is long costs as much as ten."""


def make_cases(count: int, seed: int = 0) -> list[Case]:
    """Short and long prompts, greedy and drawn, choices, stop strings, penalties, logprobs."""
    rng = random.Random(seed)
    cases = []
    for number in range(count):
        is_long = number % LONG_EVERY == LONG_EVERY - 1
        text = TEXT * rng.choice([2, 8, 20]) if is_long else TEXT[: rng.randrange(len(TEXT) // 2)]
        body = {
            "model": MODEL,
            "prompt": f"Case {rng.randrange(8)}. {text}",
            "max_tokens": rng.choice([24, 64, 160] if is_long else [1, 2, 4, 10]),
            "temperature": 0,
            "ignore_eos": True,
        }
        match number % 4:
            case 1:
                body |= {"temperature": 0.9, "seed": number, "top_p": 0.95}
            case 2:
                body |= {"temperature": 1.0, "seed": number, "n": 3, "presence_penalty": 0.5, "repetition_penalty": 1.1}
            case 3:
                body |= {"temperature": 0.8, "seed": number, "stop": ["the", "of a"], "logprobs": 1}
                body["min_tokens"] = min(6, body["max_tokens"])
        cases.append(Case(f"case-{number}", body, is_long))
    return cases


def draw(cases: list[Case], rng: random.Random) -> Case:
    """One to ask next."""
    is_long = rng.random() < LONG_SHARE
    return rng.choice([case for case in cases if case.is_long is is_long])


async def ask(
    client: httpx.AsyncClient, case: Case, salt: str, *, stream: bool = True, leave_after_s: float = 0.0
) -> Answer:
    """Reads the reply to a case to its end, or leaves."""
    answer = Answer()
    body = {**case.body, "timing": True, "cache_salt": salt}
    try:
        async with asyncio.timeout(leave_after_s or None):
            await (_read_stream if stream else _read_whole)(client, body, answer)
    except TimeoutError:
        answer.outcome = "left"
    except httpx.HTTPError as exc:
        answer.outcome, answer.code = "broken", type(exc).__name__
    return answer


async def _read_whole(client: httpx.AsyncClient, body: dict, answer: Answer) -> None:
    reply = await client.post("/v1/completions", json=body)
    answer.num_replies += 1
    if reply.status_code != 200:
        answer.outcome, answer.code = "error", reply.json()["error"]["code"]
        return
    _take(reply.json(), answer)
    answer.outcome = "answered"


async def _read_stream(client: httpx.AsyncClient, body: dict, answer: Answer) -> None:
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json=body) as stream:
        if stream.status_code != 200:
            answer.num_replies += 1
            answer.outcome, answer.code = "error", json.loads(await stream.aread())["error"]["code"]
            return
        async for line in stream.aiter_lines():
            if line == "data: [DONE]":
                answer.num_replies += 1
                answer.outcome = answer.outcome if answer.outcome == "error" else "answered"
            elif line.startswith("data: "):
                _take(json.loads(line[6:]), answer)


def _take(event: dict, answer: Answer) -> None:
    if error := event.get("error"):
        answer.outcome, answer.code = "error", error["code"]
    answer.usage = event.get("usage") or answer.usage
    if timing := event.get("timing"):
        answer.migrations = sum(len(session["migrations"]) for session in timing["sessions"])
    for choice in event.get("choices", ()):
        answer.text[choice["index"]] += choice["text"]
        if choice.get("logprobs"):
            answer.logprobs[choice["index"]] += choice["logprobs"]["tokens"]
        if choice["finish_reason"]:
            answer.finish[choice["index"]] = choice["finish_reason"], choice["stop_reason"]
