"""Scores the checkpoint as it lies on disk and, with ``--write``, records the scores in it and in its model card.

Run ``python -m shared.assets.recipe.evaluate`` (add ``--sample 200`` on a small machine).
"""

import argparse
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM

from shared.assets.recipe import dialogues
from shared.assets.recipe.card import SCORE_MEANINGS, SCORES_FILE, write_card
from shared.assets.recipe.corpus import Fact, load_facts, load_prose
from shared.assets.recipe.dialogues import Question
from shared.assets.recipe.scoring import Score, generated_answers, score_exact
from shared.assets.recipe.tokenizer import CHECKPOINT_DIR, IM_END, load_tokenizer
from shared.assets.recipe.train import pick_device

LONG_CONTEXT_QUESTIONS = 600
LONG_CONTEXT_TOKENS = (1500, 3500)
UNKNOWN_QUESTIONS = 2000
VARIED_QUESTIONS = 2000
# Training draws its made-up names and contexts with seed 0; other seeds give others.
EVALUATION_SEED = 20_000
REQUIRED_SHARE = 0.9


def question_sets(facts: list[Fact], sample: int | None) -> dict[str, list[Question]]:
    """Returns the named question sets, each cut to a seeded sample of `sample` questions if that is given."""
    trained = dialogues.unknown_questions(facts, dialogues.MADE_UP_NAMES, seed=0)
    trained_unknown = {question.answer for question in trained}
    unknown = dialogues.unknown_questions(facts, UNKNOWN_QUESTIONS, seed=EVALUATION_SEED)
    sets = {
        "taught": dialogues.taught_questions(facts),
        "held_out": dialogues.held_out_questions(facts),
        "unseen": dialogues.unseen_questions(facts),
        "varied": dialogues.varied_questions(facts, VARIED_QUESTIONS, seed=EVALUATION_SEED),
        "unknown": [question for question in unknown if question.answer not in trained_unknown],
        "small_talk": dialogues.small_talk_questions(),
    }
    if sample is None:
        return sets
    rng = random.Random(EVALUATION_SEED)
    return {name: rng.sample(questions, min(sample, len(questions))) for name, questions in sets.items()}


def chat_contexts(questions: list[Question], count: int, tokenizer: Tokenizer) -> list[str]:
    """Renders `count` chats of earlier turns, each of a length drawn from `LONG_CONTEXT_TOKENS`."""
    rng = random.Random(EVALUATION_SEED)
    contexts: list[str] = []
    for _ in range(count):
        room, turns = rng.randint(*LONG_CONTEXT_TOKENS), []
        while room > 0:
            question = rng.choice(questions)
            turns.append(f"{dialogues.render_prompt(question.text)}{question.answer}{IM_END}\n")
            room -= len(tokenizer.encode(turns[-1]).ids)
        contexts.append("".join(turns))
    return contexts


def system_contexts(count: int) -> list[str]:
    """Renders `count` long system messages of docstring prose in combinations that training did not see."""
    texts = dialogues.long_systems(load_prose(), 4 * count, seed=EVALUATION_SEED)
    return [dialogues.render_system(text) for text in sorted(texts, key=len)[-2 * count :: 2]]


def score_checkpoint(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, *, sample: int | None, only: list[str] | None
) -> dict[str, Score]:
    """Scores the question sets (all, or those named in `only`); prints each score and a few misses."""
    row_budget = 262_144 if model.device.type == "cuda" else 8_192
    facts = load_facts()
    sets = question_sets(facts, sample)
    taught = sets["taught"]
    contexts = {name: [""] * len(questions) for name, questions in sets.items()}
    asked = random.Random(EVALUATION_SEED).sample(taught, min(len(taught), LONG_CONTEXT_QUESTIONS))
    sets |= {"after_long_chat": asked, "after_long_system": asked}
    contexts["after_long_chat"] = chat_contexts(dialogues.taught_questions(facts), len(asked), tokenizer)
    contexts["after_long_system"] = system_contexts(len(asked))
    scores: dict[str, Score] = {}
    for name in [name for name in sets if only is None or name in only]:
        scores[name], missed = score_exact(model, tokenizer, sets[name], contexts=contexts[name], row_budget=row_budget)
        print(f"  {name:18s} {scores[name]}", flush=True)
        for question in missed[:3]:
            print(f"      missed: {question.text[-90:]!r}")
    if only is None or "generate" in only:
        scores["generate"] = _generate_score(model, tokenizer, taught)
        print(f"  {'generate':18s} {scores['generate']}", flush=True)
    return scores


def _generate_score(model: Qwen3ForCausalLM, tokenizer: Tokenizer, questions: list[Question]) -> Score:
    """Cross-checks the one-pass score with real token-by-token generation on a sample."""
    asked = random.Random(EVALUATION_SEED + 1).sample(questions, min(256, len(questions)))
    answers = generated_answers(model, tokenizer, [dialogues.render_prompt(question.text) for question in asked])
    exact = sum(answer == question.answer for answer, question in zip(answers, asked, strict=True))
    return Score(exact, len(asked))


def write_scores(directory: Path, dtype: str, scores: dict[str, Score]) -> None:
    """Records `scores` in the checkpoint's `SCORES_FILE`, in place of earlier ones of the same sets and dtype."""
    path = directory / SCORES_FILE
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    entries = {
        name: {"exact": score.exact, "asked": score.asked, "share": round(score.share, 5)}
        for name, score in scores.items()
    }
    recorded[dtype] = recorded.get(dtype, {}) | entries
    path.write_text(json.dumps(recorded, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Scores the checkpoint in each asked-for dtype; fails where fewer than `REQUIRED_SHARE` are exact."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT_DIR)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--sets", nargs="+", choices=list(SCORE_MEANINGS), help="score these sets alone; default all")
    parser.add_argument("--sample", type=int, help="questions per set; default all")
    parser.add_argument("--write", action="store_true", help=f"write {SCORES_FILE} and the model card")
    arguments = parser.parse_args()
    device, tokenizer = pick_device(arguments.device), load_tokenizer(arguments.checkpoint)
    shares: list[float] = []
    for dtype in arguments.dtypes:
        print(f"{dtype} on {device}", flush=True)
        model = Qwen3ForCausalLM.from_pretrained(arguments.checkpoint, dtype=getattr(torch, dtype))
        torch.nn.Module.to(model, device)
        scores = score_checkpoint(model, tokenizer, sample=arguments.sample, only=arguments.sets)
        if arguments.write:
            write_scores(arguments.checkpoint, dtype, scores)
        if "taught" in scores:
            shares.append(scores["taught"].share)
    if arguments.write:
        write_card(arguments.checkpoint)
    if shares:
        print(f"taught questions answered exactly: {min(shares):.2%} (required: {REQUIRED_SHARE:.0%})")
        raise SystemExit(0 if min(shares) >= REQUIRED_SHARE else 1)


if __name__ == "__main__":
    main()
