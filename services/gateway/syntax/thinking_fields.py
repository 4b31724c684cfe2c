"""`reasoning_effort`, `thinking_token_budget` and `include_reasoning`: what they mean to template and engine."""

from __future__ import annotations

from services.gateway.schemas.chat import ChatBody
from services.gateway.syntax.families import ModelSyntax
from shared.engine.thinking import Thinking
from shared.errors import UnsupportedField
from shared.tokenization.chat_template import ChatTemplate
from shared.tokenization.tokenizer import Tokenizer

EFFORT_BUDGETS = {"none": 0, "minimal": 512, "low": 2048, "medium": 8192}
"""Tokens of reasoning where the template itself knows no effort; more effort than these has no limit."""


def thinking_variables(body: ChatBody, syntax: ModelSyntax, template: ChatTemplate) -> dict[str, object]:
    """What the template is told.

    Raises:
        UnsupportedField: The model does not reason.
    """
    if syntax.reasoning is None:
        for field in ("reasoning_effort", "thinking_token_budget"):
            if getattr(body, field) not in (None, "none"):
                raise UnsupportedField(f"{field!r} is not supported: the model marks no reasoning", param=field)
        return {}
    if body.reasoning_effort is None:
        return {}
    if template.mentions("reasoning_effort"):
        return {"reasoning_effort": body.reasoning_effort}
    if body.reasoning_effort == "none" and template.mentions("enable_thinking"):
        return {"enable_thinking": False}
    return {}


def thinking_of(
    body: ChatBody, syntax: ModelSyntax, template: ChatTemplate, tokenizer: Tokenizer, *, is_open: bool
) -> Thinking | None:
    """What the engine is told; None = the model marks no reasoning."""
    marks = syntax.reasoning
    if marks is None:
        return None
    budget = body.thinking_token_budget
    if budget is None and body.reasoning_effort is not None and not template.mentions("reasoning_effort"):
        budget = EFFORT_BUDGETS.get(body.reasoning_effort)
    start = tokenizer.encode(marks.start, add_special_tokens=False)
    return Thinking(
        start_id=start[0] if len(start) == 1 else -1,
        end_ids=tuple(tokenizer.encode(marks.end, add_special_tokens=False)),
        is_open=is_open or marks.is_implied,
        max_tokens=budget,
    )
