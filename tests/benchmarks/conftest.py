"""Arms of the training benchmark that record what they are given instead of learning."""

from __future__ import annotations

import pytest
from torch import Tensor

from benchmarks import peers
from benchmarks.peers import Setting
from tests.benchmarks.tiny_training import RecordingArm


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, RecordingArm]:
    """All arms are recording ones, by name."""
    made: dict[str, RecordingArm] = {}

    def create(arm: str, setting: Setting, sample: Tensor) -> RecordingArm:
        made[arm] = RecordingArm(setting)
        return made[arm]

    monkeypatch.setattr(peers, "create", create)
    return made
