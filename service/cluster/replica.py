"""A replica: the application of one server, in a process that Ray Serve started and sends requests to."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

from feature_bank.ray_cluster import import_ray
from service.cluster.controller import served_at
from service.cluster.files import NumberedFile
from service.cluster.pages import merged
from service.cluster.turns import turn_of
from service.errors import SettingsError

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Receive, Scope, Send

    from guard.metrics import Metrics
    from service.settings import Settings

__all__ = ["OneSender", "Replica", "own_settings"]

_PAGE_SECONDS = 5.0


class Replica:
    """Serves with an engine of its own. It takes requests once the guard is attached and its canary has passed.

    values: of the settings, every one, so that no replica reads another environment. version: of sailguard where the
    application was built. turns: the handle of the deployment `Turns`.

    Raises SettingsError for another version here, for settings that cannot be used, and for a Serve that other machines
    reach while no keys are set.
    """

    def __init__(self, values: Mapping[str, Any], version: str, turns: Any) -> None:
        from service.app import version as own_version

        if own_version() != version:
            raise SettingsError(f"this machine has sailguard {own_version()}, and the application {version}")
        serve: Any = import_ray("serve").serve
        context = serve.get_replica_context()
        self._name = context.replica_id.unique_id
        self._handle = serve.get_deployment_handle(context.deployment, context.app_name)
        self._turns = turns
        self._settings, self._files = own_settings(values, served_at())  # the files are held until the process ends

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Build the application, whose engine begins to load with its start."""
        from service.app import create_app
        from service.sidecar import sidecar_bank, start_sidecar

        settings = self._settings
        self._app = create_app(
            start_sidecar(settings),
            settings,
            generates=False,
            bank=sidecar_bank(settings),
            peers=lambda metrics, logger: _Replicas(self._name, self._handle, self._turns, metrics, logger),
        )
        self._app.add_middleware(OneSender)
        return self._app

    async def check_health(self) -> None:
        """Return if there is a guard; wait while it is being attached. Serve asks before it sends the first request."""
        slot = self._app.state.services.slot
        await slot.decided()
        if slot.engine is None:
            raise RuntimeError(slot.reason)

    async def own_page(self) -> tuple[str, bytes]:
        """This replica's name and its metrics."""
        return self._name, await asyncio.to_thread(self._app.state.services.metrics.render)


def own_settings(values: Mapping[str, Any], address: tuple[str, int]) -> tuple[Settings, list[NumberedFile]]:
    """The settings as they are for one replica: the address of Serve, and files that no other one writes.

    Raises SettingsError if other machines reach that address and no keys are set.
    """
    from service.settings import Settings

    host, port = address
    settings = Settings(**{**values, "host": host, "port": port})
    files = {
        name: NumberedFile(name, path)
        for name, path in (("audit", settings.audit), ("spool", settings.spool))
        if path is not None
    }
    return settings.model_copy(update={name: file.path for name, file in files.items()}), list(files.values())


class OneSender:
    """Middleware: leaves the sender's address out. Serve's proxy believes any client on its machine that names one.

    Who has a key is told apart by it; without keys the proxy is reached from its own machine alone.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        await self._app({**scope, "client": None} if scope["type"] == "http" else scope, receive, send)


class _Replicas:
    """The replicas of one deployment: they load one after another, and each shows everybody's metrics."""

    def __init__(self, name: str, handle: Any, turns: Any, metrics: Metrics, logger: Any) -> None:
        self._name = name
        self._handle = handle
        self._turns = turns
        self._metrics = metrics
        self._logger = logger

    def turn(self) -> AbstractAsyncContextManager[None]:
        """Wait until no other replica loads."""
        return turn_of(self._name, self._turns, self._logger)

    async def page(self) -> bytes:
        """The series of all replicas that answer in time, this one's in any case."""
        pages = {self._name: self._metrics.render()}
        try:
            asked = self._handle.broadcast("own_page")
            found = await asked.results_async(timeout_s=_PAGE_SECONDS, return_exceptions=True)
        except Exception as error:  # noqa: BLE001 - what can be shown is shown
            self._logger.warning("metrics of this replica alone", reason=type(error).__name__)
        else:
            pages.update(page for page in found if not isinstance(page, BaseException))
        return merged(pages)
