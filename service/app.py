"""The HTTP application: one guarded model behind OpenAI's chat and moderation endpoints."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator
from importlib import metadata
from typing import TYPE_CHECKING, Any

import structlog
from fastapi import FastAPI

from feature_bank.errors import SailguardError
from guard.metrics import Metrics
from service.engine import EngineFactory, EngineSlot, ServedEngine
from service.errors import install_error_handlers
from service.middleware import BodyLimit, KeyCheck, RequestLog
from service.routes import routers
from service.runner import Runner, Services
from service.settings import Settings, is_loopback

if TYPE_CHECKING:
    import uvicorn

__all__ = ["create_app", "server_config"]


def create_app(
    engine: ServedEngine | EngineFactory,
    settings: Settings,
    *,
    logger: Any = None,
) -> FastAPI:
    """Build the application around `engine`.

    `engine` is either a started one, which stays its maker's to close, or a function that makes one:
    then the server listens at once, `/readyz` says 503 until the function has returned, and the
    application closes what it made.
    `logger` is a structlog logger; without one, JSON lines go to standard error.
    """
    # At its debug level the library writes every chunk, and so the answer's text, to the log.
    logging.getLogger("sse_starlette.sse").setLevel(logging.INFO)
    logger = _json_logger() if logger is None else logger
    started = None if callable(engine) else engine
    metrics = Metrics() if started is None else started.metrics
    services = Services(
        settings=settings,
        metrics=metrics,
        runner=Runner(max_queue=settings.max_queue, metrics=metrics),
        slot=EngineSlot(started),
    )

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load(engine, services, logger)) if callable(engine) else None
        try:
            yield
        finally:
            await _shut_down(services, loading)

    app = FastAPI(title="sailguard", version=_version(), docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.services = services
    install_error_handlers(app)
    for router in routers():
        app.include_router(router)
    # The layer added last is the outermost.
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    app.add_middleware(KeyCheck, keys=settings.key_ring(), open_metrics=is_loopback(settings.host))
    app.add_middleware(RequestLog, metrics=metrics, logger=logger)
    return app


def server_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """Return the uvicorn configuration: no access log (it would quote paths), no server header."""
    import uvicorn

    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        access_log=False,
        server_header=False,
        log_level="warning",
        lifespan="on",
        timeout_graceful_shutdown=10,
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
        services.slot.fill(engine)
        logger.info("ready", model=engine.model_id, bank=engine.bank_version, policy=engine.policy_version)


async def _shut_down(services: Services, loading: asyncio.Task[None] | None) -> None:
    engine = services.slot.engine
    services.slot.fail("The server is shutting down.")
    if loading is None:
        services.runner.close()
        return
    if not loading.done():
        loading.cancel()
        await asyncio.wait([loading])
    elif engine is not None:
        services.runner.close_jobs()
        close = getattr(engine, "close", None)
        if close is not None:
            # Behind the running job, so that no hook goes away under a forward pass.
            await services.runner.call(close)
    services.runner.close()


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


def _version() -> str:
    try:
        return metadata.version("sailguard")
    except metadata.PackageNotFoundError:
        return "0"
