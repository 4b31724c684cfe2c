"""`tandem`: the commands, their options, and how they end.

Exit status: 0 done; 1 failed, or (`status`) nothing runs; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from services.cli.certificates import fleet_members, issue_certificates
from services.cli.chat import Conversation, chat
from services.cli.cluster import ClusterSpec, free_port, with_certificates
from services.cli.doctor import examine, print_findings
from services.cli.down import down
from services.cli.keys import keys_app
from services.cli.preflight import check_model, check_port, check_shared_memory, chosen_device, served_name
from services.cli.quantities import parse_bytes
from services.cli.quiet import quiet_libraries
from services.cli.run_directory import default_run_dir, prepare_run_dir, supervisor_pid
from services.cli.state_file import read_state
from services.cli.status import cluster_status
from services.cli.status_table import print_status
from services.cli.up import report_failure, up_detached, up_in_foreground
from shared.cpu_list import parse_cpus
from shared.errors import ConfigurationError, TandemError, Unavailable
from shared.models.resolve import resolve_model

app = typer.Typer(
    help="Tandem: LLM inference with prefill and decode apart. Start with `tandem up`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(keys_app, name="keys")

RunDir = Annotated[
    Path | None, typer.Option("--run-dir", help="Sockets, logs, state. One cluster each. Default ~/.tandem/run")
]


@app.command("up")
def up_command(
    model: Annotated[str, typer.Option(help="Hugging Face directory or hub id; pydoc-mini is bundled")] = "pydoc-mini",
    prefill: Annotated[
        int, typer.Option(min=0, max=999, help="Prefill workers; 0 = decode prefills; encoders have none")
    ] = 1,
    decode: Annotated[int, typer.Option(min=1, max=999, help="Decode workers")] = 1,
    port: Annotated[int, typer.Option(min=0, max=65535, help="HTTP port; 0 = any")] = 8000,
    host: Annotated[str, typer.Option(help="HTTP address")] = "127.0.0.1",
    gateway_workers: Annotated[int, typer.Option(min=1, max=256, help="Gateway processes on the port")] = 1,
    unknown_fields: Annotated[
        str, typer.Option(help="What the gateway does with fields it does not know: refuse or ignore")
    ] = "",
    chat_template: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Jinja file; default: the checkpoint's own")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return when ready; `tandem down` stops it")] = False,
    redis_url: Annotated[str, typer.Option(help="Use this Redis instead of starting one")] = "",
    served_model_name: Annotated[str, typer.Option(help="Default: the last part of --model")] = "",
    kv_cache_bytes: Annotated[str, typer.Option(help="KV cache of each worker")] = "512MiB",
    tier_bytes: Annotated[str, typer.Option(help="Host memory beside each worker for evicted KV")] = "1GiB",
    disk_bytes: Annotated[str, typer.Option(help="Disk beside each worker for copies of it; 0 = none")] = "0",
    disk_path: Annotated[Path | None, typer.Option(help="Where; default: in the run directory")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    quantization: Annotated[str, typer.Option(help="Of the weights: none, int8 or int4")] = "none",
    kv_cache_dtype: Annotated[str, typer.Option(help="auto (the weights'), float32, bfloat16, int8, fp8")] = "auto",
    numerics: Annotated[str, typer.Option(help="fast, or invariant: equal bits in every batch")] = "fast",
    backend: Annotated[str, typer.Option(help="auto, native, cpu, reference or triton")] = "auto",
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda")] = "auto",
    gpu_memory_utilization: Annotated[
        float, typer.Option(min=0.01, max=1, help="Part of a GPU that its workers fill together")
    ] = 0.9,
    max_model_len: Annotated[int, typer.Option(min=0, help="Context limit in tokens; 0 = the model's")] = 0,
    cpus: Annotated[str, typer.Option(help="Like 0-7: the workers divide them; default: all that it may use")] = "",
    threads: Annotated[int, typer.Option(min=0, help="Per worker; 0 = one for each of its CPUs")] = 0,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for everything to come up")] = 900,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error")] = "info",
    tls: Annotated[bool, typer.Option("--tls", help="Mutual TLS between the services")] = False,
    run_dir: RunDir = None,
) -> None:
    """Starts Redis, workers with their sidecars, and a gateway.

    Further settings of the services are environment variables (TANDEM_WORKER_*, TANDEM_TRANSFER_*, TANDEM_GATEWAY_*)
    and reach them from yours.
    """
    directory = resolve_model(model)
    embeds_only = check_model(directory, max_model_len)
    if embeds_only:  # by itself nothing is prefilled, and torch computes on the CPU
        prefill, device = 0, "cpu" if device == "auto" else device
    spec = ClusterSpec(
        model_dir=directory,
        served_model_name=served_model_name or served_name(model),
        run_dir=prepare_run_dir(run_dir or default_run_dir()),
        is_encoder=embeds_only,
        prefill=prefill,
        decode=decode,
        host=host,
        port=port or free_port(),
        gateway_workers=gateway_workers,
        gateway_options={
            "UNKNOWN_FIELDS": unknown_fields,
            "CHAT_TEMPLATE": str(chat_template.resolve()) if chat_template else "",
        },
        redis_url=redis_url,
        kv_cache_bytes=parse_bytes(kv_cache_bytes),
        tier_bytes=parse_bytes(tier_bytes),
        disk_bytes=parse_bytes(disk_bytes),
        disk_path=disk_path,
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        numerics=numerics,
        backend=backend,
        device=chosen_device(device),
        gpu_memory_utilization=gpu_memory_utilization / (prefill + decode),
        cpus=parse_cpus(cpus),
        threads=threads,
        max_model_len=max_model_len,
        log_level=log_level,
        ready_timeout_s=timeout,
    )
    if pid := supervisor_pid(spec.run_dir):
        raise ConfigurationError(
            f"a cluster already runs in {spec.run_dir} (pid {pid}): `tandem down` stops it, or give another --run-dir"
        )
    if tls:
        spec = with_certificates(spec)
    check_port(spec.host, spec.port)
    check_shared_memory(spec)
    (up_detached if detach else up_in_foreground)(spec, Console())


@app.command("certs")
def certs_command(
    directory: Annotated[Path, typer.Argument(help="The authority's key stays here; each member gets a directory")],
    prefill: Annotated[list[str] | None, typer.Option(help="Id of a prefill worker; repeat for more")] = None,
    decode: Annotated[list[str] | None, typer.Option(help="Id of a decode worker; repeat for more")] = None,
    host: Annotated[list[str] | None, typer.Option(help="Name or address on top of localhost; repeat for more")] = None,
    days: Annotated[int, typer.Option(min=1, help="Validity")] = 365,
) -> None:
    """Makes a certificate authority and a certificate for every service; run it again to renew them.

    Without worker ids the workers' certificates speak for any worker of their role.
    """
    members = fleet_members(prefill or (), decode or ())
    absolute = issue_certificates(directory, members, hosts=host or (), days=days)
    for member in members:
        typer.echo(absolute / member.directory_name)


@app.command("down")
def down_command(run_dir: RunDir = None) -> None:
    """Drains and stops the cluster of a run directory."""
    console = Console()
    directory = run_dir or default_run_dir()
    stopped = down(directory.expanduser().absolute(), console)
    console.print("stopped: no process is left" if stopped else f"nothing runs in {directory}", highlight=False)


@app.command("status")
def status_command(
    json: Annotated[bool, typer.Option("--json", help="For scripts")] = False, run_dir: RunDir = None
) -> None:
    """Shows processes, caches and queues."""
    directory = (run_dir or default_run_dir()).expanduser().absolute()
    status = asyncio.run(cluster_status(directory))
    if status is None:
        raise Unavailable(f"nothing runs in {directory}")
    if json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(status), indent=2).decode() + "\n")
    else:
        # Into a pipe: as wide as it needs to be.
        print_status(status, Console() if sys.stdout.isatty() else Console(width=160))


@app.command("chat")
def chat_command(
    once: Annotated[str, typer.Option(help="Ask this and leave")] = "",
    url: Annotated[str, typer.Option(help="Of a gateway; default: the cluster of the run directory")] = "",
    api_key: Annotated[str, typer.Option(envvar="TANDEM_API_KEY", help="Where the gateway asks for one")] = "",
    model: Annotated[str, typer.Option(help="Default: the first one served")] = "",
    system: Annotated[str, typer.Option(help="System prompt")] = "",
    max_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    temperature: Annotated[float | None, typer.Option(min=0)] = None,
    run_dir: RunDir = None,
) -> None:
    """Talks to the model, streaming."""
    if not url:
        directory = (run_dir or default_run_dir()).expanduser().absolute()
        state = read_state(directory)
        if state is None:
            raise Unavailable(f"nothing runs in {directory}: start with `tandem up`, or give --url")
        url = state.url
    url = url.rstrip("/").removesuffix("/v1")
    conversation = Conversation(url, model, max_tokens=max_tokens, temperature=temperature, system=system)
    chat(conversation, Console(), once=once, api_key=api_key)


@app.command("doctor")
def doctor_command(
    port: Annotated[int, typer.Option(min=1, max=65535, help="That the gateway would use")] = 8000,
) -> None:
    """Looks for what is missing and says how to fix it."""
    findings = examine(port)
    print_findings(findings, Console())
    if any(finding.verdict == "missing" for finding in findings):
        raise typer.Exit(1)


@app.command("version")
def version_command() -> None:
    """Prints versions."""
    sys.stdout.write(f"tandem {importlib.metadata.version('tandem')} (Python {platform.python_version()})\n")


def main() -> None:
    """Entry point; a foreseen error is one message, not a traceback."""
    quiet_libraries()
    try:
        app()
    except ConfigurationError as exc:
        report_failure(exc, Console(stderr=True))
        sys.exit(1)
    except TandemError as exc:
        Console(stderr=True).print(f"error: {exc.message}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
