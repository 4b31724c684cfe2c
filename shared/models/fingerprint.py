"""Names what must be equal for two workers to exchange KV. Imports no torch; takes milliseconds, also for 100 GB."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from pathlib import Path
from typing import BinaryIO, Protocol

from shared.errors import ConfigurationError
from shared.identity import Fingerprint
from shared.kv_arena import LAYOUT_VERSION, KvLayout
from shared.models.config import ModelConfig
from shared.models.safetensors_files import checkpoint_files

SAMPLE_BYTES = 4096
MAX_SAMPLES_PER_FILE = 4096
MAX_HEADER_BYTES = 100 << 20

_IRRELEVANT = frozenset({"eos_token_ids", "max_model_len", "checkpoint_dtype"})
"""Fields of the configuration that leave KV as it is."""


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...


def model_fingerprint(
    directory: Path, config: ModelConfig, dtype: str, layout: KvLayout, numerics: str = "torch"
) -> Fingerprint:
    """Hash of the weights, the architecture, the dtype and the cache layout.

    Weights count by the header of every safetensors file (names, shapes, dtypes, offsets) and by bytes sampled at the
    start and in the middle of every tensor, so a fine-tuned copy that changed any layer as a whole differs.

    Args:
        directory: The checkpoint.
        config: Of the same checkpoint.
        dtype: That the model computes in, from `resolve_dtype`.
        layout: Of the KV cache.
        numerics: Of the kernels' backend.

    Raises:
        ConfigurationError: A weights file is missing or is not safetensors.
    """
    digest = hashlib.blake2b(digest_size=16, person=b"tandem-fp")
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _IRRELEVANT}
    identity = [LAYOUT_VERSION, dtype, numerics, dataclasses.asdict(layout), settings]
    digest.update(json.dumps(identity, sort_keys=True).encode())
    _add_checkpoint(digest, directory)
    return Fingerprint(digest.hexdigest())


def checkpoint_digest(directory: Path) -> bytes:
    """Hash of a checkpoint's weights, by the same samples; 16 bytes.

    Raises:
        ConfigurationError: As `model_fingerprint`.
    """
    digest = hashlib.blake2b(digest_size=16, person=b"tandem-weights")
    _add_checkpoint(digest, directory)
    return digest.digest()


def _add_checkpoint(digest: _Digest, directory: Path) -> None:
    for file in checkpoint_files(directory):
        with file.open("rb") as stream:
            _add_file(digest, stream, file)


def _add_file(digest: _Digest, stream: BinaryIO, file: Path) -> None:
    """Adds header and samples of one safetensors file: u64 header length, JSON header, tensor bytes."""
    try:
        (header_bytes,) = struct.unpack("<Q", stream.read(8))
        if header_bytes > MAX_HEADER_BYTES:
            raise ValueError(f"header of {header_bytes} bytes")
        header = stream.read(header_bytes)
        tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        spans = sorted(tuple(entry["data_offsets"]) for entry in tensors.values())
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as exc:
        raise ConfigurationError(f"{file}: not a readable safetensors file: {exc}") from exc
    digest.update(json.dumps(tensors, sort_keys=True).encode())
    data_start = 8 + header_bytes
    for offset, length in _samples(spans):
        stream.seek(data_start + offset)
        digest.update(stream.read(length))


def _samples(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(offset, length) of what to read: each tensor's start and middle; every n-th tensor if there are very many."""
    stride = max(1, -(-2 * len(spans) // MAX_SAMPLES_PER_FILE))
    samples: list[tuple[int, int]] = []
    for begin, end in spans[::stride]:
        middle = begin + (end - begin) // 2
        samples.append((begin, min(SAMPLE_BYTES, end - begin)))
        samples.append((middle, min(SAMPLE_BYTES, end - middle)))
    return samples
