"""What a cluster consists of: from the user's wishes to one `ProcessSpec` per process. Starts nothing.

run_dir/
state.json            what runs, for `tandem status` and `tandem down`
lock                  held by the supervisor as long as it lives
logs/NAME.log         one per process; NAME.log.1 is the previous cluster's
NAME.transfer.sock    kv_transfer, for its worker
NAME.host.sock        worker, for its kv_transfer
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from services.cli.certificates import Member, fleet_members, issue_certificates
from services.cli.process import ProcessSpec, python_module
from shared.cpu_list import format_cpus, share_cpus
from shared.directory.redis_server import find_redis_binary, redis_command
from shared.errors import ConfigurationError
from shared.rpc.tls import PeerRole

# Each service bounds its own drain below this; what is still there then is stuck.
_GATEWAY_GRACE_S = 25.0
_WORKER_GRACE_S = 35.0
_TRANSFER_GRACE_S = 15.0
_TRANSFER_RESTART_S = 0.05  # a malformed message can end UCX; the worker's transfers wait for the next life

COMPUTE_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}
"""For engine processes. OpenMP's threads spin between two operators by default and take the cores from the sidecar, the
gateway and each other: with two threads on two shared cores a decode step then takes ten times as long."""


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """What the user asked for, checked and made definite.

    Attributes:
        model_dir: Local checkpoint.
        served_model_name: What clients call it.
        is_encoder: The model embeds only: no KV, so no prefill workers and no kv_transfer.
        prefill, decode: Numbers of workers.
        host, port: Of the gateway.
        gateway_workers: Its processes.
        gateway_options: More of its settings by name; "" = as its environment says.
        redis_url: "" = a Redis of our own.
        kv_cache_bytes: Per worker.
        tier_bytes: Host memory per worker for blocks that its cache evicted.
        disk_bytes: Disk per worker for copies of them; 0 = none.
        disk_path: Where; None = in the run directory.
        cpus: That the engine workers divide among themselves.
        threads: Compute threads per worker; 0 = one for each of its CPUs.
        max_model_len: 0 = the model's own.
        tls_dir: Certificates as `tandem certs` issues them; None = plaintext between the services.
        ready_timeout_s: For all of it to come up.
    """

    model_dir: Path
    served_model_name: str
    run_dir: Path
    is_encoder: bool = False
    prefill: int = 1
    decode: int = 1
    host: str = "127.0.0.1"
    port: int = 8000
    gateway_workers: int = 1
    gateway_options: Mapping[str, str] = field(default_factory=dict)
    redis_url: str = ""
    kv_cache_bytes: int = 512 << 20
    tier_bytes: int = 1 << 30
    disk_bytes: int = 0
    disk_path: Path | None = None
    dtype: str = "auto"
    quantization: str = "none"
    kv_cache_dtype: str = "auto"
    numerics: str = "fast"
    backend: str = "auto"
    device: str = "cpu"
    gpu_memory_utilization: float = 0.9
    cpus: tuple[int, ...] = ()
    threads: int = 1
    max_model_len: int = 0
    log_level: str = "info"
    tls_dir: Path | None = None
    ready_timeout_s: float = 900.0

    @property
    def url(self) -> str:
        """Where a client on this machine reaches the gateway."""
        host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def log_dir(self) -> Path:
        """One file per process."""
        return self.run_dir / "logs"

    @property
    def cluster_id(self) -> str:
        """Tells this machine's clusters apart; the same after a restart in the same run directory."""
        return hashlib.blake2b(str(self.run_dir).encode(), digest_size=4).hexdigest()

    @property
    def arena_dir(self) -> Path:
        """Shared memory of this cluster's workers, nobody else's."""
        return Path("/dev/shm") / f"tandem-{os.getuid()}-{self.cluster_id}"

    def tls_environment(self, variable: str, role: PeerRole, member_id: str = "") -> dict[str, str]:
        """What tells a service where its certificate is; nothing without TLS."""
        if self.tls_dir is None:
            return {}
        return {variable: str(self.tls_dir / Member(role, member_id).directory_name)}

    def worker_id(self, name: str) -> str:
        """A Redis that others use too may hold other clusters' workers of that name."""
        return f"{name}-{self.cluster_id}" if self.redis_url else name


