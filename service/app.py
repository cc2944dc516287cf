"""The HTTP application: what judges, or also answers, behind OpenAI's endpoints and our own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from fastapi import FastAPI

from feature_bank.errors import SailguardError
from guard.metrics import Metrics
from service.audit import Audit, NoAudit
from service.auth import KeyRing
from service.edge import install_middleware, open_paths
from service.engine import EngineFactory, EngineSlot, ServedEngine
from service.errors import install_error_handlers
from service.events import EventBus
from service.openapi import describe
from service.peers import Alone
from service.reload import Reloader
from service.routes import routers
from service.runner import Runner
from service.services import Services
from service.settings import Settings
from service.shadow import Shadow, ShadowedSpool, load_candidate
from service.slots import Slots
from service.spool import open_spool
from service.tracing import start_tracing
from service.upstream import Upstream

if TYPE_CHECKING:
    import uvicorn

    from service.peers import Peers

__all__ = ["DRAIN_SECONDS", "create_app", "make_server", "server_config"]

DRAIN_SECONDS = 30
"""How long requests under way may take after a SIGTERM."""


def create_app(
    engine: ServedEngine | EngineFactory,
    settings: Settings,
    *,
    generates: bool = True,
    bank: Path | None = None,
    logger: Any = None,
    peers: Callable[[Metrics, Any], Peers] | None = None,
) -> FastAPI:
    """Build the application around `engine`.

    `engine` is either a started one, which stays its maker's to close, or a function that makes one: then the server
    listens at once, `/readyz` says 503 until the function has returned, and the application closes what it made.
    generates: whether the engine answers chats; without it, and with an `upstream` in the settings, that server does.
    bank: where the engine's bank lies, if not where the settings say.
    `logger` is a structlog logger; without one, JSON lines go to standard error.
    peers: makes, of the metrics and the logger, what knows of further applications behind the same address.

    Raises `SettingsError` for keys, an audit file or limits that cannot be used, `SpoolError` for a spool that cannot.
    """
    # At its debug level the library writes every chunk, and so the answer's text, to the log.
    logging.getLogger("sse_starlette.sse").setLevel(logging.INFO)
    logger = _json_logger() if logger is None else logger
    started = None if callable(engine) else engine
    metrics = Metrics(features=settings.shown_features) if started is None else started.metrics
    runner = Runner(max_queue=settings.max_queue, metrics=metrics)
    slot = EngineSlot(started)
    keys = settings.key_ring()
    shadow = Shadow(metrics, logger, in_use=lambda: None if slot.engine is None else slot.engine.bank)
    others = Alone(metrics) if peers is None else peers(metrics, logger)
    services = Services(
        settings=settings,
        metrics=metrics,
        runner=runner,
        slots=Slots(max_running=settings.max_concurrent, max_waiting=settings.max_queue, metrics=metrics),
        slot=slot,
        audit=_open_audit(settings, metrics, logger),
        spool=ShadowedSpool(open_spool(settings, metrics, logger), shadow),
        shadow=shadow,
        events=EventBus(),
        reloader=Reloader(slot, runner, settings, metrics, logger, bank=bank, turn=others.turn),
        tracing=start_tracing(settings, version()),
        peers=others,
    )

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        services.reloader.start()
        services.reloader.install_sighup(asyncio.get_running_loop())
        metrics.set_ready(slot.engine is not None)
        await _start_shadow(services, slot.engine, logger)
        tasks = [asyncio.create_task(_refresh_keys(keys, settings, logger))]
        loading = asyncio.create_task(_load(engine, services, logger)) if callable(engine) else None
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await _shut_down(services, loading)
            if app.state.upstream is not None:
                await app.state.upstream.close()

    app = FastAPI(title="sailguard", version=version(), docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.services = services
    app.state.upstream = None if settings.upstream is None else Upstream.of(settings)
    install_error_handlers(app)
    for router in routers(generates=generates, proxy=settings.upstream is not None):
        app.include_router(router)
    install_middleware(app, settings, metrics, logger, keys)
    describe(app, keys=bool(keys), open_paths=open_paths(settings))
    services.tracing.install(app)
    return app


def make_server(app: FastAPI, settings: Settings) -> uvicorn.Server:
    """Return the server of `app`. When it is to end, streams that never would are ended; answers run to their end."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[Any] | None = None) -> None:
            app.state.services.events.close()
            app.state.services.metrics.set_ready(False)
            await super().shutdown(sockets)

    return Server(server_config(app, settings))


