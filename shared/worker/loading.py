"""From settings to a loaded engine, with progress in the log."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import torch

from kernels.backend import Backend, load_backend
from kernels.quantization import Quantization
from shared.device_arena import DeviceArena
from shared.directory.records import Role
from shared.engine.block_pool import BlockPool
from shared.engine.config import EngineConfig
from shared.engine.engine import Engine
from shared.engine.kv_cache import KvCache, num_blocks_for
from shared.engine.runner import ModelRunner
from shared.engine.step import StepOutputs
from shared.errors import ConfigurationError
from shared.identity import Fingerprint, WorkerId
from shared.kv_arena import KvLayout, SharedArena
from shared.models.config import ModelConfig, resolve_dtype
from shared.models.decoder import Decoder
from shared.models.fingerprint import model_fingerprint
from shared.models.load import TORCH_DTYPES, load_decoder
from shared.models.resolve import resolve_model
from shared.worker.arena_adoption import Ask, WorkerArena, open_worker_arena
from shared.worker.cores import Cores
from shared.worker.guides import Guides
from shared.worker.settings import WorkerSettings

if TYPE_CHECKING:
    from shared.engine.device_runner import DeviceRunner

log = structlog.get_logger(__name__)

_PROGRESS_S = 1.0

OnStep = Callable[[StepOutputs], None]


@dataclass(slots=True)
class LoadedEngine:
    """A worker's engine and what it stands on; whoever loaded it closes it.

    Attributes:
        is_left: The arena is kv_transfer's from now on, to be served and to be handed to this worker's next life.
    """

    engine: Engine
    memory: WorkerArena
    layout: KvLayout
    dtype: str
    cores: Cores
    fingerprint: Fingerprint
    served_name: str
    backend_name: str
    max_model_len: int
    vocab_size: int
    guides: Guides
    is_left: bool = False

    @property
    def arena(self) -> SharedArena | DeviceArena:
        """The KV blocks."""
        return self.memory.arena

    def close(self) -> None:
        """Removes the arena's files, unless they were left to kv_transfer."""
        self.guides.close()
        if not self.is_left:
            self.memory.unlink()


def load_engine(settings: WorkerSettings, role: Role, on_step: OnStep, ask: Ask) -> LoadedEngine:
    """Everything between settings and an engine that can be started. Blocks for as long as the weights take.

    Args:
        settings: Of the worker.
        role: Likewise.
        on_step: Takes the engine's outputs.
        ask: Asks kv_transfer whether the arena of an earlier life may be used.

    Raises:
        ConfigurationError: The model or the arena cannot be had as configured.
    """
    started_s = time.monotonic()
    cores = Cores.of(settings.cpus, settings.threads)
    torch.set_num_threads(cores.threads)
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if settings.device == "auto" else settings.device
    )
    directory = resolve_model(settings.model)
    config = ModelConfig.from_pretrained(directory, max_model_len=settings.max_model_len)
    dtype = resolve_dtype(settings.dtype, device.type)
    backend = _backend(settings, device, TORCH_DTYPES[dtype])
    if backend.library is not None:
        cores.bind_kernels(backend.library)
    kv_dtype = _kv_dtype(settings.kv_cache_dtype, dtype, backend)
    layout = KvLayout(config.num_layers, settings.block_size, config.num_kv_heads, config.head_dim, kv_dtype)
    model = load_decoder(
        directory,
        config,
        dtype=dtype,
        device=device,
        backend=backend,
        with_lm_head=role == "decode",
        progress=_LoadingLog(),
        share_weights_in=settings.arena_dir if settings.share_weights else None,
    )
    fingerprint = model_fingerprint(directory, config, dtype, layout, backend.numerics)
    runner, memory = _runner(settings, model, layout, fingerprint, ask)
    arena = memory.arena
    pool = BlockPool(arena.num_blocks, settings.block_size, *([memory.table.record] if memory.table else []))
    pool.adopt(memory.adopted)
    engine = Engine(
        runner,
        pool,
        EngineConfig(
            block_size=settings.block_size,
            max_model_len=config.max_model_len,
            eos_token_ids=frozenset(config.eos_token_ids),
            max_batch_tokens=settings.max_batch_tokens,
            max_step_s=settings.max_step_s_on(device.type),
            max_sequences=settings.max_sequences,
            max_waiting=settings.max_waiting,
            role=role,
        ),
        on_step,
        cores.bind_this_thread,
    )
    log.info(
        "loaded",
        seconds=round(time.monotonic() - started_s, 2),
        dtype=dtype,
        quantization=settings.quantization,
        kv=kv_dtype,
        cpus=str(cores),
        threads=cores.threads,
        blocks=arena.num_blocks,
    )
    return LoadedEngine(
        engine=engine,
        memory=memory,
        layout=layout,
        dtype=dtype,
        cores=cores,
        fingerprint=fingerprint,
        served_name=settings.served_model_name or Path(settings.model).name,
        backend_name=backend.name,
        # What the cache could never hold must not be promised.
        max_model_len=min(config.max_model_len, arena.num_blocks * settings.block_size),
        vocab_size=config.vocab_size,
        guides=Guides(directory, config.vocab_size, frozenset(config.eos_token_ids)),
    )


