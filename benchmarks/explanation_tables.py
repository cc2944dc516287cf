"""What docs/performance.md shows of the explanation benchmark."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.results import Result
from benchmarks.tables import markdown

_LEVELS = (("segment", "", "one segment in its text"), ("token", "token_", "every token of the segments"))


def explanation_tables(result: Result) -> str:
    """Scores against their nulls, what a feature costs, and how the two levels agree."""
    detail, figures = result.detail, result.figures
    n = figures["corr_score_mean"].n
    scores = []
    for level, prefix, unit in _LEVELS:
        quantiles = detail[level]["corr_quantiles"]
        scores.append(
            [
                f"{level} ({unit})",
                f"{result.value(f'{prefix}corr_score_mean'):.3f}",
                f"{quantiles['0.5']:.3f} ({quantiles['0.25']:.3f} to {quantiles['0.75']:.3f})",
                f"{result.value(f'{prefix}corr_score_null_mean'):.3f}",
                f"{result.value(f'{prefix}corr_score_null_p975_mean'):.3f}",
                f"{result.value(f'{prefix}corr_score_random_directions_mean'):.3f}",
                f"{100 * (result.value(f'{prefix}above_null') or 0):.1f} %",
            ]
        )
    low, high = detail["segment_rank_correlation_95"]
    parts = [
        f"{result.date}, {result.machine.cores} cores. Bank `{detail['bank']['version']}`, {n} of its "
        f"{detail['bank']['features']} features. Seconds a feature: "
        f"{result.value('explain_seconds_per_feature'):.3f} for its explanation, "
        f"{result.value('simulate_seconds_per_feature'):.3f} for its scores at both levels.",
        markdown(
            [
                "CorrScore",
                "mean",
                "median (quartiles)",
                "others' explanations",
                "their 97.5 %",
                "random directions",
                "above the null",
            ],
            scores,
        ),
        f"The levels' scores agree in rank by {result.value('segment_rank_correlation'):.3f} (Spearman, 95 % "
        f"{low:.3f} to {high:.3f}). What a language model would be sent and answer, in tokens a feature:",
        markdown(
            ["level", "requests", "prompts", "answers", "all"],
            [_spent(level, detail["tokens_per_feature"][level]) for level, _, _ in _LEVELS],
        ),
        f"The segment level saves {100 * (result.value('segment_token_saving') or 0):.1f} % of the tokens.",
    ]
    return "\n\n".join(parts)


def _spent(level: str, tokens: Mapping[str, float]) -> list[str]:
    prompt, answer = tokens["prompt"], tokens["answer"]
    return [level, f"{tokens['requests']:.1f}", *(f"{n:,.0f}" for n in (prompt, answer, prompt + answer))]