def server_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """Return the uvicorn configuration: no access log (it would quote paths), no server header.

    After a SIGTERM the server takes no new connections, and what is under way has `DRAIN_SECONDS`.
    """
    import uvicorn

    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # a client could give itself any address with them, and its limits with it
        log_level="warning",
        lifespan="on",
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )


async def _load(factory: EngineFactory, services: Services, logger: Any) -> None:
    try:
        engine = await services.runner.call(lambda: factory(services.metrics))
    except SailguardError as error:
        services.slot.fail(f"{type(error).__name__}: {error}")
        logger.error("not ready", reason=services.slot.reason)
    except Exception as error:
        services.slot.fail(f"The guard could not be attached: {type(error).__name__}; see the server's log.")
        logger.error("not ready", reason=services.slot.reason, exc_info=True)
    else:
        await _start_shadow(services, engine, logger)  # before the first request, which it is to see
        services.slot.fill(engine)
        services.metrics.set_ready(True)
        logger.info("ready", model=engine.model_id, bank=engine.bank_version, policy=engine.policy_version)


async def _start_shadow(services: Services, engine: ServedEngine | None, logger: Any) -> None:
    """Put the settings' candidate beside the bank in use, once there is one; a bad one is reported, and left out."""
    place = services.settings.shadow
    if engine is None or place is None:
        return
    try:
        services.shadow.start(await asyncio.to_thread(load_candidate, place, engine.bank))
    except Exception as error:  # noqa: BLE001 - whatever is wrong with a candidate, the bank in use serves
        logger.error("no shadow", reason=f"{type(error).__name__}: {error}")


async def _refresh_keys(keys: KeyRing, settings: Settings, logger: Any) -> None:
    """Take a changed key file into use; a bad one leaves the keys as they are."""
    while settings.watch_seconds > 0:
        await asyncio.sleep(settings.watch_seconds)
        try:
            if keys.refresh():
                logger.info("keys reloaded", keys=len(keys))
        except SailguardError as error:
            logger.error("keys not reloaded", reason=str(error))


async def _shut_down(services: Services, loading: asyncio.Task[None] | None) -> None:
    services.events.close()
    services.metrics.set_ready(False)
    await services.reloader.close()
    engine = services.slot.engine
    services.slot.fail("The server is shutting down.")
    if loading is not None and not loading.done():
        loading.cancel()
        await asyncio.wait([loading])
    elif loading is not None and engine is not None:
        # Behind the running call, so that no hook goes away under a forward pass.
        await services.runner.call(engine.close)
    services.runner.close()
    await asyncio.to_thread(services.audit.close)
    await asyncio.to_thread(services.spool.close)
    await asyncio.to_thread(services.tracing.close)


def _open_audit(settings: Settings, metrics: Metrics, logger: Any) -> Audit | NoAudit:
    if settings.audit is None:
        return NoAudit()
    return Audit.open(
        settings.audit, text=settings.audit_text, days=settings.audit_days, metrics=metrics, logger=logger
    )


def _json_logger() -> Any:
    """Return a logger of JSON lines on standard error, without touching structlog's global settings."""
    return structlog.wrap_logger(
        structlog.PrintLogger(sys.stderr),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
    )


def version() -> str:
    """The installed version of sailguard; 0 where it is not installed."""
    try:
        return metadata.version("sailguard")
    except metadata.PackageNotFoundError:
        return "0"
