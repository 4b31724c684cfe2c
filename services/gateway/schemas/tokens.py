"""`POST /tokenize` and `POST /detokenize`: vLLM's shapes."""

from __future__ import annotations

from services.gateway.schemas.body import Body
from services.gateway.schemas.chat import ChatBody
from services.gateway.schemas.reply import Reply


class TokenizeTextBody(Body):
    """A text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatBody(ChatBody):
    """A conversation: any chat request may be sent as it is. Its tokens are those that generation begins with."""

    model: str = ""
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """Token ids."""

    model: str | None = None
    tokens: list[int]


class TokenizeReply(Reply):
    """`token_strs` are the vocabulary's own spellings, if asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeReply(Reply):
    """The text."""

    prompt: str
