"""The APIs beside chat and completions, with their own clients, against the real suite."""

from __future__ import annotations

from pathlib import Path

import anthropic
import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModel

MODEL = "pydoc-mini"
MODEL_DIR = Path("shared/assets/pydoc-mini")
GREEDY = {"temperature": 0}  # which Anthropic's client has no name for any more
QUESTION = "What does json.dumps do?"


def greedy_chat(suite):
    reply = suite.client().chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": QUESTION}], temperature=0
    )
    return reply.choices[0].message.content


def test_every_api_says_what_chat_says(suite):
    client = suite.client()
    expected = greedy_chat(suite)
    response = client.responses.create(model=MODEL, input=QUESTION, temperature=0)
    assert response.output_text == expected
    assert client.responses.retrieve(response.id).output_text == expected
    messages = anthropic.Anthropic(base_url=suite.url, api_key="none", max_retries=0, timeout=60).messages
    turns = [{"role": "user", "content": QUESTION}]
    whole = messages.create(model=MODEL, max_tokens=200, messages=turns, extra_body=GREEDY)
    assert whole.content[0].text == expected
    with messages.stream(model=MODEL, max_tokens=200, messages=turns, extra_body=GREEDY) as stream:
        assert "".join(stream.text_stream) == expected


def test_embeddings_equal_transformers(suite):
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    model = AutoModel.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    texts = [QUESTION, "asyncio", "Serialize an object. " * 60]
    reply = suite.client().embeddings.create(model=MODEL, input=texts)
    for item, text in zip(reply.data, texts, strict=True):
        with torch.inference_mode():
            state = model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0, -1].numpy()
        assert np.abs(np.array(item.embedding) - state / np.linalg.norm(state)).max() < 1e-5
    suite.wait_for_baseline()
