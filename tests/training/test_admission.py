"""Admission: every rule stands alone, and what is not measured does not pass."""

from __future__ import annotations

from typing import Any

import pytest

from feature_bank.schema import Causality, FeatureRecord, SimulationScore
from training.admission import AdmissionRules, refusals


def score(level: str = "segment", **fields: Any) -> SimulationScore:
    defaults = {"corr": 0.5, "corr_low": 0.4, "corr_high": 0.6, "corr_null": 0.1, "corr_null_mean": 0.0}
    return SimulationScore(level=level, simulator="executable", n=300, **{**defaults, **fields})  # type: ignore[arg-type]


def feature(**fields: Any) -> FeatureRecord:
    defaults: dict[str, Any] = {
        "id": "L1/2",
        "hook_name": "blocks.1.hook_resid_post",
        "layer": 1,
        "index": 2,
        "domains": ["terror"],
        "explanation": "Fires on “bomb”.",
        "threshold": 0.1,
        "scale": 1.0,
        "density": 0.01,
        "fidelity": [score("token", corr_low=-1), score()],
        "scores": {
            "auroc_terror": 0.8,
            "auroc_terror_low": 0.75,
            "auroc_terror_high": 0.85,
            "auroc_terror_null": 0.55,
            "lookalike_fpr_terror": 0.1,
        },
        "causality": Causality(
            texts=8,
            effects={"terror": -1.0, "violence": 0.1},
            low={"terror": -1.2, "violence": 0.0},
            high={"terror": -0.8, "violence": 0.2},
        ),
    }
    return FeatureRecord(**{**defaults, **fields})


STRICT = AdmissionRules(min_corr=0.2, max_lookalike_fpr=0.3, causality=True)


def test_a_feature_that_passes_every_rule_is_admitted() -> None:
    assert refusals(feature(), STRICT) == []


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"fidelity": []}, "fidelity"),
        ({"fidelity": [score("token")]}, "fidelity"),
        ({"fidelity": [score(corr_low=0.15)]}, "fidelity"),
        ({"fidelity": [score(corr_null=0.45)]}, "fidelity"),
        ({"scores": {}}, "detection"),
        ({"scores": {**feature().scores, "auroc_terror_low": 0.5, "auroc_terror_high": 0.9}}, "detection"),
        ({"scores": {**feature().scores, "lookalike_fpr_terror": 0.4}}, "detection"),
        ({"causality": None}, "causality"),
        ({"domains": ["violence"]}, "causality"),
    ],
)
def test_each_field_alone_refuses_and_no_other_makes_up_for_it(fields: dict[str, Any], rule: str) -> None:
    found = refusals(feature(**fields), STRICT)
    assert len(found) == 1
    assert found[0].startswith(f"{rule}: ")


def test_a_direction_is_what_it_was_fitted_to_and_is_asked_for_the_rest() -> None:
    weak = {"direction": "terror", "fidelity": [score(corr_low=0.0)]}
    assert refusals(feature(**weak), STRICT) == []
    for fields in ({"scores": {}}, {"causality": None}):
        assert refusals(feature(**weak, **fields), STRICT) != []


def test_a_feature_that_speaks_against_a_domain_detects_too() -> None:
    scores = {"auroc_terror": 0.3, "auroc_terror_low": 0.25, "auroc_terror_high": 0.35, "auroc_terror_null": 0.55}
    assert refusals(feature(domains=[], scores=scores), AdmissionRules()) == []


def test_rules_that_are_switched_off_do_not_ask() -> None:
    off = AdmissionRules(min_corr=None, detection=False)
    assert refusals(feature(fidelity=[], scores={}, causality=None), off) == []
