"""The sidecar's engine under the server's settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from service.errors import SettingsError

if TYPE_CHECKING:
    from guard.metrics import Metrics
    from service.engine import ServedEngine
    from service.settings import Settings

__all__ = ["check_sidecar", "sidecar_bank", "start_sidecar"]


def start_sidecar(settings: Settings) -> Callable[[Metrics], ServedEngine]:
    """What makes the engine."""
    from guard.engines.onnx import OnnxEngine

    return lambda metrics: OnnxEngine.start(
        Path(settings.model or ""),
        bank=settings.bank,
        policy=settings.policy,
        metrics=metrics,
        threads=settings.threads,
        max_tokens=settings.max_input_tokens,
    )


def sidecar_bank(settings: Settings) -> Path | None:
    """Where its bank lies, if not where the settings say."""
    return Path(settings.model or "") / "bank" if settings.bank is None else None


def check_sidecar(settings: Settings) -> None:
    """Refuse a sidecar without its model before anything listens. Raises SettingsError."""
    if settings.model is None or not Path(settings.model).is_dir():
        raise SettingsError(
            "setting 'model': --engine onnx serves a folder that `sailguard export-onnx BANK FOLDER` wrote; "
            f"give it as --model FOLDER, not {settings.model!r}"
        )
