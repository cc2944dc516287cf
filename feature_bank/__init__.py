"""What the offline and the online side share: SAEs, their formats, and the explained feature bank.

Names are loaded on first use, so that reading a bank needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from feature_bank.bank import Bank, shipped_bank_path
    from feature_bank.errors import SailguardError
    from feature_bank.sae import SAE
    from feature_bank.taxonomy import DOMAINS

_HOMES = {
    "Bank": "feature_bank.bank",
    "shipped_bank_path": "feature_bank.bank",
    "SailguardError": "feature_bank.errors",
    "SAE": "feature_bank.sae",
    "DOMAINS": "feature_bank.taxonomy",
}
__all__ = ["DOMAINS", "SAE", "Bank", "SailguardError", "shipped_bank_path"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'feature_bank' has no attribute {name!r}")
