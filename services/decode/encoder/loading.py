"""From settings to a loaded encoder."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

from shared.errors import ConfigurationError
from shared.identity import Fingerprint
from shared.models.config import resolve_dtype
from shared.models.encoder import Encoder
from shared.models.encoder_config import EncoderConfig
from shared.models.fingerprint import checkpoint_digest
from shared.models.load import TORCH_DTYPES
from shared.models.load_encoder import load_encoder
from shared.worker.cores import Cores
from shared.worker.settings import WorkerSettings

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedEncoder:
    """What a worker of an encoder stands on."""

    encoder: Encoder
    cores: Cores
    dtype: str
    fingerprint: Fingerprint


def load(settings: WorkerSettings, directory: Path) -> LoadedEncoder:
    """Reads the weights and computes once with them. Blocks for as long as that takes.

    Args:
        settings: Of the worker.
        directory: Of the checkpoint.

    Raises:
        ConfigurationError: The model cannot be had as configured.
    """
    started_s = time.monotonic()
    _refuse_unsupported(settings)
    cores = Cores.of(settings.cpus, settings.threads)
    torch.set_num_threads(cores.threads)
    config = EncoderConfig.from_pretrained(directory, max_model_len=settings.max_model_len)
    dtype = resolve_dtype(settings.dtype, "cpu")
    encoder = load_encoder(directory, config, dtype=TORCH_DTYPES[dtype])
    encoder.forward([[0]])
    digest = hashlib.blake2b(checkpoint_digest(directory) + f"{config} {dtype}".encode(), digest_size=16)
    log.info("loaded", seconds=round(time.monotonic() - started_s, 2), dtype=dtype, cpus=str(cores))
    return LoadedEncoder(encoder, cores, dtype, Fingerprint(digest.hexdigest()))


def _refuse_unsupported(settings: WorkerSettings) -> None:
    """An encoder is computed by torch on the CPU, from the weights as they are, and has no KV cache."""
    only: dict[str, tuple[str, ...]] = {
        "device": ("auto", "cpu"),
        "backend": ("auto",),
        "quantization": ("none",),
        "kv_cache_dtype": ("auto",),
        "numerics": ("fast",),
    }
    for name, allowed in only.items():
        if (value := getattr(settings, name)) not in allowed:
            raise ConfigurationError(f"{name} is {value!r}, for an encoder it must be {' or '.join(allowed)}")
