"""Settings of the KV-transfer service."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from shared.rpc import TlsFiles
from shared.settings import ServiceSettings


class TransferSettings(ServiceSettings):
    """`TANDEM_TRANSFER_*`, read once in `__main__`.

    Attributes:
        worker_id: Of the worker that this process stands beside.
        socket: Unix socket where the worker is served; a lock file lies beside it.
        host: Where peers are served, over gRPC and UCX, and announced unless `advertise_host` is set.
        advertise_host: Name under which peers reach this process, where that is not `host` (containers).
        port: Of the Fetch service; 0 = any.
        ucx_port: Of the UCX listener; 0 = any.
        ucx_tls: "tcp"; "shm" for sidecars that share host, user, PID and IPC namespace; "cuda" for workers on GPUs; or
            a UCX transport list.
        ucx_interfaces: Network interfaces for UCX, by name, separated by commas; "" = that of `host`. UCX binds all of
            them all the same; a filter in the kernel drops what comes for other addresses.
        ucx_admit: "callers" = only addresses from which somebody has called Fetch may connect to UCX; "any" = everybody
            who reaches its port, for networks where gRPC and UCX take different paths. Several interfaces mean "any".
            "auto" = callers; where the kernel lets this process filter nothing, any, with a warning.
        tls_dir: Certificate, key and authorities for gRPC, see `shared/rpc/tls.py`; unset = plaintext. UCX's bytes are
            never encrypted.
        tier_bytes: Host memory for blocks that the worker evicts; 0 = keep none.
        disk_bytes: Disk space for copies of them; 0 = none. Blocks get there through memory: it needs `tier_bytes`.
        disk_path: Where; a directory per worker is made there. Must outlive the process to be of use after a restart.
        heartbeat_s: Of the directory.
        drain_timeout_s: After SIGTERM, open transfers get this long to finish.
        metrics_port: HTTP port of /metrics, /live and /ready; 0 = any, -1 = none.
    """

    model_config = SettingsConfigDict(env_prefix="TANDEM_TRANSFER_", frozen=True, extra="forbid")

    worker_id: str
    socket: Path
    host: str = "127.0.0.1"
    advertise_host: str = ""
    port: int = Field(default=0, ge=0, le=65535)
    ucx_port: int = Field(default=0, ge=0, le=65535)
    ucx_tls: str = "tcp"
    ucx_interfaces: str = ""
    ucx_admit: Literal["auto", "callers", "any"] = "auto"
    redis_url: str = "redis://127.0.0.1:6379/0"
    tls_dir: Path | None = None
    heartbeat_s: float = Field(default=1.0, gt=0)
    tier_bytes: int = Field(default=1 << 30, ge=0)
    disk_bytes: int = Field(default=0, ge=0)
    disk_path: Path | None = None
    drain_timeout_s: float = Field(default=10.0, ge=0)
    metrics_port: int = Field(default=0, ge=-1, le=65535)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["console", "json"] = "console"

    @model_validator(mode="after")
    def _disk_is_complete(self) -> TransferSettings:
        if self.disk_bytes and (self.disk_path is None or not self.tier_bytes):
            raise ValueError(
                f"disk_bytes is {self.disk_bytes}: that needs a disk_path (given: {self.disk_path}) "
                f"and tier_bytes > 0 (given: {self.tier_bytes})"
            )
        return self

    @property
    def disk_root(self) -> Path | None:
        """This worker's directory on disk."""
        return self.disk_path / self.worker_id if self.disk_path is not None and self.disk_bytes else None

    @property
    def announced_host(self) -> str:
        """Where peers find this process."""
        return self.advertise_host or self.host

    @property
    def tls(self) -> TlsFiles | None:
        """This service's identity towards the others; None = plaintext."""
        return TlsFiles(self.tls_dir) if self.tls_dir else None
