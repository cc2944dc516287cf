"""Explaining and simulating many features through one endpoint, with whatever it lasts for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.explain.endpoint import ChatEndpoint, Estimate
from training.explain.interface import Explanation, FeatureEvidence
from training.explain.llm import LlmExplainer
from training.explain.replies import Answerer
from training.explain.spending import EndpointError, Usage
from training.simulation.llm import LlmSimulator, SegmentText, Simulation, correlation, truths
from training.simulation.prompts import Level

Report = Callable[[str, int, int, str], None]
_TYPICAL_EXPLANATION = "Fires on words of this kind in text that is about this subject, most strongly on its nouns."


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmRun:
    """What came of a run, finished or stopped."""

    rows: list[dict[str, Any]]
    """One a feature that was asked about: `id`, `explanation` (null if no answer could be read), `explainer`, and
    `scores`: one a level whose requests were all sent."""
    summary: dict[str, Any]
    stopped: EndpointError | None
    """Why the run ended before all was asked."""


def run(
    evidence: Sequence[FeatureEvidence],
    segments: Mapping[str, Sequence[SegmentText]],
    *,
    endpoint: ChatEndpoint,
    levels: Sequence[Level] = (),
    report: Report | None = None,
) -> LlmRun:
    """Explain features, and simulate their explanations on the segments of the test split, feature id by feature id.

    A cap or a dead server does not throw away what was answered: the rows then hold what is finished, and `stopped`
    says why. The same call goes on from there, because all answers are in the endpoint's cache.
    """
    stopped = None
    try:
        rows = answered_rows(evidence, segments, endpoint=endpoint, levels=levels, report=report)
    except EndpointError as error:
        stopped = error
        endpoint.offline = True
        try:
            rows = answered_rows(evidence, segments, endpoint=endpoint, levels=levels)
        finally:
            endpoint.offline = False
    return LlmRun(rows=rows, summary=summarise(rows, len(evidence), levels, endpoint.usage), stopped=stopped)


def answered_rows(
    evidence: Sequence[FeatureEvidence],
    segments: Mapping[str, Sequence[SegmentText]],
    *,
    endpoint: Answerer,
    levels: Sequence[Level] = (),
    report: Report | None = None,
) -> list[dict[str, Any]]:
    """The rows of `LlmRun` of the features that were asked about. Raises what `endpoint.ask_all` raises."""
    explanations, unasked, simulations = _pass(evidence, segments, endpoint, levels, report)
    return [
        _row(feature.id, explanations.get(feature.id), simulations, segments, endpoint.model)
        for feature in evidence
        if feature.id not in unasked
    ]


def estimate(
    evidence: Sequence[FeatureEvidence],
    segments: Mapping[str, Sequence[SegmentText]],
    *,
    endpoint: ChatEndpoint,
    levels: Sequence[Level] = (),
) -> dict[str, Estimate]:
    """What `run` would cost, step by step (`explain`, `token`, `segment`), without sending anything.

    Explanations that are not written yet stand in as one of usual length. Second questions after an answer that cannot
    be read are not foreseen.
    """
    explainer, simulator = LlmExplainer(endpoint), LlmSimulator(endpoint)
    endpoint.offline = True
    try:
        known, unasked = explainer.explain_known(evidence)
    finally:
        endpoint.offline = False
    texts = {id_: explanation.text for id_, explanation in known.items()}
    texts |= dict.fromkeys(unasked, _TYPICAL_EXPLANATION)
    estimates = {"explain": endpoint.estimate(list(explainer.requests(evidence).values()))}
    for level in levels:
        asked = [
            request for id_, text in texts.items() for request in simulator.requests(level, text, segments.get(id_, ()))
        ]
        estimates[level] = endpoint.estimate(asked)
    return estimates


def _pass(
    evidence: Sequence[FeatureEvidence],
    segments: Mapping[str, Sequence[SegmentText]],
    endpoint: Answerer,
    levels: Sequence[Level],
    report: Report | None,
) -> tuple[dict[str, Explanation], set[str], dict[Level, dict[str, Simulation]]]:
    explainer = LlmExplainer(endpoint, report=_step(report, "explain"))
    explanations, unasked = explainer.explain_known(evidence)
    texts = {id_: explanation.text for id_, explanation in explanations.items()}
    simulations: dict[Level, dict[str, Simulation]] = {}
    for level in levels:
        simulator = LlmSimulator(endpoint, report=_step(report, level))
        simulations[level] = simulator.simulate(level, texts, segments)
    return explanations, unasked, simulations


def _step(report: Report | None, step: str) -> Callable[[int, int], None] | None:
    if report is None:
        return None
    return lambda done, total: report(step, done, total, f"{done} of {total} requests")


def _row(
    id_: str,
    explanation: Explanation | None,
    simulations: Mapping[Level, Mapping[str, Simulation]],
    segments: Mapping[str, Sequence[SegmentText]],
    model: str,
) -> dict[str, Any]:
    scores = []
    for level, by_id in simulations.items():
        simulation = by_id.get(id_)
        if simulation is None or not simulation.complete:
            continue
        corr = correlation(simulation.values, truths(level, segments[id_]))
        scores.append(
            {
                "level": level,
                "simulator": model,
                "n": len(simulation.values) - simulation.missing,
                "missing": simulation.missing,
                "corr": None if corr is None else round(corr, 4),
                "prompt_tokens": simulation.prompt_tokens,
                "completion_tokens": simulation.completion_tokens,
            }
        )
    return {
        "id": id_,
        "explanation": None if explanation is None else explanation.text,
        "explainer": None if explanation is None else explanation.explainer.model_dump(),
        "scores": scores,
    }


def summarise(rows: Sequence[dict[str, Any]], features: int, levels: Sequence[Level], usage: Usage) -> dict[str, Any]:
    """The summary of `LlmRun`. features: how many were to be asked about."""
    summary: dict[str, Any] = {
        "features": features,
        "explained": sum(row["explanation"] is not None for row in rows),
        "unreadable": sum(row["explanation"] is None for row in rows),
        "calls": usage.calls,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "estimated_calls": usage.estimated_calls,
    }
    for level in levels:
        scores = [score for row in rows for score in row["scores"] if score["level"] == level]
        asked = sum(score["n"] + score["missing"] for score in scores)
        summary[level] = {
            "features": len(scores),
            "tokens": sum(score["prompt_tokens"] + score["completion_tokens"] for score in scores),
            "missing_share": round(sum(score["missing"] for score in scores) / asked, 4) if asked else None,
        }
    if {"token", "segment"} <= set(levels):
        summary |= compare_levels(rows)
    return summary


def compare_levels(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the segment level saves, on the features that were simulated at both levels, and how alike both rank them.

    `segment_token_saving`: 1 - tokens of the segment level / tokens of the token level, prompts and answers.
    `segment_rank_correlation`: Spearman's, over the `compared_features` whose score exists at both levels; null for
    fewer than three.
    """
    from scipy.stats import spearmanr

    both = [scores for row in rows if len(scores := {score["level"]: score for score in row["scores"]}) == 2]
    spent = {
        level: sum(scores[level]["prompt_tokens"] + scores[level]["completion_tokens"] for scores in both)
        for level in ("token", "segment")
    }
    pairs = [
        (scores["token"]["corr"], scores["segment"]["corr"])
        for scores in both
        if scores["token"]["corr"] is not None and scores["segment"]["corr"] is not None
    ]
    rank = None
    if len(pairs) > 2 and all(len(set(side)) > 1 for side in zip(*pairs, strict=True)):
        rank = round(float(spearmanr(pairs).statistic), 4)
    return {
        "segment_token_saving": round(1 - spent["segment"] / spent["token"], 4) if spent["token"] else None,
        "segment_rank_correlation": rank,
        "compared_features": len(pairs),
    }
