"""The cluster's Serve: whether there is one, and where it listens."""

from __future__ import annotations

from typing import Any

from feature_bank.ray_cluster import import_ray
from service.errors import SettingsError

__all__ = ["is_running", "served_at"]


def is_running() -> bool:
    """Whether the connected cluster has a Serve."""
    return _client() is not None


def served_at() -> tuple[str, int]:
    """Address and port on which the cluster's Serve listens, whoever started it.

    Raises SettingsError if it does not say so: then nobody knows who reaches it.
    """
    try:
        options = _client().http_config
        return str(options.host), int(options.port)
    except Exception as error:
        raise SettingsError(f"the cluster's Ray Serve does not say where it listens ({error})") from error


def _client() -> Any:
    # No public call tells the address of a Serve that somebody else has started.
    ray = import_ray("serve", "serve.context", "serve.exceptions")
    try:
        return ray.serve.context._get_global_client()
    except ray.serve.exceptions.RayServeException:
        return None
