"""The online side: watch a model's activations with a feature bank, and flag, steer or stop a generation.

Names are loaded on first use: reading a policy needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guard.conditions import concept, domain, feature
    from guard.core import Guard
    from guard.events import Completion, SequenceReport, StreamEvent, TextScore, Trace, Verdict
    from guard.metrics import Metrics
    from guard.models import load_model
    from guard.policy import Policy, Rule
    from guard.session import AttachedGuard

_HOMES = {
    "Guard": "guard.core",
    "AttachedGuard": "guard.session",
    "Policy": "guard.policy",
    "Rule": "guard.policy",
    "Verdict": "guard.events",
    "StreamEvent": "guard.events",
    "SequenceReport": "guard.events",
    "Completion": "guard.events",
    "TextScore": "guard.events",
    "Trace": "guard.events",
    "Metrics": "guard.metrics",
    "load_model": "guard.models",
    "concept": "guard.conditions",
    "domain": "guard.conditions",
    "feature": "guard.conditions",
}
__all__ = [
    "AttachedGuard",
    "Completion",
    "Guard",
    "Metrics",
    "Policy",
    "Rule",
    "SequenceReport",
    "StreamEvent",
    "TextScore",
    "Trace",
    "Verdict",
    "concept",
    "domain",
    "feature",
    "load_model",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'guard' has no attribute {name!r}")
