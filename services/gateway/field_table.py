"""`python -m services.gateway.field_table`: every field of every endpoint, honoured or refused, in FIELDS.md.

The rows come from the schemas that bodies are checked with, so the table says what the gateway does.
"""

from __future__ import annotations

import sys
from pathlib import Path

from services.gateway.anthropic.schemas import CountTokensBody, MessagesBody
from services.gateway.batches.schemas import BatchBody
from services.gateway.embeddings.schemas import EmbeddingBody
from services.gateway.responses.schemas import PromptBody, ResponseBody
from services.gateway.schemas.body import Body, Refusal
from services.gateway.schemas.chat import ChatBody
from services.gateway.schemas.completion import CompletionBody
from services.gateway.schemas.tokens import DetokenizeBody, TokenizeChatBody, TokenizeTextBody

FILE = Path(__file__).with_name("FIELDS.md")
ENDPOINTS: dict[str, tuple[type[Body], ...]] = {
    "/v1/chat/completions": (ChatBody,),
    "/v1/completions": (CompletionBody,),
    "/v1/responses": (ResponseBody,),
    "/v1/responses/input_tokens": (PromptBody,),
    "/v1/messages": (MessagesBody,),
    "/v1/messages/count_tokens": (CountTokensBody,),
    "/v1/embeddings": (EmbeddingBody,),
    "/v1/batches": (BatchBody,),
    "/tokenize": (TokenizeTextBody, TokenizeChatBody),
    "/detokenize": (DetokenizeBody,),
}

# vLLM's own, of its request classes as of November 2026: OpenAI's API does not have them.
VLLM_GENERATION = frozenset(
    [
        "use_beam_search",
        "top_k",
        "min_p",
        "repetition_penalty",
        "length_penalty",
        "stop_token_ids",
        "include_stop_str_in_output",
        "ignore_eos",
        "min_tokens",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "truncate_prompt_tokens",
        "truncation_side",
        "prompt_logprobs",
        "allowed_token_ids",
        "bad_words",
        "structured_outputs",
        "priority",
        "request_id",
        "return_tokens_as_token_ids",
        "return_token_ids",
        "cache_salt",
        "kv_transfer_params",
        "ec_transfer_params",
        "vllm_xargs",
        "logprob_token_ids",
        "watermarking",
        "repetition_detection",
        "session_id",
        "add_special_tokens",
    ]
)
VLLM_CHAT = VLLM_GENERATION | frozenset(
    [
        "thinking_token_budget",
        "include_reasoning",
        "echo",
        "add_generation_prompt",
        "continue_final_message",
        "documents",
        "chat_template",
        "chat_template_kwargs",
        "media_io_kwargs",
        "mm_processor_kwargs",
        "return_prompt_text",
    ]
)
_OF_VLLM = {"/v1/chat/completions": VLLM_CHAT, "/v1/completions": VLLM_GENERATION}

HEADER = """# Every field of every endpoint

Made from the schemas that bodies are checked with: `python -m services.gateway.field_table`. Do not edit.

"honoured" fields do what their API says, or are refused with the reason where the served model cannot (tools and
reasoning, where its chat template knows none). "refused" ones are answered with 400 and the reason given here, unless
their value asks for nothing: null always, and what is listed. Any other field is refused as unknown, with a suggestion;
`unknown_fields=ignore` changes that. "vLLM's own" marks extras that vLLM's request classes have and OpenAI's API does
not; whether vLLM honours or ignores a field is not claimed here.
"""


def table() -> str:
    """The document."""
    parts = [HEADER]
    for path, bodies in ENDPOINTS.items():
        own = _OF_VLLM.get(path)
        parts.append(f"\n## `POST {path}`\n\n")
        parts.append("| field | Tandem |" + (" vLLM's own |" if own else "") + "\n")
        parts.append("|---|---|" + ("---|" if own else "") + "\n")
        for name, says in _rows(bodies).items():
            parts.append(f"| `{name}` | {says} |" + (f" {'yes' if name in own else ''} |" if own else "") + "\n")
    return "".join(parts)


def _rows(bodies: tuple[type[Body], ...]) -> dict[str, str]:
    honoured = {
        field.alias or name: "honoured, required" if field.is_required() else "honoured"
        for body in bodies
        for name, field in body.model_fields.items()
    }
    refused = {name: _refused(refusal) for body in bodies for name, refusal in body.refused.items()}
    return honoured | {name: says for name, says in refused.items() if name not in honoured}


def _refused(refusal: Refusal) -> str:
    accepted = ", ".join(f"`{value!r}`" for value in refusal.neutral)
    return f"refused: {refusal.reason}" + (f" (accepted: {accepted})" if accepted else "")


if __name__ == "__main__":
    FILE.write_text(table(), encoding="utf-8")
    sys.stdout.write(f"{FILE}\n")
