"""The model as the gateway knows it: its name, its text side, its limits. No weights."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from services.gateway.settings import GatewaySettings
from services.gateway.syntax.families import ModelSyntax, model_syntax
from shared.errors import ConfigurationError, InvalidRequest, ModelNotFound
from shared.models.config import ModelConfig
from shared.models.embedding import EmbeddingConfig
from shared.models.encoder_config import EncoderConfig, is_encoder
from shared.models.resolve import resolve_model
from shared.tokenization.chat_template import ChatTemplate
from shared.tokenization.tokenizer import Tokenizer, read_json


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a request that is silent about sampling gets."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_pretrained(cls, directory: Path) -> SamplingDefaults:
        """The checkpoint's own recommendation in `generation_config.json`; `"do_sample": false` there means greedy.

        Raises:
            ConfigurationError: A value is not a number.
        """
        config = read_json(directory / "generation_config.json")
        values: dict[str, float] = {}
        for field in fields(cls):
            value = config.get(field.name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigurationError(f"generation_config.json: {field.name} is {value!r}, not a number")
            values[field.name] = int(value) if field.name == "top_k" else float(value)
        if config.get("do_sample") is False:
            values["temperature"] = 0.0
        return cls(**values)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Immutable; shared by all requests.

    Attributes:
        vocab_size: Of the model; prompt token ids and logit_bias keys lie below it.
        max_model_len: The checkpoint's own limit. Workers may announce a lower one.
        embedding: How its hidden states become vectors.
        created: Unix seconds, for `/v1/models`.
        directory: Of the checkpoint.
        eos_token_ids: The model's own.
        syntax: How it writes tool calls and reasoning.
        is_encoder: It embeds texts and generates none.
    """

    name: str
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    defaults: SamplingDefaults
    vocab_size: int
    max_model_len: int
    embedding: EmbeddingConfig
    created: int
    directory: Path
    eos_token_ids: tuple[int, ...]
    syntax: ModelSyntax
    is_encoder: bool = False

    def check_generates(self) -> None:
        """Refuses generation where the model has none.

        Raises:
            InvalidRequest: It is an encoder.
        """
        if self.is_encoder:
            raise InvalidRequest(
                f"the model {self.name!r} embeds texts and generates none: ask /v1/embeddings", param="model"
            )

    def check_name(self, name: str) -> None:
        """Refuses a model that is not served here.

        Raises:
            ModelNotFound: `name` is not this model.
        """
        if name != self.name:
            raise ModelNotFound(f"the model {name!r} does not exist here; {self.name!r} does", param="model")


def load_model(settings: GatewaySettings, *, created: int) -> ServedModel:
    """Reads what the gateway needs of a checkpoint; blocks, and downloads from the hub if it must.

    Raises:
        ConfigurationError: The checkpoint is missing, unsupported or broken.
    """
    directory = resolve_model(settings.model, with_weights=False)
    embeds_only = is_encoder(directory)
    config = (EncoderConfig if embeds_only else ModelConfig).from_pretrained(directory)
    template = ChatTemplate.from_pretrained(directory, settings.chat_template)
    from_model = settings.generation_defaults == "model"
    return ServedModel(
        name=settings.served_model_name or Path(settings.model).name,
        tokenizer=Tokenizer.from_pretrained(directory),
        chat_template=template,
        defaults=SamplingDefaults.from_pretrained(directory) if from_model else SamplingDefaults(),
        vocab_size=config.vocab_size,
        max_model_len=config.max_model_len,
        embedding=_embedding(directory, settings, embeds_only=embeds_only),
        created=created,
        directory=directory,
        eos_token_ids=() if isinstance(config, EncoderConfig) else config.eos_token_ids,
        syntax=model_syntax(
            template.source if template is not None else "",
            str(read_json(directory / "config.json").get("model_type", "")),
            settings.tool_parser,
            settings.reasoning_parser,
        ),
        is_encoder=embeds_only,
    )


def _embedding(directory: Path, settings: GatewaySettings, *, embeds_only: bool) -> EmbeddingConfig:
    if not embeds_only:
        return EmbeddingConfig.from_pretrained(directory, settings.embedding_pooling)
    embedding = EmbeddingConfig.from_pretrained(directory, settings.embedding_pooling, default="mean")
    if embedding.pooling == "last":
        raise ConfigurationError(f"{directory}: an encoder pools the first token (cls) or the mean, not the last token")
    return embedding