def _runner(
    settings: WorkerSettings, model: Decoder, layout: KvLayout, fingerprint: Fingerprint, ask: Ask
) -> tuple[ModelRunner | DeviceRunner, WorkerArena]:
    """What computes steps, warmed up, and the KV memory it does it in."""
    if model.device.type != "cpu":
        from shared.worker.device_loading import load_on_device  # needs Triton, which CPU images lack

        device_runner, device_arena = load_on_device(model, layout, settings)
        return device_runner, WorkerArena(device_arena, None, [])
    memory = open_worker_arena(
        settings.arena_dir / f"tandem-{settings.worker_id}.kv",
        num_blocks_for(settings.kv_cache_bytes, layout),
        layout.block_bytes,
        fingerprint,
        WorkerId(settings.worker_id),
        ask,
    )
    assert isinstance(memory.arena, SharedArena), "a CPU worker's blocks are in shared memory"
    runner = ModelRunner(
        model,
        KvCache(memory.arena, layout),
        max_batch_tokens=settings.max_batch_tokens,
        max_sequences=settings.max_sequences,
        max_model_len=model.config.max_model_len,
    )
    runner.warm_up(lambda done, total: log.info("warming_up", done=done, total=total))
    return runner, memory


def _backend(settings: WorkerSettings, device: torch.device, dtype: torch.dtype) -> Backend:
    quantization = Quantization(settings.quantization)
    try:
        return load_backend(settings.backend, device, dtype, quantization, settings.numerics)
    except (ValueError, ImportError) as exc:
        raise ConfigurationError(f"kernel backend: {exc}") from exc


def _kv_dtype(wanted: str, dtype: str, backend: Backend) -> str:
    """The KV cache's element type.

    Raises:
        ConfigurationError: The backend, or its device, does not cache in this one.
    """
    if wanted in ("auto", dtype):
        return dtype
    if wanted == "fp8":
        encodings = [name for name in backend.kv_dtypes if name.startswith("float8")]
        if not encodings:
            raise ConfigurationError(
                f"kv_cache_dtype is fp8, but the {backend.name} backend has no e4m3 here; "
                "the triton backend has it on NVIDIA GPUs from sm_90 on (not sm_80) and on AMD's gfx942 and gfx950"
            )
        return encodings[0]
    if wanted not in backend.kv_dtypes:
        raise ConfigurationError(
            f"kv_cache_dtype is {wanted}, but the {backend.name} backend caches in the weights' {dtype}"
            f"{''.join(f' or {name}' for name in sorted(backend.kv_dtypes))} only; "
            "the native CPU backend has float32, bfloat16 and int8, the triton backend fp8"
        )
    return wanted


class _LoadingLog:
    """Logs how far the weights are, at most once a second and at the end."""

    def __init__(self) -> None:
        self._logged_s = 0.0

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        now_s = time.monotonic()
        if now_s - self._logged_s >= _PROGRESS_S or done_bytes == total_bytes:
            self._logged_s = now_s
            log.info("loading", percent=round(100 * done_bytes / max(1, total_bytes)), mib=done_bytes >> 20)
