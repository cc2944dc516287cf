"""`serve`: the HTTP server."""

from __future__ import annotations

import socket
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands.options import BankOption, ModelOption, PolicyOption
from service.commands.terminal import error_console

if TYPE_CHECKING:
    from service.settings import Settings

__all__ = ["serve"]


class EngineName(StrEnum):
    """What runs the model."""

    TRANSFORMERS = "transformers"
    VLLM = "vllm"


def serve(
    context: typer.Context,
    engine: Annotated[
        EngineName, typer.Option("--engine", help="What runs the model: transformers in this process, or vLLM.")
    ] = EngineName.TRANSFORMERS,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on. Default: 127.0.0.1")] = None,
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65535, help="0 picks a free one. Default: 8801")
    ] = None,
    model: ModelOption = None,
    bank: BankOption = None,
    policy: PolicyOption = None,
) -> None:
    """Serve the guarded model over HTTP: OpenAI's chat and moderation endpoints, and Prometheus metrics.

    What is not given here is taken from the environment, SAILGUARD_HOST and so on. An address that other
    machines can reach needs API keys: SAILGUARD_API_KEYS or SAILGUARD_API_KEYS_FILE.

    With --engine vllm what stands after -- goes to vLLM: sailguard serve --engine vllm -- --tensor-parallel-size 2
    """
    if context.args and engine is not EngineName.VLLM:
        raise typer.BadParameter(f"unexpected: {' '.join(context.args)}; only --engine vllm takes further arguments")
    from service.settings import Settings

    given: dict[str, Any] = {"host": host, "port": port, "model": model, "bank": bank, "policy": policy}
    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    _check_files(settings.bank, settings.policy)
    if engine is EngineName.VLLM:
        from service.vllm_server import serve_vllm

        serve_vllm(settings, context.args)
        return
    with _listen(settings) as listener:
        address, number = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        error_console().print(f"sailguard serves http://{shown}:{number} (Ctrl-C ends)", markup=False, soft_wrap=True)
        _run(settings, listener)


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


def _run(settings: Settings, listener: socket.socket) -> None:
    import uvicorn

    from service.app import create_app, server_config
    from service.engine import Engine

    app = create_app(lambda metrics: Engine.start(settings, metrics), settings)
    uvicorn.Server(server_config(app, settings)).run(sockets=[listener])
