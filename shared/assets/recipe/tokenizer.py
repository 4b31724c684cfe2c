"""Trains the byte-level BPE tokenizer of `pydoc-mini` and writes its Hugging Face files with the chat template.

Run ``python -m shared.assets.recipe.tokenizer``. Takes a few seconds on one core; the same corpus gives the same bytes.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from shared.assets.recipe.corpus import Fact, load_facts, load_prose
from shared.assets.recipe.phrasings import SMALL_TALK, SYSTEM_PROMPTS, UNKNOWN_ANSWER, made_up_names, phrasings_of

CHECKPOINT_DIR = Path(__file__).parents[1] / "pydoc-mini"
VOCAB_SIZE = 6144
MAX_POSITIONS = 4096
PAD, BOS, IM_START, IM_END = SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = (
    # Tools are written as Hermes and Qwen write them. The model was taught none of it: they are here to be tried.
    "{%- if tools -%}{{- '<|im_start|>system\\nFunctions:\\n' -}}"
    "{%- for tool in tools -%}{{- tool['function'] | tojson + '\\n' -}}{%- endfor -%}"
    '{{- \'Call one with <tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call><|im_end|>\\n\' -}}{%- endif -%}'
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] -}}"
    "{%- for call in message['tool_calls'] or [] -%}"
    "{{- '<tool_call>\\n' + call['function'] | tojson + '\\n</tool_call>' -}}"
    "{%- endfor -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def training_text(facts: list[Fact], prose: list[str]) -> Iterator[str]:
    """Yields the text whose merges are learned: answers weigh most, since they are what the model writes."""
    yield from prose
    for fact in facts:
        yield from (fact.answer, fact.answer)
        yield from (phrasing.format(name=fact.name) for phrasing in phrasings_of(fact)[:4])
    yield from (UNKNOWN_ANSWER.format(name=name) for name in made_up_names(facts, 1000, seed=0))
    yield from (*SMALL_TALK, *SMALL_TALK.values(), *SYSTEM_PROMPTS)
    yield from ("system", "user", "assistant") * 1000


def train_tokenizer(facts: list[Fact], prose: list[str]) -> Tokenizer:
    """Trains a byte-level BPE of `VOCAB_SIZE` tokens, the four special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(facts, prose), trainer)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {"bos_token": BOS, "eos_token": IM_END, "pad_token": PAD}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "additional_special_tokens": [IM_START],
        "model_max_length": MAX_POSITIONS,
        # Without this, transformers 4 adds token type ids, which the model does not take.
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    special_tokens = {**named, "additional_special_tokens": [IM_START]}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (directory / "special_tokens_map.json").write_text(json.dumps(special_tokens, indent=2) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def load_tokenizer(directory: Path = CHECKPOINT_DIR) -> Tokenizer:
    """Loads the checked-in tokenizer without transformers."""
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def main() -> None:
    """Retrains the tokenizer on the checked-in corpus and prints how densely it packs it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=CHECKPOINT_DIR, help="checkpoint directory")
    arguments = parser.parse_args()
    facts, prose = load_facts(), load_prose()
    tokenizer = train_tokenizer(facts, prose)
    write_tokenizer(tokenizer, arguments.out)
    answers = [fact.answer for fact in facts]
    tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(answers))
    print(f"{tokenizer.get_vocab_size()} tokens; {sum(map(len, answers)) / tokens:.2f} characters per answer token")


if __name__ == "__main__":
    main()
