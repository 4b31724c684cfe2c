"""Clients that people have, unchanged, against the real suite: what each sees is what OpenAI's own client sees."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.clients.environment import seen_by

QUESTION = [{"role": "user", "content": "What does json.dumps do?"}]
HIDDEN_SIZE = 256


@pytest.fixture(scope="module")
def answer(suite):
    """What OpenAI's client gets."""
    reply = suite.client().chat.completions.create(model="pydoc-mini", messages=QUESTION, temperature=0)
    return reply.choices[0].message.content, reply.usage.completion_tokens


def test_litellm(suite, answer):
    seen = seen_by("litellm", "litellm_scenario.py", suite.url)
    assert (seen["whole"], seen["completion_tokens"]) == answer
    assert seen["streamed"] == answer[0]
    assert seen["called"] == "ping"
    assert seen["text"]
    assert len(seen["vectors"]) == 2
    assert "4096" in seen["refused"]


def test_instructor(suite):
    seen = seen_by("instructor", "instructor_scenario.py", suite.url)
    assert len(seen) == 3
    for entry in seen.values():
        assert set(entry) == {"name", "count", "kind"}


def test_langchain(suite, answer):
    seen = seen_by("langchain-openai", "langchain_scenario.py", suite.url)
    assert (seen["whole"], seen["usage"]) == answer
    assert seen["streamed"] == seen["responses"] == answer[0]
    assert set(seen["typed"]) == set(seen["arguments"]) == {"name", "count"}
    assert seen["called"] == ["Entry"]
    assert len(set(seen["vectors"])) == 1


def test_lm_eval_scores_as_prompt_logprobs_do(suite):
    tokenizer = Path("shared/assets/pydoc-mini").resolve()
    seen = seen_by("lm-eval", "lm_eval_scenario.py", suite.url, str(tokenizer))
    assert 0 <= seen["accuracy"] <= 1
    assert all(score < 0 for scores in seen["scores"] for score in scores)
    assert len(seen["texts"]) == 3
    reply = suite.client().completions.create(
        model="pydoc-mini", prompt="math.gcd returns an", temperature=0, max_tokens=12, stop=["."]
    )
    assert seen["texts"][1].strip() == reply.choices[0].text.strip()
    assert seen["scores"][1][1] == max(seen["scores"][1])  # "integer"


def test_openais_node_client(suite, answer):
    seen = seen_by("node", "node_scenario.cjs", suite.url)
    assert (seen["whole"], seen["usage"]) == answer
    assert seen["streamed"] == seen["response"] == answer[0]
    assert (seen["called"], seen["events"], seen["models"]) == ("ping", 3, ["pydoc-mini"])
    assert seen["refused"]["isNotFound"]
    assert "gpt-9" in seen["refused"]["message"]
    suite.wait_for_baseline()  # the stream that was given up holds nothing
