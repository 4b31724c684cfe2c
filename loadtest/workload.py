"""Requests as people send them: log-normal lengths, some with a shared system prompt, some with a long context.

The means follow what was published of ShareGPT's conversations: about 215 prompt and 190 output tokens, long tails.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

TOPICS = (
    "json.dumps", "os.path.join", "re.compile", "itertools.chain", "functools.partial", "shutil.copytree",
    "random.shuffle", "math.gcd", "textwrap.fill", "pathlib.Path.glob", "collections.Counter", "heapq.heappush",
    "bisect.insort", "copy.deepcopy", "glob.glob", "hashlib.md5", "statistics.mean", "string.capwords",
    "subprocess.run", "tempfile.mkdtemp", "threading.Thread.join", "urllib.parse.quote", "zipfile.ZipFile.extract",
)  # fmt: skip

_FILLER = (
    "The report was read twice and filed. Every figure in it was taken from the log of the day before. "
    "Nobody asked for a second copy. The meeting began late and ended early, as meetings do when it rains. "
)

SHARED_SYSTEM_PROMPT = "You answer questions about the standard library of Python. " + _FILLER * 6


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One chat request.

    Attributes:
        kind: `short`, `shared` (a system prompt that many share) or `long` (a long private context).
        max_tokens: Output tokens; with `ignore_eos` exactly so many.
    """

    kind: str
    messages: list[dict[str, str]]
    max_tokens: int

    def body(self, model: str, *, stream: bool = True) -> dict[str, object]:
        """The JSON body for `/v1/chat/completions`."""
        body: dict[str, object] = {
            "model": model,
            "messages": self.messages,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
        }
        if stream:
            body["stream_options"] = {"include_usage": True}
        return body


def draw(rng: random.Random, *, output_tokens: int | None = None) -> ChatRequest:
    """Draws one request: half short chats, a third with the shared system prompt, the rest with a long document."""
    question = {"role": "user", "content": f"What does {rng.choice(TOPICS)} do?"}
    length = output_tokens or min(768, max(8, int(rng.lognormvariate(4.95, 0.75))))
    kind = rng.choices(("short", "shared", "long"), weights=(3, 2, 1))[0]
    if kind == "short":
        return ChatRequest(kind, [*_earlier_turns(rng), question], length)
    if kind == "shared":
        return ChatRequest(kind, [{"role": "system", "content": SHARED_SYSTEM_PROMPT}, question], length)
    sentences = min(60, max(8, int(rng.lognormvariate(3.0, 0.6))))
    document = f"Case {rng.randrange(10**9)}. " + _FILLER * (sentences // 4 + 1)
    return ChatRequest(kind, [{"role": "system", "content": document}, question], length)


def _earlier_turns(rng: random.Random) -> list[dict[str, str]]:
    turns: list[dict[str, str]] = []
    for _ in range(rng.randrange(4)):
        turns.append({"role": "user", "content": f"And what about {rng.choice(TOPICS)}?"})
        turns.append({"role": "assistant", "content": "It does what its name says."})
    return turns
