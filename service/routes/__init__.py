"""One module an endpoint; `routers` lists them all."""

from __future__ import annotations

from fastapi import APIRouter

from service.routes import chat, health, metrics, moderations

__all__ = ["routers"]


def routers() -> list[APIRouter]:
    """Return the routers of all endpoints."""
    return [chat.router, moderations.router, health.router, metrics.router]
