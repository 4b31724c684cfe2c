"""Settings of the gateway, `TANDEM_GATEWAY_*` in the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from shared.rpc import TlsFiles
from shared.settings import ServiceSettings


class GatewaySettings(ServiceSettings):
    """Read once in `__main__`, passed down.

    Attributes:
        host, port: Where HTTP is served; port 0 lets the system choose.
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
        abort_grace_s: How long a stopped choice waits for its worker's last word (cached tokens, timeline).
        request_timeout_s: A request that lasts longer ends with an error; 0 = no limit.
        max_body_bytes: Larger bodies are refused unread.
        max_choices: Bound on prompts x n of one request.
        max_stop_strings, max_stop_chars: Bounds on `stop`.
        response_ttl_s: How long a stored response is kept in Redis.
        max_stored_bytes: Longer conversations are not stored.
        max_background_responses: Bound on those under way at this gateway.
        background_alive_s: A background response whose gateway was silent for so long counts as failed.
        cors_origins: Web pages of these origins may call, separated by commas; "*" = all, "" = none.
        drain_s: How long open requests may go on after SIGTERM.
    """

    model_config = SettingsConfigDict(env_prefix="TANDEM_GATEWAY_", frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    model: str = "pydoc-mini"
    served_model_name: str = ""
    gateway_id: str = ""
    redis_url: str = "redis://127.0.0.1:6379/0"
    tls_dir: Path | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["console", "json"] = "console"

    unknown_fields: Literal["refuse", "ignore"] = "refuse"
    placement: Literal["auto", "remote", "local"] = "remote"
    min_remote_tokens: int = Field(default=0, ge=0)
    generation_defaults: Literal["model", "openai"] = "model"

    worker_wait_s: float = Field(default=10.0, ge=0)
    abort_grace_s: float = Field(default=0.25, ge=0)
    request_timeout_s: float = Field(default=600.0, ge=0)
    drain_s: float = Field(default=20.0, ge=0)

    max_body_bytes: int = Field(default=16 << 20, ge=1024)
    max_choices: int = Field(default=1024, ge=1)
    max_stop_strings: int = Field(default=16, ge=0)
    max_stop_chars: int = Field(default=1024, ge=1)

    response_ttl_s: float = Field(default=86_400.0, gt=0)
    max_stored_bytes: int = Field(default=4 << 20, ge=1024)
    max_background_responses: int = Field(default=256, ge=0)
    background_alive_s: float = Field(default=8.0, ge=0.1)

    cors_origins: str = ""

    @property
    def allowed_origins(self) -> list[str]:
        """`cors_origins`, one by one."""
        return [origin for part in self.cors_origins.split(",") if (origin := part.strip())]

    @property
    def tls(self) -> TlsFiles | None:
        """This service's identity towards the others; None = plaintext."""
        return TlsFiles(self.tls_dir) if self.tls_dir else None
