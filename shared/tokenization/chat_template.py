"""Renders a conversation to the prompt text that a checkpoint was trained on.

The template is the checkpoint's own Jinja source, run in a sandbox in the environment that Hugging Face's tokenizers
give it: `tojson`, `raise_exception`, `strftime_now`, loop controls, `{% generation %}` blocks, trimmed block lines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.errors import ConfigurationError, InvalidRequest
from shared.tokenization.tokenizer import read_json

_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class ChatTemplate:
    """A compiled template with the special tokens it may name. Immutable; rendering holds the GIL.

    Attributes:
        source: As written.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compiles the template.

        Raises:
            ConfigurationError: The source is not a valid template.
        """
        environment = _environment()
        try:
            self._template: Template = environment.from_string(source)
            self._variables = meta.find_undeclared_variables(environment.parse(source))
        except TemplateError as exc:
            raise ConfigurationError(f"the checkpoint's chat template does not compile: {exc}") from exc
        self._special_tokens = dict(special_tokens)
        self.source = source

    @classmethod
    def from_pretrained(cls, directory: Path, override: Path | None = None) -> ChatTemplate | None:
        """The template of `chat_template.jinja` or `tokenizer_config.json`; None when the checkpoint has none.

        Args:
            directory: The checkpoint.
            override: A template to use instead.

        Raises:
            ConfigurationError: The file is missing, or no valid template.
        """
        config = read_json(directory / "tokenizer_config.json")
        names = read_json(directory / "special_tokens_map.json") | config
        special = {name: _token_text(names[name]) for name in _SPECIAL_TOKENS if names.get(name)}
        if override is not None:
            if not override.is_file():
                raise ConfigurationError(f"the chat template {override} does not exist")
            return cls(override.read_text(encoding="utf-8"), special)
        file = directory / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.is_file() else _default_source(config.get("chat_template"))
        return cls(source, special) if source else None

    def mentions(self, name: str) -> bool:
        """It reads a variable of that name, which whoever renders it may set."""
        return name in self._variables

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt text, special tokens spelled out.

        Args:
            messages: Each with `role` and `content`, in order.
            add_generation_prompt: End with the beginning of the assistant's turn.
            tools: Functions that the model may call, as OpenAI describes them; None or empty = none.
            documents: For templates that know them.
            variables: Whatever else the template reads; none of the names above.

        Raises:
            InvalidRequest: The template refuses these messages, or fails on them.
        """
        try:
            return self._template.render(
                **(variables or {}),
                **self._special_tokens,
                messages=messages,
                tools=tools or None,  # templates test these against none, not for being defined
                documents=documents or None,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, OverflowError) as exc:
            raise InvalidRequest(f"the model's chat template refuses these messages: {exc}", param="messages") from exc


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value: object, indent: int | None = None, **options: bool) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, sort_keys=options.get("sort_keys", False))


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _token_text(value: object) -> str:
    return str(value["content"]) if isinstance(value, dict) else str(value)


def _default_source(value: object) -> str:
    """Old checkpoints name several templates in a list; the one called "default" is meant for chat."""
    if isinstance(value, list):
        return next((str(entry["template"]) for entry in value if entry.get("name") == "default"), "")
    return str(value) if value else ""
