"""One module an endpoint; `routers` lists them all."""

from __future__ import annotations

from fastapi import APIRouter

from service.routes import (
    about,
    admin,
    audit,
    compare,
    events,
    features,
    health,
    metrics,
    models,
    moderations,
    page,
    playground,
    reviews,
    shadow,
    spool,
    stats,
    traces,
)

__all__ = ["routers"]


def routers(*, generates: bool, proxy: bool) -> list[APIRouter]:
    """Return the routers of all endpoints.

    generates: of a server whose engine answers chats; proxy: of one that another server answers for.
    """
    found = [
        moderations.router,
        traces.router,
        features.router,
        events.router,
        playground.router,
        compare.router,
        about.router,
        stats.router,
        admin.router,
        reviews.router,
        audit.router,
        spool.router,
        shadow.router,
        page.make_router(),
    ]
    if proxy:
        from service.routes import proxy as proxied

        found = [proxied.router, *found]
    elif generates:
        from service.routes import chat, completions

        found = [chat.router, completions.router, *found]
    if not proxy:
        found.append(models.router)
    return [*found, health.router, metrics.router]
