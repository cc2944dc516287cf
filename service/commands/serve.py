"""`serve`: the HTTP server."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands.options import BankOption, PolicyOption
from service.commands.terminal import error_console

if TYPE_CHECKING:
    from guard.metrics import Metrics
    from service.engine import ServedEngine
    from service.settings import Settings

__all__ = ["run_server", "serve"]


class EngineName(StrEnum):
    """What runs the model."""

    TRANSFORMERS = "transformers"
    ONNX = "onnx"
    VLLM = "vllm"


def serve(
    context: typer.Context,
    engine: Annotated[
        EngineName | None,
        typer.Option(
            "--engine",
            help="What runs the model: transformers in this process, onnx (judges texts only, needs no torch), or "
            "vLLM. Default: transformers; onnx with --upstream.",
        ),
    ] = None,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on. Default: 127.0.0.1")] = None,
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65535, help="0 picks a free one. Default: 8801")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="FOLDER|HUB-ID",
            help="Model to load. Default: the embedded one. With --engine onnx the folder that `sailguard "
            "export-onnx` wrote.",
        ),
    ] = None,
    bank: BankOption = None,
    policy: PolicyOption = None,
    upstream: Annotated[
        str | None,
        typer.Option("--upstream", metavar="URL", help="OpenAI-compatible server to stand before, as a proxy."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=0, help="Processes that serve; one that dies is started again.")
    ] = None,
    audit: Annotated[
        Path | None, typer.Option("--audit", metavar="FILE", help="Keep verdicts in this SQLite file.")
    ] = None,
    shadow: Annotated[
        Path | None,
        typer.Option("--shadow", metavar="BANK", help="A candidate bank that judges beside the bank and never acts."),
    ] = None,
    spool: Annotated[
        Path | None,
        typer.Option("--spool", metavar="FILE", help="Keep a sample of what is judged here, as the guard saw it."),
    ] = None,
    spool_text: Annotated[
        bool | None, typer.Option("--spool-text/--no-spool-text", help="Keep the texts themselves in the spool, too.")
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster",
            metavar="auto|ADDRESS",
            help="Serve the sidecar on a Ray cluster: the one this machine belongs to, or HOST:PORT of its head.",
        ),
    ] = None,
    replicas: Annotated[
        int | None, typer.Option("--replicas", min=1, help="With --cluster: processes that judge. Default: 1")
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option("--max-replicas", min=1, help="With --cluster: up to so many while it is busy.")
    ] = None,
) -> None:
    """Serve over HTTP: OpenAI's chat and moderation endpoints under the guard, and Prometheus metrics.

    What is not given here is taken from the environment, SAILGUARD_HOST and so on. An address that other
    machines can reach needs API keys: SAILGUARD_API_KEYS or SAILGUARD_API_KEYS_FILE.

    With --engine vllm what stands after -- goes to vLLM: sailguard serve --engine vllm -- --tensor-parallel-size 2
    """
    if context.args and engine is not EngineName.VLLM:
        raise typer.BadParameter(f"unexpected: {' '.join(context.args)}; only --engine vllm takes further arguments")
    from service.settings import Settings

    given: dict[str, Any] = {
        "host": host,
        "port": port,
        "model": model,
        "bank": bank,
        "policy": policy,
        "upstream": upstream,
        "workers": workers,
        "audit": audit,
        "shadow": shadow,
        "spool": spool,
        "spool_text": spool_text,
    }
    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    if cluster is not None:
        _serve_on_cluster(settings, engine, cluster, replicas, max_replicas)
        return
    if replicas is not None or max_replicas is not None:
        raise typer.BadParameter("--replicas and --max-replicas go with --cluster; on one machine it is --workers")
    if engine is None:
        engine = EngineName.TRANSFORMERS if settings.upstream is None else EngineName.ONNX
    if engine is EngineName.VLLM:
        from service.vllm_server import serve_vllm

        if settings.upstream is not None or settings.workers:
            raise typer.BadParameter("--upstream and --workers do not go with --engine vllm")
        if settings.spool is not None:
            raise typer.BadParameter("--spool does not go with --engine vllm, whose server hands out no activations")
        _check_files(settings.bank, settings.policy)
        serve_vllm(settings, context.args)
        return
    if settings.upstream is not None and engine is not EngineName.ONNX:
        raise typer.BadParameter("--upstream judges with --engine onnx; leave --engine out")
    if engine is EngineName.ONNX:
        from service.sidecar import check_sidecar

        check_sidecar(settings)
    else:
        _check_files(settings.bank, settings.policy)
    with _listen(settings) as listener:
        address, number = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        error_console().print(f"sailguard serves http://{shown}:{number} (Ctrl-C ends)", markup=False, soft_wrap=True)
        if settings.workers:
            raise typer.Exit(_supervise(settings, engine, listener))
        run_server(settings, engine, listener)


def _serve_on_cluster(
    settings: Settings, engine: EngineName | None, cluster: str, replicas: int | None, max_replicas: int | None
) -> None:
    if engine not in (None, EngineName.ONNX):
        raise typer.BadParameter("--cluster serves the sidecar (--engine onnx), or a proxy with --upstream")
    from service.cluster import serve_on_cluster

    def say(line: str) -> None:
        error_console().print(line, markup=False, soft_wrap=True)

    serve_on_cluster(settings, cluster, replicas=replicas or 1, max_replicas=max_replicas, say=say)


def run_server(settings: Settings, engine: str, listener: socket.socket) -> None:
    """Serve on a listening socket until a signal ends it. engine: a value of `EngineName` other than vllm."""
    from service.app import create_app, make_server
    from service.sidecar import sidecar_bank, start_sidecar

    onnx = engine == EngineName.ONNX
    app = create_app(
        start_sidecar(settings) if onnx else _start_transformers(settings),
        settings,
        generates=not onnx,
        bank=sidecar_bank(settings) if onnx else None,
    )
    make_server(app, settings).run(sockets=[listener])


def _start_transformers(settings: Settings) -> Callable[[Metrics], ServedEngine]:
    from service.engine import TransformersEngine

    return lambda metrics: TransformersEngine.start(settings, metrics)


def _supervise(settings: Settings, engine: EngineName, listener: socket.socket) -> int:
    from service.app import DRAIN_SECONDS
    from service.supervisor import Supervisor
    from service.worker import command, environment, start_line

    return Supervisor(
        command(),
        listener,
        settings.workers,
        grace=DRAIN_SECONDS + 5,
        environment=environment(os.environ),
        start=start_line(settings, engine.value),
    ).run()


def _check_files(bank: Path | None, policy: Path | None) -> None:
    """Refuse a bank or policy that cannot be used before anything listens; the server reads them again."""
    import torch

    from guard.core import Guard
    from guard.monitor import Monitor

    guard = Guard.from_bank(bank, policy=policy)
    Monitor(guard.bank, guard.policy, torch.device("cpu"))  # a policy may ask for what the bank does not hold


def _listen(settings: Settings) -> socket.socket:
    """A listening socket. Raises SettingsError if the address is taken or not this machine's."""
    from service.errors import SettingsError

    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host.strip("[]"), settings.port), family=family, backlog=2048)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {settings.host}, port {settings.port}: {error.strerror or error}; "
            "choose another --host or --port"
        ) from error
