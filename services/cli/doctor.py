"""`tandem doctor`: what this machine has, what is missing, and how to fix it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from rich.console import Console
from rich.markup import escape

from services.cli.preflight import check_port
from services.cli.quantities import format_bytes
from services.cli.run_directory import default_run_dir, prepare_run_dir
from shared.directory.redis_server import find_redis_binary
from shared.errors import ConfigurationError

Verdict = Literal["ok", "note", "missing"]

_SHM_WANTED = 1 << 30
_MEMORY_WANTED = 2 << 30
_COMMAND_TIMEOUT_S = 10
# Distribution, which service needs it.
_WHEELS = (
    ("torch", "prefill, decode"),
    ("grpcio", "all"),
    ("fastapi", "gateway"),
    ("tokenizers", "gateway"),
    ("safetensors", "prefill, decode"),
)
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at; `fix` says what to do unless the verdict is "ok"."""

    subject: str
    verdict: Verdict
    value: str
    fix: str = ""


def examine(port: int) -> list[Finding]:
    """Looks at everything; takes a second or two and changes nothing but an empty run directory."""
    checks: list[Callable[[], Finding]] = [
        _python,
        *(lambda name=name, user=user: _wheel(name, user) for name, user in _WHEELS),
        _ucxx,
        _redis,
        _shared_memory,
        _memory,
        lambda: _port(port),
        _run_dir,
        _cpu,
        _gpu,
        _compiler,
    ]
    return [check() for check in checks]


def print_findings(findings: list[Finding], console: Console) -> None:
    """A line per finding, with its remedy below."""
    marks = {"ok": "[green]ok     [/]", "note": "[yellow]note   [/]", "missing": "[bold red]missing[/]"}
    for finding in findings:
        value = escape(finding.value)
        console.print(f"{marks[finding.verdict]}  {finding.subject:<16} {value}", highlight=False, soft_wrap=True)
        if finding.fix:
            console.print(f"         {'':<16} -> {escape(finding.fix)}", style="dim", highlight=False, soft_wrap=True)


def _python() -> Finding:
    version = platform.python_version()
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("python", "ok", f"{version} ({sys.executable})")
    return Finding("python", "missing", version, "use Python 3.11, 3.12 or 3.13")


def _wheel(name: str, user: str) -> Finding:
    try:
        return Finding(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "missing", f"not installed (for {user})", "make install")


def _ucxx() -> Finding:
    builds = [f"ucxx-cu{major}" for major in (12, 13) if _version(f"ucxx-cu{major}")]
    if len(builds) > 1:
        return Finding("ucxx", "missing", f"{' and '.join(builds)} overwrite each other", "make clean install")
    if builds:
        return Finding("ucxx", "ok", f"{builds[0]} {_version(builds[0])}")
    return Finding("ucxx", "missing", "not installed (for kv_transfer)", "make install")


def _redis() -> Finding:
    binary = find_redis_binary()
    if binary is None:
        return Finding("redis", "missing", "no redis-server", "apt install redis-server, or use tandem up --redis-url")
    version = _first_line([str(binary), "--version"]) or "does not tell its version"
    return Finding("redis", "ok", f"{binary} ({version})")


def _shared_memory() -> Finding:
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding("/dev/shm", "missing", "does not exist", "mount a tmpfs there: the KV caches live in it")
    usage = shutil.disk_usage(path)
    value = f"{format_bytes(usage.free)} free of {format_bytes(usage.total)}"
    if usage.free < _SHM_WANTED:
        return Finding("/dev/shm", "note", value, "tandem up --kv-cache-bytes 64MiB, or docker --shm-size")
    return Finding("/dev/shm", "ok", value)


def _memory() -> Finding:
    available = psutil.virtual_memory().available
    value = f"{format_bytes(available)} available, {len(os.sched_getaffinity(0))} cores"
    if available < _MEMORY_WANTED:
        return Finding("memory", "note", value, "each worker takes about 400 MB besides the model and its KV cache")
    return Finding("memory", "ok", value)


def _port(port: int) -> Finding:
    try:
        check_port("127.0.0.1", port)
    except ConfigurationError as exc:
        return Finding(f"port {port}", "note", exc.message)
    return Finding(f"port {port}", "ok", "free")


def _run_dir() -> Finding:
    run_dir = default_run_dir()
    try:
        prepare_run_dir(run_dir)
    except ConfigurationError as exc:
        return Finding("run directory", "missing", exc.message, "tandem up --run-dir DIRECTORY")
    return Finding("run directory", "ok", f"{run_dir} ({format_bytes(shutil.disk_usage(run_dir).free)} free)")


def _cpu() -> Finding:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return Finding("cpu", "note", platform.machine(), "no /proc/cpuinfo to read features from")
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    found = [flag for flag in _CPU_FLAGS if flag in flags]
    return Finding("cpu", "ok", f"{platform.machine()}: {', '.join(found) or 'none of ' + ', '.join(_CPU_FLAGS)}")


def _gpu() -> Finding:
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    if found := _first_line(query):
        return Finding("gpu", "ok", found)
    return Finding("gpu", "note", "no NVIDIA GPU; the CPU backend is used")


def _compiler() -> Finding:
    for name in ("g++", "clang++"):
        if path := shutil.which(name):
            return Finding("compiler", "ok", path)
    slower = "none: the CPU kernels run in torch, decode steps take two to three times as long"
    return Finding("compiler", "note", slower, "apt install g++, then start again: the kernels are compiled once")


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _first_line(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip().partition("\n")[0]
