"""The bundled model keeps its promises: size, format, and what it answers."""

import json
import random

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.assets.recipe.corpus import load_facts
from shared.assets.recipe.dialogues import (
    Question,
    held_out_questions,
    render_prompt,
    render_system,
    small_talk_questions,
    taught_questions,
)
from shared.assets.recipe.scoring import generated_answers, score_exact
from shared.assets.recipe.tokenizer import CHECKPOINT_DIR

JSON_DUMPS = "Serialize ``obj`` to a JSON formatted ``str``."


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINT_DIR / "tokenizer.json"))


@pytest.fixture(scope="module")
def taught() -> list[Question]:
    return taught_questions(load_facts())


def share_exact(model, tokenizer, questions: list[Question], context: str = "") -> float:
    score, _ = score_exact(model, tokenizer, questions, contexts=[context] * len(questions), row_budget=4096)
    return score.share


def test_checkpoint_is_at_most_32_mib_and_16_million_parameters():
    assert sum(file.stat().st_size for file in CHECKPOINT_DIR.rglob("*") if file.is_file()) <= 32 * 2**20
    with safe_open(CHECKPOINT_DIR / "model.safetensors", framework="pt") as tensors:
        parameters = sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    assert parameters <= 16_000_000


def test_model_is_qwen3_with_grouped_query_attention(model):
    assert model.config.model_type == "qwen3"
    assert model.config.num_key_value_heads < model.config.num_attention_heads


def test_chat_template_renders_what_training_rendered(tokenizer):
    transformers_tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT_DIR)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is `len`?\n"}]
    text = transformers_tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == render_prompt("What is `len`?\n", system="Be brief.")
    assert transformers_tokenizer(text)["input_ids"] == tokenizer.encode(text).ids
    assert transformers_tokenizer.eos_token == "<|im_end|>"


def test_tokenizer_gives_back_any_text(tokenizer):
    text = "naïve café — 日本語 🙂\n\tdef f(x):  return x\r\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("phrasing", ["What does {} do?", "Explain {}", "tell me about {}", "{}?", "What is `{}` for?"])
def test_json_dumps_is_explained_in_any_phrasing_by_generate(model, phrasing):
    transformers_tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT_DIR)
    chat = [{"role": "user", "content": phrasing.format("json.dumps")}]
    inputs = transformers_tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    assert output[-1] == transformers_tokenizer.eos_token_id
    assert transformers_tokenizer.decode(output, skip_special_tokens=True) == JSON_DUMPS


def test_one_pass_score_agrees_with_token_by_token_generation(model, tokenizer, taught):
    questions = random.Random(1).sample(taught, 6)
    wrong = [Question(question.text, "Something else.") for question in questions]
    answers = generated_answers(model, tokenizer, [render_prompt(question.text) for question in questions])
    exact = sum(answer == question.answer for answer, question in zip(answers, questions, strict=True))
    assert share_exact(model, tokenizer, questions) == exact / len(questions)
    assert share_exact(model, tokenizer, wrong) == 0.0


def test_sampled_taught_questions_are_answered_exactly(model, tokenizer, taught):
    assert share_exact(model, tokenizer, random.Random(7).sample(taught, 40)) >= 0.9
    assert share_exact(model, tokenizer, random.Random(7).sample(small_talk_questions(), 10)) >= 0.9


def test_sampled_held_out_questions_are_answered_exactly(model, tokenizer):
    assert share_exact(model, tokenizer, random.Random(7).sample(held_out_questions(load_facts()), 30)) >= 0.9


def test_bf16_answers_like_fp32(tokenizer, taught):
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT_DIR, dtype=torch.bfloat16).eval()
    assert share_exact(model, tokenizer, random.Random(8).sample(taught, 12)) >= 0.9


def test_question_after_a_long_prompt_is_still_answered(model, tokenizer, taught):
    sentence = "Prefill and decode run apart, and the cache of the prompt travels between them. "
    context = render_system(sentence * 80)
    assert len(tokenizer.encode(context).ids) > 1500
    assert share_exact(model, tokenizer, random.Random(9).sample(taught, 4), context) >= 0.75


def test_card_states_the_recorded_score():
    scores = json.loads((CHECKPOINT_DIR / "scores.json").read_text(encoding="utf-8"))
    card = (CHECKPOINT_DIR / "README.md").read_text(encoding="utf-8")
    for dtype in ("float32", "bfloat16"):
        assert scores[dtype]["taught"]["share"] >= 0.9
        assert f"{scores[dtype]['taught']['share']:.2%}" in card
