"""Drift is told against the bank's records: none for traffic like them, and one that grows with the difference."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from guard.policy import Policy
from service import spool_drift
from service.spool_drift import Drift

FEATURES = 12
SHARE = np.array([0, 0, 1, 2, 3, 4, 3, 2, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 2], dtype=float)
DENSITY = 0.1
POLICY = Policy.model_validate(
    {
        "rules": [
            {"domain": "violence", "threshold": {"fpr": 0.01}, "action": "flag"},
            {"domain": "violence", "threshold": {"fpr": 0.05}, "action": "flag", "name": "lax"},
            {"domain": "terror", "threshold": {"probability": 0.9}, "action": "block"},
        ]
    }
)


class Shown:
    """What drift was shown, by domain."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float | None]] = {}

    def set_drift(self, domain: str, **figures: float | None) -> None:
        self.found[domain] = figures


def bank(content_hash: str = "a") -> Any:
    """A bank of which the first half of the features is violence's and the rest is terror's."""
    features = [
        SimpleNamespace(
            domains=["violence" if i < FEATURES // 2 else "terror"],
            density=DENSITY,
            histogram=(SHARE * 100).astype(int).tolist(),
        )
        for i in range(FEATURES)
    ]
    head = SimpleNamespace(thresholds={"0.01": 0.95, "0.05": 0.8})
    return SimpleNamespace(content_hash=content_hash, features=features, heads={"violence": head, "terror": head})


def acts(rng: np.random.Generator, tokens: int = 20, *, density: float = DENSITY, factor: float = 1.0) -> Any:
    """Activations as the bank records them: as dense, and as strong."""
    bins = rng.choice(20, (tokens, FEATURES), p=SHARE / SHARE.sum())
    strength = (bins + rng.random(bins.shape)) / 20
    return np.where(rng.random(bins.shape) < density, strength * factor, 0.0).astype(np.float32)


def drifted(items: int, flagged: tuple[str, ...] = (), every: int = 1, **changes: Any) -> dict[str, Any]:
    rng, shown = np.random.default_rng(0), Shown()
    drift = Drift(shown)
    for number in range(items):
        drift.add(bank(), POLICY, flagged if number % every == 0 else (), acts(rng, **changes))
    drift.show()
    return shown.found


def test_traffic_like_the_banks_texts_shows_none() -> None:
    found = drifted(400, ("violence", "terror"), every=20)
    for domain in ("violence", "terror"):
        assert found[domain]["firing"] == pytest.approx(1.0, abs=0.1)
        assert found[domain]["psi"] < 0.05
    # One in twenty is flagged: as the laxest rule on violence expects, and five times as often as terror's does.
    assert found["violence"]["flag"] == pytest.approx(1.0)
    assert found["terror"]["flag"] == pytest.approx(1.0)


def test_a_change_shows_in_the_figure_that_it_is_about() -> None:
    denser = drifted(200, density=0.3)["violence"]
    assert denser["firing"] == pytest.approx(3.0, abs=0.3)
    assert denser["psi"] < 0.05
    stronger = drifted(400, factor=2.0)["violence"]
    assert stronger["firing"] == pytest.approx(1.0, abs=0.1)
    assert stronger["psi"] > 0.25
    assert drifted(200, ("violence",))["violence"]["flag"] == pytest.approx(20.0)


def test_little_is_not_enough() -> None:
    assert drifted(20, ("violence",))["violence"] == {"flag": None, "firing": None, "psi": None}


def test_the_window_slides_and_begins_anew_with_another_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_drift, "_WINDOW", 150)
    rng, shown = np.random.default_rng(0), Shown()
    drift = Drift(shown)
    drift.show()
    assert shown.found == {}
    for _ in range(150):
        drift.add(bank(), POLICY, ("violence",), acts(rng, density=0.4))
    for _ in range(150):
        drift.add(bank(), POLICY, (), acts(rng))
    drift.show()
    assert shown.found["violence"]["flag"] == 0.0
    assert shown.found["violence"]["firing"] == pytest.approx(1.0, abs=0.15)
    drift.add(bank("b"), POLICY, (), acts(rng))
    drift.show()
    assert shown.found["violence"]["firing"] is None


def test_texts_without_tokens_or_activity_are_no_error() -> None:
    assert drifted(120, tokens=0)["violence"]["firing"] is None
    assert drifted(120, density=0.0)["violence"]["firing"] == 0.0
