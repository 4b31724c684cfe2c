"""A runner on a device and its KV cache, which takes the memory that is left."""

from __future__ import annotations

import structlog
import torch

from shared.device_arena import DeviceArena
from shared.engine.device_kv_cache import DeviceKvCache
from shared.engine.device_memory import measure_device_memory
from shared.engine.device_runner import DeviceRunner
from shared.errors import ConfigurationError
from shared.kv_arena import KvLayout
from shared.models.decoder import Decoder
from shared.worker.checksum_kernels import checksum_kernels
from shared.worker.settings import WorkerSettings

log = structlog.get_logger(__name__)


def load_on_device(model: Decoder, layout: KvLayout, settings: WorkerSettings) -> tuple[DeviceRunner, DeviceArena]:
    """Measures what steps need, gives the rest to the KV cache, compiles and captures every step, and the checksum.

    Raises:
        ConfigurationError: The model does not fit, said with the sums; or device memory cannot be shared.
    """
    if model.device.type != "cuda":
        raise ConfigurationError(f"device {model.device} has no runner; there are cpu and cuda")
    limits = {
        "max_batch_tokens": settings.max_batch_tokens,
        "max_sequences": settings.max_sequences,
        "max_model_len": model.config.max_model_len,
    }
    probe = DeviceRunner(model, DeviceKvCache(1, layout, model.device), **limits)
    memory = measure_device_memory(
        model.device,
        probe.run_largest,
        num_captured=probe.num_shapes,
        utilization=settings.gpu_memory_utilization,
    )
    del probe
    log.info(
        "device_memory",
        device=torch.cuda.get_device_name(model.device),
        total_mib=memory.total >> 20,
        weights_mib=memory.weights >> 20,
        activations_mib=memory.activations >> 20,
        captured_mib=memory.captured >> 20,
        free_mib=memory.free >> 20,
        kv_mib=memory.left >> 20,
    )
    cache = DeviceKvCache(memory.num_blocks(layout), layout, model.device)
    torch.cuda.synchronize(model.device)
    runner = DeviceRunner(model, cache, **limits)
    runner.warm_up(_log_progress)
    kernels = checksum_kernels(layout.block_bytes)
    return runner, DeviceArena.export(cache.tensor.data_ptr(), cache.num_blocks, layout.block_bytes, kernels)


def _log_progress(done: int, total: int) -> None:
    """Says every tenth of the way."""
    if done == total or done * 10 // total > (done - 1) * 10 // total:
        log.info("warming_up", done=done, total=total)
