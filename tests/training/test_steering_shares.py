"""What a domain is steered with: features that move the output, in shares that make up the mean difference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from feature_bank.sae import SAE
from feature_bank.schema import Causality, FeatureRecord
from training.selected import FeatureKey, TrainedHook
from training.steering import steering_features, steering_shares

HOOK, OTHER = "blocks.3.hook_resid_post", "blocks.5.hook_resid_post"
D_IN, N = 16, 8


@pytest.fixture
def hook() -> TrainedHook:
    decoder = torch.linalg.qr(torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(0))).Q[:N]
    decoder = decoder * torch.arange(1, N + 1)[:, None]
    sae = SAE(
        W_enc=decoder.T.contiguous(),
        W_dec=decoder,
        b_enc=torch.zeros(N),
        b_dec=torch.zeros(D_IN),
        threshold=torch.zeros(N),
        hook_name=HOOK,
    )
    return TrainedHook(sae=sae, sha256="0" * 64, k=2, fvu=0.1, l0=2.0, dead_fraction=0.0)


def record(key: FeatureKey, **effects: float) -> FeatureRecord:
    """A feature whose ablation moves the judge's logits by `effects`, give or take little."""
    causality = None
    if effects:
        low, high = ({d: e + side for d, e in effects.items()} for side in (-0.1, 0.1))
        causality = Causality.model_validate({"texts": 6, "effects": effects, "low": low, "high": high})
    return FeatureRecord(
        id=f"L3/{key[1]}",
        hook_name=key[0],
        layer=3,
        index=key[1],
        domains=["terror"],
        explanation="x",
        threshold=0.0,
        scale=1.0,
        density=0.1,
        causality=causality,
    )


def test_only_features_that_move_this_domain_and_no_other_more_are_taken() -> None:
    records = {
        (HOOK, 0): record((HOOK, 0), terror=-1.0, violence=-0.2),
        (HOOK, 1): record((HOOK, 1), terror=-1.0, violence=-2.0),
        (HOOK, 2): record((HOOK, 2), terror=0.5),
        (HOOK, 3): record((HOOK, 3)),
    }
    assert steering_features(records, "terror") == [(HOOK, 0)]
    assert steering_features(records, "violence") == [(HOOK, 1)]
    assert steering_features(records, "politics") == list(records)  # nothing is known to move it


def test_shares_add_up_to_the_difference_and_none_is_negative(
    hook: TrainedHook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.steering.DAMPING", 1e-9)
    wanted = np.array([0.5, 0, 2.0, 0, 0, 1.0, 0, -3.0], dtype=np.float32)
    rows = hook.sae.W_dec.numpy()
    features = [(HOOK, i) for i in range(N)] + [(OTHER, 0)]
    shares = steering_shares(wanted @ rows, hook, features, most=N)
    assert all(share > 0 for share in shares.values())
    found = {key: share for key, share in shares.items() if share > 1e-3}
    assert found == {(HOOK, i): pytest.approx(wanted[i], abs=1e-3) for i in (0, 2, 5)}


def test_at_most_so_many_have_a_share_and_they_are_those_that_carry_most(hook: TrainedHook) -> None:
    rows = hook.sae.W_dec.numpy()
    difference = np.ones(N, dtype=np.float32) @ rows  # the longer the row, the more it carries
    shares = steering_shares(difference, hook, [(HOOK, i) for i in range(N)], most=3)
    assert sorted(shares) == [(HOOK, 5), (HOOK, 6), (HOOK, 7)]
    assert all(share > 0.5 for share in shares.values())


def test_where_nothing_may_be_used_there_is_no_share(hook: TrainedHook) -> None:
    assert steering_shares(np.ones(D_IN, dtype=np.float32), hook, [(OTHER, 1)], most=3) == {}
