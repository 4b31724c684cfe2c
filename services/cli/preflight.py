"""What can be known to go wrong before anything is started."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from pathlib import Path

import psutil

from services.cli.cluster import ClusterSpec
from services.cli.quantities import format_bytes
from shared.errors import ConfigurationError
from shared.models.config import ModelConfig
from shared.models.encoder_config import EncoderConfig, is_encoder

DEVICES = Path("/dev")


def check_port(host: str, port: int) -> None:
    """The gateway will be able to listen.

    Raises:
        ConfigurationError: It would not; names the process in the way if that can be seen.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as exc:
        raise ConfigurationError(f"--host {host}: {exc.strerror}") from exc
    with socket.socket(family) as probe:
        # As the gateway does: connections of an earlier one that linger are not in the way.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen()
        except OSError as exc:
            raise ConfigurationError(
                f"cannot listen on {host}:{port}: {exc.strerror}{_listener(port)}; choose another with --port (0 = any)"
            ) from exc


def check_shared_memory(spec: ClusterSpec) -> None:
    """The KV arenas fit into shared memory, which a container often limits to 64 MiB.

    Raises:
        ConfigurationError: They don't; with both numbers.
    """
    if spec.is_encoder:
        return  # it has none
    if spec.device.startswith("cuda"):
        return  # the KV caches are in the GPU's memory
    parent = spec.arena_dir.parent
    if not parent.is_dir():
        raise ConfigurationError(f"{parent} does not exist; the KV caches need a memory file system there")
    needed, free = spec.kv_cache_bytes * (spec.prefill + spec.decode), shutil.disk_usage(parent).free
    if needed > free:
        raise ConfigurationError(
            f"{spec.prefill + spec.decode} KV caches of {format_bytes(spec.kv_cache_bytes)} do not fit: "
            f"{parent} has {format_bytes(free)} free, {format_bytes(needed)} are needed; "
            f"lower --kv-cache-bytes or enlarge it (docker: --shm-size)"
        )


def chosen_device(wanted: str) -> str:
    """What `auto` means on this machine: a GPU where the driver shows one, and the environment does not hide it."""
    if wanted != "auto":
        return wanted
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
    return "cuda" if any(DEVICES.glob("nvidia[0-9]*")) and not is_hidden else "cpu"


def check_model(directory: Path, max_model_len: int) -> bool:
    """The model can be served; returns whether it is an encoder.

    Raises:
        ConfigurationError: It cannot.
    """
    embeds_only = is_encoder(directory)
    (EncoderConfig if embeds_only else ModelConfig).from_pretrained(directory, max_model_len=max_model_len)
    return embeds_only


def served_name(model: str) -> str:
    """The last part of a directory or hub id."""
    return Path(model).expanduser().name or Path(model).resolve().name


def _listener(port: int) -> str:
    """Names the process that listens there, if this user may see it."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,) and connection.pid:
                return f" (by pid {connection.pid}, {psutil.Process(connection.pid).name()})"
    return ""
