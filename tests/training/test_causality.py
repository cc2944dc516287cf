"""Ablation's effects: exactly what taking the feature out does, on a model where that is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from feature_bank.schema import Causality
from tests.training.samples import document, random_sae
from training.causality import Change, TextModel, ablation_effects, fit_judge, selective
from training.contrast import ContrastTexts
from training.corpus import OWN_SOURCE

HOOK = "blocks.1.hook_resid_post"


def texts() -> ContrastTexts:
    words = ["the ballot was counted", "the kettle was boiling", "a senate vote on the treaty", "a garden by the river"]
    found = [
        document(
            f"{words[i % 4]} {i}",
            domains=["politics"] if i % 2 == 0 else [],
            known=["politics"],
            source=OWN_SOURCE,
            split="test" if i % 8 > 5 else "discovery",
        )
        for i in range(40)
    ]
    return ContrastTexts(documents=found, pairs=[], hard=[])


def test_a_change_takes_out_exactly_the_feature_and_only_where_it_fires() -> None:
    sae = random_sae()
    weight, bias, threshold = sae.rows()
    items = [3, 5]
    change = Change(
        hook_name=HOOK, W_enc=weight.T[items], b_enc=bias[items], threshold=threshold[items], W_dec=sae.W_dec[items]
    )
    x = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0))
    changed = change.apply(x, [0, 1])
    acts = sae.encode(x.reshape(-1, 8)).reshape(2, 7, -1)
    for row, feature in enumerate(items):
        expected = x[row] - acts[row, :, feature, None] * sae.W_dec[feature]
        torch.testing.assert_close(changed[row], expected)
        silent = acts[row, :, feature] == 0
        assert torch.equal(changed[row][silent], x[row][silent])


def test_a_feature_that_never_fires_moves_nothing_and_the_batch_does_not_matter(
    tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = texts()
    reader = TextModel(tiny_model, tiny_tokenizer, given)
    together = reader.read(reader.rows)
    monkeypatch.setattr("training.causality._BATCH_TOKENS", 1)
    np.testing.assert_allclose(reader.read(reader.rows), together, atol=1e-5)
    monkeypatch.undo()

    width = tiny_model.config.hidden_size
    sae = random_sae(d_in=width, d_sae=6)
    chosen = type(sae)(**{**vars(sae), "threshold": torch.tensor([1e6, *[0.1] * 5]), "b_enc": torch.full((6,), 10.0)})
    judge, means = fit_judge(reader, given)
    assert judge.domains == ("politics",)
    assert 0.0 <= judge.test_auroc["politics"] <= 1.0
    features = [(HOOK, i) for i in range(3)]
    found = ablation_effects(
        reader, judge, means, {HOOK: chosen}, features, [[0, 1, 2, 3], [4, 5, 6], [7]], lambda *_: None
    )
    assert set(found) == set(features[:2])  # one text is too few
    assert found[features[0]].effects["politics"] == 0.0
    assert found[features[1]].effects["politics"] != 0.0
    assert found[features[1]].low["politics"] <= found[features[1]].effects["politics"]
    assert found[features[1]].high["politics"] >= found[features[1]].effects["politics"]


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "mlp_out"])
def test_a_pass_resumed_at_the_hook_point_gives_what_the_whole_pass_does_and_leaves_the_model_as_it_was(
    tiny_model: Any, tiny_tokenizer: Any, site: str
) -> None:
    given, width, hook_name = texts(), tiny_model.config.hidden_size, f"blocks.1.hook_{site}"
    sae = random_sae(d_in=width, d_sae=6)
    whole = TextModel(tiny_model, tiny_tokenizer, given)
    resuming = TextModel(tiny_model, tiny_tokenizer, given, [hook_name])
    before = whole.read(whole.rows)
    np.testing.assert_array_equal(resuming.read(resuming.rows), before)
    rows = resuming.rows[:9] * 2
    items = torch.arange(len(rows)) % 6
    change = Change(
        hook_name=hook_name,
        W_enc=sae.rows()[0].T[items],
        b_enc=torch.full((len(rows),), 10.0),
        threshold=sae.threshold[items],
        W_dec=sae.W_dec[items],
    )
    changed = whole.read(rows, change)
    assert not np.allclose(changed, before[:9].repeat(2, axis=0), atol=1e-3)
    np.testing.assert_allclose(resuming.read(rows, change), changed, atol=1e-5)
    np.testing.assert_array_equal(whole.read(whole.rows), before)


def effects(**values: tuple[float, float]) -> Causality:
    return Causality(
        texts=8,
        effects={name: mean for name, (mean, _) in values.items()},  # type: ignore[misc]
        low={name: mean - margin for name, (mean, margin) in values.items()},  # type: ignore[misc]
        high={name: mean + margin for name, (mean, margin) in values.items()},  # type: ignore[misc]
    )


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (effects(terror=(-1.0, 0.2), violence=(-0.5, 0.2)), True),
        (effects(terror=(-1.0, 1.2), violence=(-0.5, 0.2)), False),
        (effects(terror=(1.0, 0.2), violence=(0.0, 0.2)), False),
        (effects(terror=(-1.0, 0.2), violence=(1.5, 0.2)), False),
        (effects(violence=(-1.0, 0.2)), False),
    ],
)
def test_selective_means_the_own_score_falls_beyond_chance_and_by_more_than_any_other_moves(
    found: Causality, expected: bool
) -> None:
    assert selective(found, "terror") is expected
