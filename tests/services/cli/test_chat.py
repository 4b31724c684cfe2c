"""The chat client against a gateway that says what the test wants."""

import json

import httpx
import pytest

from services.cli.chat import Conversation, ask, deltas
from shared.errors import Unavailable


def event(text: str) -> str:
    return "data: " + json.dumps({"choices": [{"delta": {"content": text}}]})


def client(*replies: httpx.Response) -> tuple[httpx.Client, list[dict]]:
    asked: list[dict] = []
    pending = list(replies)

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        return pending.pop(0)

    return httpx.Client(transport=httpx.MockTransport(answer)), asked


def test_text_is_taken_out_of_events_and_comments_are_not():
    first = 'data: {"choices": [{"delta": {"role": "assistant"}}]}'
    usage = 'data: {"choices": [], "usage": {"total_tokens": 3}}'
    lines = [first, "", ": keep-alive", event("Ser"), event("ialize"), usage, "data: [DONE]", event("late")]
    assert list(deltas(lines)) == ["Ser", "ialize"]


def test_an_error_in_the_stream_is_raised():
    with pytest.raises(Unavailable, match="worker lost"):
        list(deltas([event("Ser"), 'data: {"error": {"message": "worker lost"}}']))


def test_the_conversation_is_sent_along_with_the_next_question():
    stream = f"{event('Four.')}\n\ndata: [DONE]\n\n"
    http, asked = client(httpx.Response(200, text=stream), httpx.Response(200, text=stream))
    conversation = Conversation("http://gateway", "m", temperature=0.0)
    conversation.reset()
    assert list(ask(http, conversation, "2 + 2?")) == ["Four."]
    list(ask(http, conversation, "Sure?"))
    assert [message["content"] for message in asked[1]["messages"]] == ["2 + 2?", "Four.", "Sure?"]
    assert asked[1]["stream"] is True
    assert asked[1]["temperature"] == 0.0


def test_a_refused_question_is_forgotten():
    http, _ = client(httpx.Response(400, json={"error": {"message": "too long"}}))
    conversation = Conversation("http://gateway", "m")
    with pytest.raises(Unavailable, match="too long"):
        list(ask(http, conversation, "?"))
    assert conversation.messages == []
