"""From a chat body to the text that the model continues."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from services.gateway.requests.messages import template_messages
from services.gateway.schemas.chat import ChatBody
from services.gateway.served_model import ServedModel
from services.gateway.settings import GatewaySettings
from services.gateway.syntax.thinking_fields import thinking_variables
from services.gateway.syntax.tool_fields import offered_tools
from shared.errors import InvalidRequest, UnsupportedField
from shared.tokenization.chat_template import ChatTemplate

_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")


def chat_prompt(body: ChatBody, model: ServedModel, settings: GatewaySettings) -> Callable[[], str]:
    """Checks what the template will get; returns what renders it.

    Raises:
        InvalidRequest: The model has no template, or the template no place for what the body wants to say.
    """
    template = model.chat_template
    if template is None:
        raise InvalidRequest("the model has no chat template: use /v1/completions", param="messages")
    continues = bool(body.continue_final_message)
    if continues and body.add_generation_prompt:
        raise InvalidRequest(
            "'continue_final_message' and 'add_generation_prompt' exclude each other", param="add_generation_prompt"
        )
    if body.documents and not template.mentions("documents"):
        raise UnsupportedField("'documents' is not supported: the chat template has no place for it", param="documents")
    messages = template_messages(body.messages, settings.unknown_fields)
    render = partial(
        template.render,
        messages,
        add_generation_prompt=body.add_generation_prompt is not False and not continues,
        tools=[tool.model_dump(exclude_none=True) for tool in offered_tools(body, model.syntax, settings)],
        documents=body.documents,
        variables=_variables(body, model, template),
    )
    return partial(_open_ended, render, messages[-1]) if continues else render


def _variables(body: ChatBody, model: ServedModel, template: ChatTemplate) -> dict[str, object]:
    wanted = body.chat_template_kwargs or {}
    for name in wanted:
        if name in _RESERVED:
            raise InvalidRequest(f"'chat_template_kwargs.{name}': use the field of that name", param=name)
        if not template.mentions(name):
            raise UnsupportedField(
                f"'chat_template_kwargs.{name}' is not supported: the chat template does not read it",
                param=f"chat_template_kwargs.{name}",
            )
    return {**thinking_variables(body, model.syntax, template), **wanted}


def _open_ended(render: Callable[[], str], last: dict[str, object]) -> str:
    """The rendered conversation up to the end of what the last message says."""
    text, said = render(), str(last["content"]).strip()
    if last["role"] != "assistant" or not said:
        raise InvalidRequest(
            "'continue_final_message' needs a last message of the assistant, with content",
            param="continue_final_message",
        )
    begin = text.rfind(said)
    if begin < 0:
        raise InvalidRequest(
            "the chat template does not repeat the last message as it is", param="continue_final_message"
        )
    return text[: begin + len(said)]
