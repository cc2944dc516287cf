"""Every kind that a peer has is compared; each arm learns and exports in the units of its input; peers are pinned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import peers, trainers, training
from benchmarks.peers import ARMS, PACKAGES
from tests.benchmarks.tiny_training import TINY, evaluate, rows

ROOT = Path(__file__).parents[2]


def test_every_kind_that_a_peer_has_is_compared_with_ours() -> None:
    ours = {family for library, _, family in ARMS.values() if library == "sailguard"}
    assert ours == {"topk", "batchtopk"}
    assert {library for library, _, _ in ARMS.values()} == {"sailguard", *PACKAGES}
    assert training.arm_names([]) == ["sailguard_topk", "sailguard_batchtopk"]
    assert training.arm_names(list(PACKAGES)) == list(ARMS)
    with pytest.raises(ValueError, match="torchlens"):
        training.arm_names(["torchlens"])


def test_a_peer_that_is_not_installed_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        @staticmethod
        def create(*_: Any) -> None:
            raise ModuleNotFoundError("No module named 'sparsify'")

    monkeypatch.setattr(peers, "import_module", lambda name: Module)
    with pytest.raises(peers.PeerMissingError, match=r"eai-sparsify .*requirements-peers\.txt"):
        peers.create("sparsify_topk", TINY, rows())


@pytest.mark.parametrize("arm", list(ARMS))
@pytest.mark.filterwarnings("ignore")  # other libraries' own
def test_an_arm_learns_and_exports_in_the_units_of_its_input(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library, _, family = ARMS[arm]
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")  # it is read when the next line imports sparsify
    if library != "sailguard":
        pytest.importorskip(library, exc_type=ImportError)
    setting = replace(TINY, steps=120)
    batches = trainers.Batches(rows(2048), setting, 1)
    made = peers.create(arm, setting, batches.sample())
    for number in range(setting.steps):
        (batch,) = batches.round(number)
        before = batch.clone()
        made.step(batch)
        assert torch.equal(batch, before)  # an arm that writes into its batch would change the next arm's
    quality = evaluate(made.export(), family)
    assert quality.fvu < 0.5
    assert quality.l0 <= TINY.k


def pins(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))


def test_the_peers_are_pinned_exactly_and_agree_with_the_projects_own_pins() -> None:
    theirs, own = pins(ROOT / peers.REQUIREMENTS), pins(ROOT / "constraints.txt")
    assert set(PACKAGES.values()) <= theirs.keys()
    assert {name: version for name, version in theirs.items() if own.get(name, version) != version} == {}
    assert "torch" not in theirs
