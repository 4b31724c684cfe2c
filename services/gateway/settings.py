"""Settings of the gateway, `TANDEM_GATEWAY_*` in the environment."""

from __future__ import annotations

import ipaddress
import tempfile
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import SettingsConfigDict

from services.gateway.syntax.families import ReasoningParserName, ToolParserName
from shared.rpc import TlsFiles
from shared.settings import ServiceSettings


class GatewaySettings(ServiceSettings):
    """Read once in `__main__`, passed down.

    Attributes:
        host, port: Where HTTP is served; port 0 lets the system choose.
        workers: Processes that share the port.
        listener: Descriptor of a socket that listens already, from a parent; -1 = none.
        grpc_port: Where KServe's protocol is served over gRPC, on the same host; 0 = any, -1 = nowhere.
        model: Directory or hub id of the checkpoint whose tokenizer and chat template are used.
        served_model_name: What clients call it, and what workers announce; "" = the last part of `model`.
        gateway_id: "" = a random one.
        tls_dir: Certificate, key and authorities for gRPC, see `shared/rpc/tls.py`; unset = plaintext.
        unknown_fields: Whether a field that no schema knows is refused or ignored.
        placement: `remote` prefills elsewhere whenever there is a prefill worker and a whole block to compute, `local`
            never does, `auto` takes the cheaper one as soon as the rates are measured, and is `remote` until then.
        min_remote_tokens: Prompts with fewer uncached tokens are prefilled by their decode worker.
        generation_defaults: `model` takes temperature, top_p, top_k, min_p and repetition_penalty from the checkpoint's
            generation_config.json where the request is silent; `openai` ignores that file.
        worker_wait_s: How long a request waits for the first decode worker to appear.
        migration_wait_s: How long a session whose worker is gone waits for another one.
        max_attempts: How many workers are asked for one session at most.
        max_lost_workers: A session whose workers died or were cut off so many times fails: it may be what kills them.
        abort_grace_s: How long a stopped choice waits for its worker's last word (cached tokens, timeline).
        request_timeout_s: A request that lasts longer ends with an error; 0 = no limit.
        max_body_bytes: Larger bodies are refused unread.
        max_choices: Bound on prompts x n of one request.
        max_stop_strings, max_stop_chars: Bounds on `stop`.
        embedding_pooling: Which hidden states make up a vector; `auto` takes the checkpoint's own
            sentence-transformers configuration, and the last token where there is none.
        max_embedding_inputs: Bound on the inputs of one embedding request.
        response_ttl_s: How long a stored response is kept in Redis.
        max_stored_bytes: Longer conversations are not stored.
        max_background_responses: Bound on those under way at this gateway.
        background_alive_s: A background response whose gateway was silent for so long counts as failed.
        files_dir: Where uploaded files and the results of batches are kept; gateways that share it share them.
        file_ttl_s, max_file_bytes: How long a file is kept, and how large it may be.
        batch_ttl_s: How long a batch can be asked for.
        max_batch_requests: Bound on the requests of one batch.
        batch_concurrency: Requests of batches under way at this gateway.
        batch_priority: Added to the priority of a batch's requests; higher is later.
        batch_poll_s: How often a gateway looks for batches that nobody works on.
        api_keys: Where the keys are kept: a file that `tandem keys` made, or `redis`; "" = no keys.
        api_key: One key more, chosen by the operator; "" = none.
        allow_unauthenticated: Serve without keys on an address that others can reach.
        max_concurrent_requests: Requests under way at this gateway; more are refused, not queued.
        max_tenant_requests: Of them, of one tenant; 0 = no bound but the former.
        heartbeat_s: A stream that is silent for so long gets a comment line, so that proxies keep it; 0 = never.
        max_schema_bytes, max_schema_depth: Bounds on a JSON schema, be it of the output or of a tool's arguments.
        max_regex_chars, max_grammar_chars: Bounds on other descriptions of the output.
        max_tools: Bound on `tools`.
        grammar_timeout_s: Checking what the output must match may take so long.
        chat_template: File with a Jinja template to use instead of the checkpoint's own.
        template_timeout_s: Rendering a conversation may take so long.
        tool_parser: How the model writes tool calls; `auto` = as its chat template does.
        reasoning_parser: How the model marks its reasoning; `auto` = as its chat template does.
        cors_origins: Web pages of these origins may call, separated by commas; "*" = all, "" = none.
        drain_s: How long open requests may go on after SIGTERM.
    """

    model_config = SettingsConfigDict(env_prefix="TANDEM_GATEWAY_", frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    workers: int = Field(default=1, ge=1, le=256)
    listener: int = Field(default=-1, ge=-1)
    grpc_port: int = Field(default=-1, ge=-1, le=65535)
    model: str = "pydoc-mini"
    served_model_name: str = ""
    gateway_id: str = ""
    redis_url: str = "redis://127.0.0.1:6379/0"
    tls_dir: Path | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["console", "json"] = "console"

    unknown_fields: Literal["refuse", "ignore"] = "refuse"
    placement: Literal["auto", "remote", "local"] = "auto"
    min_remote_tokens: int = Field(default=0, ge=0)
    generation_defaults: Literal["model", "openai"] = "model"

    worker_wait_s: float = Field(default=10.0, ge=0)
    migration_wait_s: float = Field(default=30.0, ge=0)
    max_attempts: int = Field(default=8, ge=1)
    max_lost_workers: int = Field(default=3, ge=1)
    abort_grace_s: float = Field(default=0.25, ge=0)
    request_timeout_s: float = Field(default=600.0, ge=0)
    drain_s: float = Field(default=20.0, ge=0)

    max_body_bytes: int = Field(default=16 << 20, ge=1024)
    max_choices: int = Field(default=1024, ge=1)
    max_stop_strings: int = Field(default=16, ge=0)
    max_stop_chars: int = Field(default=1024, ge=1)
    max_schema_bytes: int = Field(default=128 << 10, ge=2)
    max_schema_depth: int = Field(default=64, ge=1)
    max_regex_chars: int = Field(default=4096, ge=1)
    max_grammar_chars: int = Field(default=64 << 10, ge=1)
    max_tools: int = Field(default=128, ge=1)
    grammar_timeout_s: float = Field(default=5.0, gt=0)

    chat_template: Path | None = None
    template_timeout_s: float = Field(default=5.0, gt=0)
    tool_parser: ToolParserName = "auto"
    reasoning_parser: ReasoningParserName = "auto"

    embedding_pooling: Literal["auto", "last", "mean", "cls"] = "auto"
    max_embedding_inputs: int = Field(default=2048, ge=1)

    files_dir: Path = Path(tempfile.gettempdir()) / "tandem-files"
    file_ttl_s: float = Field(default=30 * 86_400.0, gt=0)
    max_file_bytes: int = Field(default=200 << 20, ge=1)
    batch_ttl_s: float = Field(default=30 * 86_400.0, gt=0)
    max_batch_requests: int = Field(default=50_000, ge=1)
    batch_concurrency: int = Field(default=16, ge=1)
    batch_priority: int = Field(default=1000, ge=0, le=1 << 20)
    batch_poll_s: float = Field(default=1.0, gt=0)

    response_ttl_s: float = Field(default=86_400.0, gt=0)
    max_stored_bytes: int = Field(default=4 << 20, ge=1024)
    max_background_responses: int = Field(default=256, ge=0)
    background_alive_s: float = Field(default=8.0, ge=0.1)
    api_keys: str = ""
    api_key: SecretStr = SecretStr("")
    allow_unauthenticated: bool = False
    max_concurrent_requests: int = Field(default=4096, ge=1)
    max_tenant_requests: int = Field(default=0, ge=0)
    heartbeat_s: float = Field(default=10.0, ge=0)

    cors_origins: str = ""

    @model_validator(mode="after")
    def _keys_or_loopback(self) -> Self:
        """Whoever can reach a gateway without keys can use it."""
        if not (self.asks_for_keys or self.allow_unauthenticated or _is_loopback(self.host)):
            raise ValueError(
                f"host {self.host} can be reached from elsewhere and no API keys are set: set api_keys or api_key, "
                "or say allow_unauthenticated=true"
            )
        return self

    @property
    def asks_for_keys(self) -> bool:
        """Requests need an API key."""
        return bool(self.api_keys or self.api_key.get_secret_value())

    @property
    def allowed_origins(self) -> list[str]:
        """`cors_origins`, one by one."""
        return [origin for part in self.cors_origins.split(",") if (origin := part.strip())]

    @property
    def tls(self) -> TlsFiles | None:
        """This service's identity towards the others; None = plaintext."""
        return TlsFiles(self.tls_dir) if self.tls_dir else None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
