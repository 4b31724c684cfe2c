"""An encoder checkpoint behind OpenAI's client, brought up as a user does, against transformers."""

from __future__ import annotations

import base64
import json

import grpc
import httpx
import numpy as np
import openai
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel

from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from shared.rpc import open_channel

WORDS = ["the", "cat", "sat", "on", "a", "mat", "dog", "##s", "##ting", "run", "!", "."]
TEXTS = ["The cat sat on a mat.", "dogs!", "running " * 9, "cat " * 20]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny-bert")
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(directory / "tokenizer.json"))
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=24,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(directory)
    kinds = ("Transformer", "Pooling")
    modules = [{"path": f"1_{kind}", "type": f"sentence_transformers.models.{kind}"} for kind in kinds]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    return directory


@pytest.fixture(scope="module")
def encoder_suite(checkpoint, start_another):
    return start_another("--prefill", "0", "--model", str(checkpoint), "--served-model-name", "bert", "--threads", "1")


def states_of(checkpoint, texts):
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    model = BertModel.from_pretrained(checkpoint).eval()
    with torch.inference_mode():
        return [model(torch.tensor([tokenizer.encode(t).ids])).last_hidden_state[0].numpy() for t in texts]


def test_vectors_equal_transformers_as_floats_and_base64(encoder_suite, checkpoint):
    embeddings = encoder_suite.client().embeddings
    expected = np.stack([state[0] for state in states_of(checkpoint, TEXTS)])
    for form in ("float", "base64"):
        reply = embeddings.create(model="bert", input=TEXTS, encoding_format=form)
        rows = [
            np.frombuffer(base64.b64decode(item.embedding), "<f4")
            if isinstance(item.embedding, str)
            else np.array(item.embedding)
            for item in reply.data
        ]
        assert np.abs(np.stack(rows) - expected).max() < 1e-5
    unit = embeddings.create(model="bert", input=TEXTS[0], extra_body={"normalize": True}).data[0].embedding
    assert np.abs(np.array(unit) - expected[0] / np.linalg.norm(expected[0])).max() < 1e-5


def test_refusals_say_why(encoder_suite):
    client = encoder_suite.client()
    with pytest.raises(openai.BadRequestError, match="input 0 has 32 tokens; at most 24"):
        client.embeddings.create(model="bert", input="cat " * 30)
    with pytest.raises(openai.BadRequestError, match="Matryoshka"):
        client.embeddings.create(model="bert", input="cat", dimensions=8)
    with pytest.raises(openai.BadRequestError, match="embeds texts and generates none"):
        client.chat.completions.create(model="bert", messages=[{"role": "user", "content": "cat"}])
    with pytest.raises(openai.BadRequestError, match="embeds texts and generates none"):
        client.completions.create(model="bert", prompt="cat")
    with pytest.raises(openai.BadRequestError, match="embeds texts and generates none"):
        client.responses.create(model="bert", input="cat")


def test_it_is_listed_ready_and_without_kv(encoder_suite):
    assert [model.id for model in encoder_suite.client().models.list()] == ["bert"]
    assert httpx.get(f"{encoder_suite.url}/ready").status_code == 200
    status = encoder_suite.status()
    assert status["ready"]
    assert [process["role"] for process in status["processes"]] == ["redis", "decode", "gateway"]
    [worker] = status["workers"]
    assert (worker["ready"], worker["max_model_len"], worker["blocks"]["total"]) == (True, 24, 0)


async def test_a_worker_that_is_asked_to_generate_refuses(encoder_suite, generate):
    [worker] = encoder_suite.status()["workers"]
    result = await generate(worker, [2, 4, 3])
    assert "embeds texts and generates none" in result.failure.message
    async with open_channel(worker["address"]) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="embeds texts and generates none"):
            async for _ in rpc.WorkerStub(channel).Prefill(pb.PrefillRequest(session_id="direct")):
                pass
