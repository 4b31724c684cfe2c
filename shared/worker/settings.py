"""Settings of an engine process, prefill or decode."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic_settings import SettingsConfigDict

from shared.rpc import TlsFiles
from shared.settings import ServiceSettings

CPU_MAX_STEP_S = 0.1


class WorkerSettings(ServiceSettings):
    """`TANDEM_WORKER_*`, read once in `__main__`.

    Attributes:
        model: Hugging Face directory or hub id, or the name of the bundled model.
        served_model_name: What clients call it; "" = the directory's or id's last part.
        worker_id: Unique in the fleet and stable over restarts.
        host, port: Where gRPC is served and announced; port 0 = any.
        tls_dir: Certificate, key and authorities for gRPC, see `shared/rpc/tls.py`; unset = plaintext.
        transfer_socket: Unix socket of this worker's kv_transfer.
        run_dir: For this worker's own Unix socket.
        arena_dir: For the KV arena file; must be memory-backed and shared with kv_transfer.
        kv_cache_bytes: Size of the arena in host memory; rounded down to whole blocks. On a GPU it is measured instead.
        gpu_memory_utilization: Part of a GPU's memory that this worker may fill: weights, activations, KV cache.
        quantization: Weights are rounded to int8 or int4 while they load; the LM head to int8 at the least.
        share_weights: Workers of a machine map one packed copy of the weights in `arena_dir`; native backend only.
        kv_cache_dtype: "auto" = that of the weights; int8 keeps a scale per token and head;
            fp8 is e4m3 as it is, on GPUs that have it.
        numerics: "invariant" = a sequence's bits are the same in every batch and after every chunking: the native CPU
            backend always is, the triton backend then uses other kernels, at a cost; others refuse.
        max_model_len: Context limit in tokens; 0 = the model's own.
        max_batch_tokens: Tokens computed per step at most.
        max_step_s: A step that computes prompts takes about so long at most; 0 = no bound but the one in tokens. Unset
            = 0.1 on a CPU, and no bound on a GPU, where a step of `max_batch_tokens` is short.
        max_sequences: Sequences running at once at most.
        max_waiting: Sequences waiting at most; more are refused as overloaded.
        cpus: Cores to compute on, like "0-3,8"; what computes is bound to them. "" = any, and nothing is bound.
        threads: Compute threads; 0 = one per core.
        drain_timeout_s: After SIGTERM, running sequences get this long to finish.
        pull_timeout_s: One fetch may take this long before its endpoint is closed.
        prefill_timeout_s: Waiting for a prefill worker's next progress at most; then the prompt is computed here.
        metrics_port: HTTP port of /metrics, /live and /ready; 0 = any, -1 = none.
    """

    model_config = SettingsConfigDict(env_prefix="TANDEM_WORKER_", frozen=True, extra="forbid")

    model: str = "pydoc-mini"
    served_model_name: str = ""
    worker_id: str
    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535)
    redis_url: str = "redis://127.0.0.1:6379/0"
    tls_dir: Path | None = None
    transfer_socket: Path
    run_dir: Path
    arena_dir: Path = Path("/dev/shm")
    block_size: Annotated[Literal[16, 32, 64, 128], BeforeValidator(int)] = 16  # the environment has text
    kv_cache_bytes: int = Field(default=512 << 20, gt=0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["none", "int8", "int4"] = "none"
    share_weights: bool = True
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "int8", "fp8"] = "auto"
    numerics: Literal["fast", "invariant"] = "fast"
    backend: Literal["auto", "reference", "cpu", "native", "triton"] = "auto"
    device: str = "auto"
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    max_model_len: int = Field(default=0, ge=0)
    max_batch_tokens: int = Field(default=512, ge=16)
    max_step_s: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    max_sequences: int = Field(default=64, ge=1)
    max_waiting: int = Field(default=1024, ge=1)
    cpus: str = ""
    threads: int = Field(default=0, ge=0)
    heartbeat_s: float = Field(default=1.0, gt=0)
    drain_timeout_s: float = Field(default=30.0, ge=0)
    pull_timeout_s: float = Field(default=30.0, gt=0)
    prefill_timeout_s: float = Field(default=30.0, gt=0)
    metrics_port: int = Field(default=0, ge=-1, le=65535)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["console", "json"] = "console"

    def max_step_s_on(self, device_type: str) -> float:
        """The bound on a step's time for a device of that type, as torch calls it."""
        if self.max_step_s is not None:
            return self.max_step_s
        return CPU_MAX_STEP_S if device_type == "cpu" else 0.0

    @property
    def tls(self) -> TlsFiles | None:
        """This service's identity towards the others; None = plaintext."""
        return TlsFiles(self.tls_dir) if self.tls_dir else None
