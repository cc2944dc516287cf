"""The metrics show what the features that were asked for did in each prompt and text, and nothing of the others."""

from __future__ import annotations

from typing import Any

from guard.metrics import Metrics
from tests.factories import make_policy
from tests.guard.conftest import VARIED, Attach


def test_only_the_features_that_were_asked_for_are_shown(attach: Attach, bank_of: Any) -> None:
    bank = bank_of(**VARIED)
    guard = attach(make_policy(), **VARIED)
    trace = guard.trace("Tell me a story about a bird.")
    active = {hit.id: hit.activation for token in trace.tokens for hit in token.features}
    feature = max(active, key=active.__getitem__)
    metrics = Metrics(features=[feature, "L9/404"])
    guard = attach(make_policy(), metrics, **VARIED)
    guard.chat([{"role": "user", "content": "Tell me a story about a bird."}], max_new_tokens=2)

    def shown(name: str, which: str) -> float | None:
        return metrics.registry.get_sample_value(f"sailguard_feature_activation_{name}", {"feature": which})

    assert shown("count", feature) == 1
    assert (shown("sum", feature) or 0.0) > 0.0
    assert shown("count", "L9/404") == 0  # the bank has no such feature
    others = [one.id for one in bank.features if one.id != feature]
    assert {shown("count", other) for other in others} == {None}
