"""The cost of asking is counted on whole prompts, and the figures are those of the scores."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.explanation import Spent, spent, summarise
from feature_bank.schema import SimulationScore


class Letters:
    """A token a character; the template puts `>` before every message and `<` where the answer begins."""

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        assert options == {"tokenize": False, "add_generation_prompt": True}
        return "".join(">" + m["content"] for m in messages) + "<"

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def scored(level: str, corr: float) -> SimulationScore:
    return SimulationScore.model_validate(
        {
            "level": level,
            "simulator": "executable",
            "n": 400,
            "corr": corr,
            "corr_low": corr - 0.1,
            "corr_high": corr + 0.1,
            "corr_null": 0.2,
            "corr_null_mean": 0.01,
            "auroc": 0.7,
        }
    )


def test_prompts_and_answers_are_counted_as_they_are_sent() -> None:
    asked = [{"role": "system", "content": "abc"}, {"role": "user", "content": "de"}]
    assert spent([(asked, "xyz"), (asked[:1], "")], Letters()) == Spent(requests=2, prompt=8 + 5, answer=3)
    assert spent([], Letters()).total == 0


def test_figures_are_those_of_the_scores() -> None:
    scores = [[scored("segment", c), scored("token", c / 2)] for c in (0.2, 0.4, 0.6, 0.9)]
    controls = [[scored("segment", 0.1), scored("token", 0.05)], []]
    figures, detail = summarise([*scores, []], controls)
    values = {name: figure.value for name, figure in figures.items()}
    assert values["corr_score_mean"] == pytest.approx(0.525)
    assert values["token_corr_score_mean"] == pytest.approx(0.2625)
    assert values["corr_score_random_directions_mean"] == pytest.approx(0.1)
    assert values["above_null"] == 0.75
    assert values["segment_rank_correlation"] == 1
    assert figures["corr_score_mean"].n == 4
    assert detail["segment"]["auroc_mean"] == 0.7
    assert detail["segment"]["pr_auc_mean"] is None


def test_too_few_features_are_no_comparison() -> None:
    with pytest.raises(SystemExit, match="too few features"):
        summarise([[]], [])
