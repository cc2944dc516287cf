"""Trainers are compared like with like: the same batches, one schedule, one evaluation, honest ratios."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import trainers
from benchmarks.peers import ARMS, HOOK_NAME
from feature_bank.sae import SAE
from tests.benchmarks.tiny_training import TINY, RecordingArm, evaluate, rows

# ---- the same for all --------------------------------------------------------------------------------------


def test_every_arm_gets_the_same_batches_in_the_same_order(recorded: dict[str, RecordingArm]) -> None:
    speeds = trainers.measure_speed(rows(), TINY, list(ARMS), 3)
    assert set(speeds) == set(recorded) == set(ARMS)
    first, *others = recorded.values()
    assert len(first.seen) == 4 * trainers.STEPS_A_ROUND  # three rounds, and one that is not timed
    for other in others:
        assert len(other.seen) == len(first.seen)
        assert all(torch.equal(a, b) for a, b in zip(first.seen, other.seen, strict=True))
    assert len({tuple(batch.flatten()[:4].tolist()) for batch in first.seen}) == len(first.seen)


def test_every_arm_trains_for_all_steps_of_its_schedule(recorded: dict[str, RecordingArm]) -> None:
    found = trainers.measure_quality(rows(), rows(64, seed=5), TINY, list(ARMS), [1e-3, 1e-2], 1500)
    for name, arm in recorded.items():
        assert len(arm.seen) == arm.setting.steps == 44
        assert set(found[name]) == {"0.001", "0.01"}


@pytest.mark.parametrize("tokens", [1, 1000, 10_000, 123_456])
def test_a_schedule_fits_its_steps(tokens: int) -> None:
    setting = trainers.schedule(TINY, tokens, 3e-4)
    assert setting.lr == 3e-4
    assert setting.steps % trainers.STEPS_A_ROUND == 0
    assert setting.warmup_steps + setting.decay_steps <= setting.steps
    rates = [setting.rate(step) for step in range(setting.steps)]
    assert max(rates) == 1.0
    assert min(rates) > 0
    assert rates[-1] == pytest.approx(1 / setting.decay_steps)


def test_our_arm_follows_the_common_schedule() -> None:
    from training.runs import TrainerConfig, learning_rate

    config = TrainerConfig(lr=1.0, warmup_fraction=4 / 40, decay_fraction=12 / 40)
    for step in range(40):
        assert learning_rate(step, 40, config) == pytest.approx(TINY.rate(step))


# ---- evaluation --------------------------------------------------------------------------------------------


def test_exactly_k_features_are_active_whatever_the_threshold() -> None:
    sae = RecordingArm(TINY).export()
    x = rows(256) * 5
    for family in ("topk", "batchtopk"):
        low, high = (evaluate(replace(sae, threshold=torch.full((24,), t)), family, x) for t in (0.01, 5.0))
        assert (low.fvu, low.l0) == (high.fvu, high.l0)
        assert low.l0 == pytest.approx(TINY.k, abs=0.2)
    assert low.threshold_l0 is not None
    assert high.threshold_l0 is not None
    assert low.threshold_l0 > high.threshold_l0


def test_a_perfect_dictionary_explains_everything_and_an_empty_one_nothing() -> None:
    x = rows(300)
    identity = SAE(
        W_enc=torch.cat([torch.eye(8), -torch.eye(8)], dim=1),
        W_dec=torch.cat([torch.eye(8), -torch.eye(8)]),
        b_enc=torch.zeros(16),
        b_dec=x.mean(0),
        threshold=torch.zeros(16),
        hook_name=HOOK_NAME,
    )
    for family in ("topk", "batchtopk"):
        whole = trainers.evaluate(identity, x, family=family, k=8, batch_tokens=100)
        nothing = trainers.evaluate(
            replace(identity, W_enc=torch.zeros(8, 16)), x, family=family, k=8, batch_tokens=100
        )
        assert whole.fvu == pytest.approx(0, abs=1e-6)
        assert nothing.fvu == pytest.approx(1)
        assert (nothing.l0, nothing.unused) == (0, 1)


def test_topk_is_evaluated_row_by_row() -> None:
    sae, x = RecordingArm(TINY).export(), rows(96)
    whole = evaluate(sae, "topk", x)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    assert evaluate(sae, "topk", x[order]).fvu == pytest.approx(whole.fvu, rel=1e-5)


# ---- ratios ------------------------------------------------------------------------------------------------


def test_a_ratio_is_ours_over_the_faster_form_of_a_library() -> None:
    speeds = {
        "sailguard_topk": [300.0, 600.0],
        "sae_lens_topk": [100.0, 200.0],
        "sae_lens_sparse_topk": [150.0, 300.0],
        "sparsify_topk": [250.0, 500.0],
    }
    found = trainers.speed_ratios(speeds)
    assert found.keys() == {"topk_vs_sae_lens", "topk_vs_sparsify"}
    assert found["topk_vs_sae_lens"]["median"] == pytest.approx(2.0)
    assert found["topk_vs_sae_lens"]["arm"] == "sae_lens_sparse_topk"
    assert found["topk_vs_sparsify"]["median"] == pytest.approx(1.2)


def test_quality_is_compared_within_a_kind_with_the_best_peer_at_its_best_rate() -> None:
    def at(*values: float) -> dict[str, dict[str, float]]:
        return {str(lr): {"fvu": fvu} for lr, fvu in enumerate(values)}

    found = trainers.quality_ratios(
        {
            "sailguard_topk": at(0.30, 0.20),
            "sae_lens_topk": at(0.25, 0.40),
            "sparsify_topk": at(0.26, 0.24),
            "sailguard_batchtopk": at(0.10, 0.11),
            "sae_lens_batchtopk": at(0.20, 0.20),
        }
    )
    assert found["topk"]["best"] == "sparsify_topk"
    assert found["topk"]["value"] == pytest.approx(0.20 / 0.24)
    assert found["batchtopk"]["value"] == pytest.approx(0.5)
