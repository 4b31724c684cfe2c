"""Counts which questions a model answers exactly under greedy decoding, thousands at a time.

Greedy decoding writes exactly the tokens of an answer if and only if, with the prompt and the answer laid out in one
row, the most likely next token before every answer token is that token. So one forward pass checks a whole batch of
answers, end token included, with the outcome that decoding token by token has; `generated_answers` does the latter.
"""

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM

from shared.assets.recipe.dialogues import Question, render_prompt
from shared.assets.recipe.tokenizer import IM_END, PAD, SPECIAL_TOKENS

PAD_ID = SPECIAL_TOKENS.index(PAD)
END_ID = SPECIAL_TOKENS.index(IM_END)


@dataclass(frozen=True, slots=True)
class Score:
    """How many of `asked` questions were answered exactly, each answer ended by the end token."""

    exact: int
    asked: int

    @property
    def share(self) -> float:
        """Exact answers as a share of all, from 0 to 1."""
        return self.exact / self.asked if self.asked else 0.0

    def __str__(self) -> str:
        return f"{self.share:7.2%} ({self.exact} of {self.asked})"


@torch.inference_mode()
def score_exact(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, questions: list[Question], *, contexts: list[str], row_budget: int
) -> tuple[Score, list[Question]]:
    """Scores `questions`, each asked after its context.

    Args:
        model: in evaluation mode, any dtype and device.
        tokenizer: the checkpoint's tokenizer.
        questions: what is asked and the right answers.
        contexts: rendered text before each question (earlier turns, a system message); empty for none.
        row_budget: tokens per forward pass, padding included.

    Returns:
        The score, and the questions that were answered otherwise.
    """
    prompts = [context + render_prompt(question.text) for context, question in zip(contexts, questions, strict=True)]
    prompt_ids = [encoding.ids for encoding in tokenizer.encode_batch(prompts)]
    answer_ids = [[*encoding.ids, END_ID] for encoding in tokenizer.encode_batch([q.answer for q in questions])]
    order = sorted(range(len(questions)), key=lambda index: len(prompt_ids[index]) + len(answer_ids[index]))
    missed: list[Question] = []
    while order:
        longest = len(prompt_ids[order[-1]]) + len(answer_ids[order[-1]])
        batch = [order.pop() for _ in range(min(len(order), max(1, row_budget // longest)))]
        flags = _are_exact(model, [prompt_ids[i] for i in batch], [answer_ids[i] for i in batch])
        missed += [questions[i] for i, is_exact in zip(batch, flags, strict=True) if not is_exact]
    return Score(len(questions) - len(missed), len(questions)), missed


def _are_exact(model: Qwen3ForCausalLM, prompts: list[list[int]], answers: list[list[int]]) -> list[bool]:
    """Says for each (prompt, answer) whether greedy decoding after the prompt gives the answer."""
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), PAD_ID)
    is_answer = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        tokens[index, : len(row)] = torch.tensor(row)
        is_answer[index, len(prompt) : len(row)] = True
    tokens, is_answer = tokens.to(model.device), is_answer.to(model.device)
    # Padding stands on the right, where causal attention keeps it from every real token.
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    chosen = is_answer[:, 1:]
    is_wrong = torch.zeros_like(chosen)
    is_wrong[chosen] = model.lm_head(hidden[:, :-1][chosen]).argmax(dim=-1) != tokens[:, 1:][chosen]
    return [not wrong for wrong in is_wrong.any(dim=1).tolist()]


@torch.inference_mode()
def generated_answers(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, prompts: list[str], *, max_new_tokens: int = 96
) -> list[str]:
    """Returns what `generate` answers to each rendered prompt, greedily and token by token, in one batch."""
    prompt_ids = [encoding.ids for encoding in tokenizer.encode_batch(prompts)]
    width = max(map(len, prompt_ids))
    tokens = torch.tensor([[PAD_ID] * (width - len(ids)) + ids for ids in prompt_ids], device=model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids], device=model.device)
    generator: Any = model  # transformers types `generate` for a protocol that its own models do not meet
    outputs = generator.generate(
        input_ids=tokens,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    texts = tokenizer.decode_batch(outputs[:, width:].tolist(), skip_special_tokens=False)
    # An answer that never ended is no answer: mark it so that it equals none.
    return [answer if end else answer + "..." for answer, end, _ in (text.partition(IM_END) for text in texts)]
