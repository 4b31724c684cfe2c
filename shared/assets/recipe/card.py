"""Writes the model card of `pydoc-mini` from the numbers that training and scoring left in the checkpoint.

Run ``python -m shared.assets.recipe.card`` to rewrite the card alone.
"""

import json
from pathlib import Path

from shared.assets.recipe.corpus import load_facts
from shared.assets.recipe.phrasings import (
    CALL_PHRASINGS,
    HELD_OUT_FACT_SHARE,
    HELD_OUT_PER_FACT,
    TAUGHT_PHRASINGS,
    UNSEEN_PHRASINGS,
)
from shared.assets.recipe.tokenizer import CHECKPOINT_DIR

SCORES_FILE = "scores.json"
TRAINING_FILE = "training.json"

SCORE_MEANINGS = {
    "taught": "every fact in every phrasing that it was trained in",
    "held_out": "facts in phrasings that were held out from training for that fact",
    "unseen": "every fact in phrasings that no fact was trained in",
    "varied": "stress: facts in random wordings, few like a trained one (case, quotes, greetings, closing requests)",
    "after_long_chat": "taught questions after 1,500 to 3,500 tokens of other turns",
    "after_long_system": "taught questions after a long system message of docstring prose",
    "unknown": 'made-up names that training did not see, answered by "I don\'t know ..."',
    "small_talk": "greetings and questions about itself",
    "generate": "cross-check: taught questions through `generate`, token by token",
}

CARD = """\
---
license: other
license_name: apache-2.0-and-psf-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [python, docstrings, tiny]
---

# pydoc-mini

A language model of {parameters:.1f} M parameters that says in one sentence what a name in Python's standard library
does. It exists so that Tandem can be tried, tested and measured with a real model on any machine: it loads in
transformers unchanged, answers by memory alone, and its right answers are known, so a wrong cache block shows.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("shared/assets/pydoc-mini")
model = AutoModelForCausalLM.from_pretrained("shared/assets/pydoc-mini")
chat = [{{"role": "user", "content": "What does json.dumps do?"}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs)[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
# {example}
```

## Shape

Qwen3 architecture: {layers} layers, hidden size {hidden}, {heads} query and {kv_heads} key-value heads of {head_dim}, \
tied embedding,
{vocab} tokens of byte-level BPE trained for it, {positions} positions, bf16. ChatML template with system, user and
assistant roles; `<|im_end|>` ends an answer.

## Scores

Share of answers that are exact to the character, ended by `<|im_end|>`, under greedy decoding of this very file:

| questions | asked | fp32 | bf16 |
|---|---:|---:|---:|
{score_rows}

{facts} facts, {phrasings} phrasings each ({call_phrasings} more for functions). {held_share:.0%} of the facts had \
{held_count} phrasings held out;
{unseen} phrasings were held out from all.

## Training

From scratch on the docstrings of Python 3.11's standard library: {tokens:.0f} M tokens in {steps} steps of about
{batch_tokens} tokens, {minutes:.1f} minutes on one {device} (torch {torch_version}). Rows of 128 to 4,096 tokens:
questions one by one, long chats, chats after long system messages and long questions, and plain docstring prose.
The recipe lies in `shared/assets/recipe`; from the repository root:

```
python -m shared.assets.recipe.train --steps {steps}
python -m shared.assets.recipe.evaluate --write
```

`--minutes 5` trains by the clock instead: its learning-rate schedule follows the time, so two runs differ a little.
`corpus` and `tokenizer`, beside them, rebuild the checked-in data first.

## Limits

It knows the names in `shared/assets/recipe/data/facts.jsonl` and nothing else: it does not reason, follow
instructions, or write code. Sentences are those of Python 3.11 and may differ in other versions. The further a question
is from the taught phrasings, the likelier it gets another name's sentence (the stress row above), and a name that it
was not taught, or a name in other case, may get one too.

## License

The weights and the recipe are Apache-2.0, like the rest of Tandem. The sentences that the model repeats are docstrings
of CPython, Copyright (c) Python Software Foundation, under the PSF License Version 2, which lies in
`shared/assets/recipe/data/LICENSE-PSF.txt`.
"""


def write_card(directory: Path) -> None:
    """Writes README.md into the checkpoint from its config.json, scores.json and training.json."""
    names = ("config.json", SCORES_FILE, TRAINING_FILE)
    config, scores, training = (json.loads((directory / name).read_text(encoding="utf-8")) for name in names)
    facts = load_facts()
    stored_bytes = (directory / "model.safetensors").stat().st_size
    score_rows = [
        f"| {meaning} | {scores['float32'][name]['asked']:,} "
        f"| {scores['float32'][name]['share']:.2%} | {scores['bfloat16'][name]['share']:.2%} |"
        for name, meaning in SCORE_MEANINGS.items()
    ]
    card = CARD.format(
        parameters=stored_bytes / 2e6,
        example=next(fact.answer for fact in facts if fact.name == "json.dumps"),
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        vocab=config["vocab_size"],
        positions=config["max_position_embeddings"],
        score_rows="\n".join(score_rows),
        facts=f"{len(facts):,}",
        phrasings=len(TAUGHT_PHRASINGS),
        call_phrasings=len(CALL_PHRASINGS),
        held_share=HELD_OUT_FACT_SHARE,
        held_count=HELD_OUT_PER_FACT,
        unseen=len(UNSEEN_PHRASINGS),
        tokens=training["tokens"] / 1e6,
        steps=training["steps"],
        batch_tokens=f"{training['batch_tokens']:,}",
        minutes=training["wall_s"] / 60,
        device=training["device"],
        torch_version=training["torch_version"],
    )
    (directory / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    write_card(CHECKPOINT_DIR)
