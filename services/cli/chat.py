"""`tandem chat`: a conversation with a running cluster, streamed, over the same HTTP that any client uses."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import httpx
from rich.console import Console
from rich.markup import escape

from shared.errors import Unavailable

_CONNECT_TIMEOUT_S = 5.0
_HELP = "Ctrl-C stops an answer, /reset forgets the conversation, /exit or Ctrl-D leaves"


@dataclass(slots=True)
class Conversation:
    """The messages so far, and how to ask for the next; a model of "" is the first one served."""

    url: str
    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)

    def reset(self) -> None:
        """Back to the system prompt."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def body(self) -> dict[str, object]:
        """The request."""
        body: dict[str, object] = {"model": self.model, "messages": self.messages, "stream": True}
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        if self.temperature is not None:
            body["temperature"] = self.temperature
        return body


def deltas(lines: Iterable[str]) -> Iterator[str]:
    """The pieces of text in a stream of server-sent events.

    Raises:
        Unavailable: The stream carries an error.
    """
    for line in lines:
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or not data:
            continue
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise Unavailable(_message(event))
        for choice in event.get("choices", ()):
            if text := choice.get("delta", {}).get("content"):
                yield text


def ask(client: httpx.Client, conversation: Conversation, question: str) -> Iterator[str]:
    """Yields the answer as it comes and adds both to the conversation; a broken-off answer is kept as far as it came.

    Raises:
        Unavailable: The gateway cannot be reached, refuses, or breaks off.
    """
    conversation.messages.append({"role": "user", "content": question})
    answer: list[str] = []
    try:
        with client.stream("POST", f"{conversation.url}/v1/chat/completions", json=conversation.body()) as reply:
            if reply.status_code != 200:
                reply.read()
                raise Unavailable(_refusal(reply))
            for text in deltas(reply.iter_lines()):
                answer.append(text)
                yield text
    except httpx.HTTPError as exc:
        raise _unreachable(conversation.url, exc) from exc
    finally:
        if answer:
            conversation.messages.append({"role": "assistant", "content": "".join(answer)})
        else:
            conversation.messages.pop()


def first_model(client: httpx.Client, url: str) -> str:
    """The model that the gateway serves.

    Raises:
        Unavailable: It cannot be asked.
    """
    try:
        reply = client.get(f"{url}/v1/models", timeout=_CONNECT_TIMEOUT_S)
        return str(reply.raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError) as exc:
        raise _unreachable(url, exc) from exc


def chat(conversation: Conversation, console: Console, *, once: str = "", api_key: str = "") -> None:
    """Talks until the user leaves, or asks one question.

    Raises:
        Unavailable: Only with `once` or if the gateway cannot be asked for its model; otherwise errors are printed.
    """
    conversation.reset()
    # An answer may take long to come and is not bounded in length; only connecting is.
    timeout = httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S)
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    with httpx.Client(timeout=timeout, trust_env=False, headers=headers) as client:
        conversation.model = conversation.model or first_model(client, conversation.url)
        if once:
            _print_answer(client, conversation, once, console)
            return
        console.print(f"[bold]{escape(conversation.model)}[/] at {conversation.url}\n[dim]{_HELP}[/]", highlight=False)
        while (line := _read_line(console)) is not None:
            if line == "/reset":
                conversation.reset()
            elif line:
                _answer_interactively(client, conversation, line, console)


def _read_line(console: Console) -> str | None:
    try:
        line = console.input("\n[bold cyan]>[/] ").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None
    return None if line in ("/exit", "/quit") else line


def _answer_interactively(client: httpx.Client, conversation: Conversation, line: str, console: Console) -> None:
    started_s = time.monotonic()
    try:
        first_s, pieces = _print_answer(client, conversation, line, console)
    except KeyboardInterrupt:
        console.print("[dim] (stopped)[/]")
    except Unavailable as exc:
        console.print(f"[red]{escape(exc.message)}[/]", highlight=False)
    else:
        total_s = time.monotonic() - started_s
        console.print(f"[dim]{pieces} pieces, first after {first_s * 1000:.0f} ms, all after {total_s:.2f} s[/]")


def _print_answer(
    client: httpx.Client, conversation: Conversation, question: str, console: Console
) -> tuple[float, int]:
    """Returns seconds to the first piece, and the number of pieces."""
    started_s, first_s, pieces = time.monotonic(), 0.0, 0
    for text in ask(client, conversation, question):
        first_s = first_s or time.monotonic() - started_s
        pieces += 1
        console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()
    return first_s, pieces


def _unreachable(url: str, exc: Exception) -> Unavailable:
    return Unavailable(f"{url}: {str(exc) or type(exc).__name__}; is the cluster up? (tandem status)")


def _refusal(reply: httpx.Response) -> str:
    try:
        return _message(reply.json())
    except ValueError:
        return f"status {reply.status_code}"


def _message(body: object) -> str:
    """From an error in OpenAI's shape."""
    error = body.get("error") if isinstance(body, dict) else None
    return str(error.get("message", error) if isinstance(error, dict) else error or body)
