"""`python -m services.gateway.field_table`: every field of every endpoint, honoured or refused, in FIELDS.md.

The rows come from the schemas that bodies are checked with, so the table says what the gateway does; what vLLM does
stands beside it, from a file that is kept by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from services.gateway.anthropic.schemas import CountTokensBody, MessagesBody
from services.gateway.batches.schemas import BatchBody
from services.gateway.embeddings.schemas import EmbeddingBody
from services.gateway.responses.schemas import PromptBody, ResponseBody
from services.gateway.schemas.body import Body, Refusal
from services.gateway.schemas.chat import ChatBody
from services.gateway.schemas.completion import CompletionBody
from services.gateway.schemas.tokens import DetokenizeBody, TokenizeChatBody, TokenizeTextBody

FILE = Path(__file__).with_name("FIELDS.md")
VLLM_FILE = Path(__file__).with_name("vllm_fields.toml")
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

HEADER = """# Every field of every endpoint

Made from the schemas that bodies are checked with: `python -m services.gateway.field_table`. Do not edit.

"honoured" fields do what their API says, or are refused with the reason where the served model cannot (tools and
reasoning, where its chat template knows none). "refused" ones are answered with 400 and the reason given here, unless
their value asks for nothing: null always, and what is listed. Any other field is refused as unknown, with a suggestion;
`unknown_fields=ignore` changes that.

The column of vLLM is of its source at the commits named below (`vllm_fields.toml`): "honoured" is what its request
class has and does not call ignored, with its caveats (options at its start, its model); "not its own" is what the class
has not: vLLM ignores it.
"""


class VllmEndpoint(msgspec.Struct, forbid_unknown_fields=True):
    """What vLLM does with the fields of one endpoint; see the head of the file."""

    source: str
    commit: str
    honoured: list[str]
    echoed: list[str] = []
    ignored: list[str] = []
    refused: dict[str, str] = {}

    @property
    def fields(self) -> dict[str, str]:
        """What the table says of each field of its class."""
        said = dict.fromkeys(self.honoured, "honoured")
        said |= dict.fromkeys(self.echoed, "told in the reply, without effect")
        said |= dict.fromkeys(self.ignored, "ignored")
        return said | {name: f"refused: {reason}" for name, reason in self.refused.items()}


def vllm_endpoints() -> dict[str, VllmEndpoint]:
    """By path; vLLM does not have the others."""
    return msgspec.toml.decode(VLLM_FILE.read_bytes(), type=dict[str, VllmEndpoint])


def table() -> str:
    """The document."""
    parts, endpoints = [HEADER], vllm_endpoints()
    for path, bodies in ENDPOINTS.items():
        vllm = endpoints.get(path)
        parts.append(f"\n## `POST {path}`\n\n")
        if vllm is None:
            parts.append("vLLM has no such endpoint.\n\n| field | Tandem |\n|---|---|\n")
        else:
            parts.append(
                f"vLLM: `{vllm.source}` at `{vllm.commit[:12]}`.\n\n| field | Tandem | vLLM |\n|---|---|---|\n"
            )
        for name, says in _rows(bodies).items():
            parts.append(f"| `{name}` | {says} |")
            parts.append("\n" if vllm is None else f" {vllm.fields.get(name, 'not its own')} |\n")
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
