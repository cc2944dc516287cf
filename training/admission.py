"""Who may enter the guard: each of the measured fields against a rule of its own, none traded for another."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from feature_bank.schema import FeatureRecord, SimulationScore
from training.causality import selective


class AdmissionRules(BaseModel):
    """The preset's part. A rule that is None does not ask."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    min_corr: float | None = Field(default=0.0, ge=-1, le=1)
    """Fidelity: the lower bound of the segment-level CorrScore must exceed this, and its null. Of a direction it is not
    asked: what it was fitted to says what it is, and a dozen terms do not make up a domain."""
    detection: bool = True
    """Detection: the AUROC of at least one domain must lie outside its null's interval, above or below."""
    max_lookalike_fpr: float | None = Field(default=None, ge=0, le=1)
    """Detection: of each domain that the feature is tagged with."""
    causality: bool = False
    """Whether ablating it must lower the judge's score of a domain that it is tagged with, and no other's by more."""


def refusals(feature: FeatureRecord, rules: AdmissionRules) -> list[str]:
    """The rules that a feature fails, in words; none means that it is admitted."""
    found: list[str] = []
    if rules.min_corr is not None and not feature.direction:
        score = segment_score(feature.fidelity)
        if score is None:
            found.append("fidelity: the explanation was not scored")
        elif score.corr_low <= max(rules.min_corr, score.corr_null):
            found.append(
                f"fidelity: CorrScore {score.corr:.2f}, its lower bound {score.corr_low:.2f} is not above "
                f"{max(rules.min_corr, score.corr_null):.2f}"
            )
    if rules.detection and not _detects(feature):
        found.append("detection: no domain's AUROC is outside its null")
    if rules.max_lookalike_fpr is not None:
        for domain in feature.domains:
            rate = feature.scores.get(f"lookalike_fpr_{domain}")
            if rate is not None and rate > rules.max_lookalike_fpr:
                found.append(f"detection: {rate:.0%} of texts that only look like {domain} count as it")
    if rules.causality:
        causality = feature.causality
        if causality is None:
            found.append("causality: not measured")
        elif not any(selective(causality, domain) for domain in feature.domains):
            found.append("causality: ablating it lowers no domain of its own by more than it moves the others")
    return found


def segment_score(fidelity: Sequence[SimulationScore]) -> SimulationScore | None:
    """The score that admission reads: at segment level."""
    return next((score for score in fidelity if score.level == "segment"), None)


def _detects(feature: FeatureRecord) -> bool:
    for name, null in feature.scores.items():
        if name.startswith("auroc_") and name.endswith("_null"):
            key = name.removesuffix("_null")
            if feature.scores[f"{key}_low"] > null or feature.scores[f"{key}_high"] < 1 - null:
                return True
    return False