def free_port() -> int:
    """A TCP port on the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def with_certificates(spec: ClusterSpec) -> ClusterSpec:
    """The same cluster with mutual TLS: certificates are issued anew in its run directory."""
    prefill_ids = [spec.worker_id(f"prefill-{index}") for index in range(spec.prefill)]
    decode_ids = [spec.worker_id(f"decode-{index}") for index in range(spec.decode)]
    return replace(spec, tls_dir=issue_certificates(spec.run_dir / "tls", fleet_members(prefill_ids, decode_ids)))


def plan(spec: ClusterSpec) -> tuple[str, list[ProcessSpec]]:
    """The processes to run and the Redis they meet at.

    Returns:
        Redis URL, specs.

    Raises:
        ConfigurationError: No Redis to run.
    """
    specs: list[ProcessSpec] = []
    redis_url = spec.redis_url
    if not redis_url:
        port = free_port()
        redis_url = f"redis://127.0.0.1:{port}/0"
        specs.append(_redis(spec, port))
    names = [f"prefill-{index}" for index in range(spec.prefill)] + [f"decode-{index}" for index in range(spec.decode)]
    for name, cpus in zip(names, share_cpus(spec.cpus, len(names)), strict=True):
        if not spec.is_encoder:
            specs.append(_transfer(spec, name, redis_url))
        specs.append(_worker(spec, name, redis_url, cpus))
    specs.append(_gateway(spec, redis_url))
    return redis_url, specs


def transfer_socket(spec: ClusterSpec, name: str) -> Path:
    """Where the sidecar of the worker called `name` serves it."""
    return spec.run_dir / f"{name}.transfer.sock"


def _redis(spec: ClusterSpec, port: int) -> ProcessSpec:
    binary = find_redis_binary()
    if binary is None:
        raise ConfigurationError(
            "no redis-server on this machine: `apt install redis-server`, or give one's address with --redis-url"
        )
    command = redis_command(binary, spec.run_dir, port, {"logfile": ""})
    return ProcessSpec(name="redis", role="redis", command=tuple(command), log_path=spec.log_dir / "redis.log")


def _transfer(spec: ClusterSpec, name: str, redis_url: str) -> ProcessSpec:
    worker_id = spec.worker_id(name)
    return ProcessSpec(
        name=f"{name}.transfer",
        role="kv_transfer",
        worker_id=worker_id,
        command=python_module("services.kv_transfer"),
        module="services.kv_transfer",
        log_path=spec.log_dir / f"{name}.transfer.log",
        stop_grace_s=_TRANSFER_GRACE_S,
        restart_after_s=_TRANSFER_RESTART_S,
        environment={
            "TANDEM_TRANSFER_SOCKET": str(transfer_socket(spec, name)),
            "TANDEM_TRANSFER_WORKER_ID": worker_id,
            "TANDEM_TRANSFER_REDIS_URL": redis_url,
            "TANDEM_TRANSFER_TIER_BYTES": str(spec.tier_bytes),
            "TANDEM_TRANSFER_DISK_BYTES": str(spec.disk_bytes),
            "TANDEM_TRANSFER_DISK_PATH": str((spec.disk_path or spec.run_dir / "kv").absolute()),
            "TANDEM_TRANSFER_LOG_LEVEL": spec.log_level,
            **({"TANDEM_TRANSFER_UCX_TLS": "cuda"} if spec.device.startswith("cuda") else {}),
            **spec.tls_environment("TANDEM_TRANSFER_TLS_DIR", PeerRole.TRANSFER, worker_id),
        },
    )


def _worker(spec: ClusterSpec, name: str, redis_url: str, cpus: tuple[int, ...]) -> ProcessSpec:
    worker_id = spec.worker_id(name)
    is_prefill = name.startswith("prefill-")
    return ProcessSpec(
        name=name,
        role="prefill" if is_prefill else "decode",
        worker_id=worker_id,
        command=python_module("services.prefill" if is_prefill else "services.decode"),
        log_path=spec.log_dir / f"{name}.log",
        stop_grace_s=_WORKER_GRACE_S,
        environment={
            "TANDEM_WORKER_MODEL": str(spec.model_dir),
            "TANDEM_WORKER_SERVED_MODEL_NAME": spec.served_model_name,
            "TANDEM_WORKER_WORKER_ID": worker_id,
            "TANDEM_WORKER_REDIS_URL": redis_url,
            "TANDEM_WORKER_TRANSFER_SOCKET": str(transfer_socket(spec, name)),
            "TANDEM_WORKER_RUN_DIR": str(spec.run_dir),
            "TANDEM_WORKER_ARENA_DIR": str(spec.arena_dir),
            "TANDEM_WORKER_KV_CACHE_BYTES": str(spec.kv_cache_bytes),
            "TANDEM_WORKER_DTYPE": spec.dtype,
            "TANDEM_WORKER_QUANTIZATION": spec.quantization,
            "TANDEM_WORKER_KV_CACHE_DTYPE": spec.kv_cache_dtype,
            "TANDEM_WORKER_NUMERICS": spec.numerics,
            "TANDEM_WORKER_BACKEND": spec.backend,
            "TANDEM_WORKER_DEVICE": spec.device,
            "TANDEM_WORKER_GPU_MEMORY_UTILIZATION": str(spec.gpu_memory_utilization),
            "TANDEM_WORKER_MAX_MODEL_LEN": str(spec.max_model_len),
            "TANDEM_WORKER_CPUS": format_cpus(cpus),
            "TANDEM_WORKER_THREADS": str(spec.threads or len(cpus) or 1),
            "TANDEM_WORKER_LOG_LEVEL": spec.log_level,
            **spec.tls_environment("TANDEM_WORKER_TLS_DIR", PeerRole("prefill" if is_prefill else "decode"), worker_id),
            **COMPUTE_ENVIRONMENT,
        },
    )


def _gateway(spec: ClusterSpec, redis_url: str) -> ProcessSpec:
    return ProcessSpec(
        name="gateway",
        role="gateway",
        command=python_module("services.gateway"),
        log_path=spec.log_dir / "gateway.log",
        stop_grace_s=_GATEWAY_GRACE_S,
        environment={
            "TANDEM_GATEWAY_HOST": spec.host,
            "TANDEM_GATEWAY_PORT": str(spec.port),
            "TANDEM_GATEWAY_WORKERS": str(spec.gateway_workers),
            "TANDEM_GATEWAY_MODEL": str(spec.model_dir),
            "TANDEM_GATEWAY_SERVED_MODEL_NAME": spec.served_model_name,
            "TANDEM_GATEWAY_REDIS_URL": redis_url,
            "TANDEM_GATEWAY_FILES_DIR": str(spec.run_dir / "files"),
            "TANDEM_GATEWAY_LOG_LEVEL": spec.log_level,
            **{f"TANDEM_GATEWAY_{name}": value for name, value in spec.gateway_options.items() if value},
            **spec.tls_environment("TANDEM_GATEWAY_TLS_DIR", PeerRole.GATEWAY),
        },
    )
