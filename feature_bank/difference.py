"""What differs between two banks: features, labels, admission, heads, thresholds, quality, and their origin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from feature_bank.bank import Bank
from feature_bank.schema import FeatureRecord, HeadRecord, Record

__all__ = ["BankDifference", "Change", "FeatureLine", "HeadDifference", "ThresholdMove", "compare_banks"]

_LABELS = ("domains", "concepts", "explanation")
_ORIGIN = ("name", "version", "created", "tool_version", "parent", "corpus", "canary")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A value before and after; None where there was or is none."""

    name: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureLine:
    """A feature that only one of the banks has."""

    id: str
    domains: tuple[str, ...]
    explanation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdMove:
    """A domain's threshold at one false-positive rate."""

    domain: str
    kind: str
    """`whole` for texts that lie there whole, `streaming` for responses that are judged token by token."""
    rate: str
    before: float | None
    after: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadDifference:
    """How one domain's head changed."""

    domain: str
    features_in: tuple[str, ...]
    features_out: tuple[str, ...]
    weights: tuple[Change, ...]
    """Of the features in both, those whose weight changed, largest change first."""
    others: tuple[Change, ...]
    """Bias, calibration, and the steering of features in both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BankDifference:
    """What turns one bank into another. A feature is the same if its id is, and the SAE that it is a row of."""

    before: str
    after: str
    same: bool
    """Whether the two are the same to the byte (but for reviews)."""
    features_in: tuple[FeatureLine, ...] = ()
    features_out: tuple[FeatureLine, ...] = ()
    relabelled: Mapping[str, tuple[Change, ...]]
    """Changed domains, concepts and explanations, by feature."""
    admitted: tuple[Change, ...] = ()
    """Features that were let into the guard or are not any more; their refusals stand in the records."""
    remeasured: Mapping[str, int]
    """Other fields of the records, with the number of features whose value changed."""
    heads: tuple[HeadDifference, ...] = ()
    thresholds: tuple[ThresholdMove, ...] = ()
    quality: tuple[Change, ...] = ()
    model: tuple[Change, ...] = ()
    hook_points: tuple[Change, ...] = ()
    """Hook points and their SAEs: `NAME` where one came or went, `NAME.FIELD` where a field changed."""
    origin: tuple[Change, ...] = ()
    """Pooling, and the rest of the manifest."""


def compare_banks(before: Bank, after: Bank) -> BankDifference:
    """What differs between two banks."""
    pairs = [(feature, after.by_id[feature.id]) for feature in before.features if _is_shared(feature, before, after)]
    shared = {feature.id for feature, _ in pairs}
    relabelled = {old.id: tuple(_changes(_fields(old, _LABELS), _fields(new, _LABELS))) for old, new in pairs}
    return BankDifference(
        before=before.version,
        after=after.version,
        same=before.content_hash == after.content_hash,
        features_in=tuple(_line(feature) for feature in after.features if feature.id not in shared),
        features_out=tuple(_line(feature) for feature in before.features if feature.id not in shared),
        relabelled={feature: changes for feature, changes in relabelled.items() if changes},
        admitted=tuple(
            Change(name=old.id, before=old.admitted, after=new.admitted)
            for old, new in pairs
            if old.admitted != new.admitted
        ),
        remeasured=dict(Counter(name for old, new in pairs for name in _remeasured(old, new))),
        heads=tuple(_head_differences(before, after)),
        thresholds=tuple(_threshold_moves(before, after)),
        quality=tuple(_changes(before.manifest.quality, after.manifest.quality)),
        model=tuple(_changes(before.manifest.model.model_dump(), after.manifest.model.model_dump())),
        hook_points=tuple(_changes(_hook_fields(before), _hook_fields(after))),
        origin=tuple(_changes(_origin(before), _origin(after))),
    )


def _is_shared(feature: FeatureRecord, before: Bank, after: Bank) -> bool:
    other = after.by_id.get(feature.id)
    return other is not None and _sae(before, feature) == _sae(after, other)


def _sae(bank: Bank, feature: FeatureRecord) -> tuple[str, str]:
    saes = {hook.hook_name: hook.sae_sha256 for hook in bank.manifest.hook_points}
    return feature.hook_name, saes[feature.hook_name]


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Change]:
    for name in dict.fromkeys((*before, *after)):
        if before.get(name) != after.get(name):
            yield Change(name=name, before=before.get(name), after=after.get(name))


def _fields(record: Record, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(record, name) for name in names}


def _line(feature: FeatureRecord) -> FeatureLine:
    return FeatureLine(id=feature.id, domains=tuple(feature.domains), explanation=feature.explanation)


def _remeasured(old: FeatureRecord, new: FeatureRecord) -> Iterator[str]:
    for name in FeatureRecord.model_fields:
        if name not in (*_LABELS, "admitted") and getattr(old, name) != getattr(new, name):
            yield name


def _head_differences(before: Bank, after: Bank) -> Iterator[HeadDifference]:
    for domain in dict.fromkeys((*before.heads, *after.heads)):
        old, new = before.heads.get(domain), after.heads.get(domain)
        old_weights, new_weights = _weights(old), _weights(new)
        both = [feature for feature in old_weights if feature in new_weights]
        moved = [Change(name=f, before=old_weights[f], after=new_weights[f]) for f in both]
        found = HeadDifference(
            domain=domain,
            features_in=tuple(feature for feature in new_weights if feature not in old_weights),
            features_out=tuple(feature for feature in old_weights if feature not in new_weights),
            weights=tuple(sorted((c for c in moved if c.before != c.after), key=lambda c: -abs(c.after - c.before))),
            others=tuple(_changes(_head_fields(old, both), _head_fields(new, both))),
        )
        if found.features_in or found.features_out or found.weights or found.others:
            yield found


def _weights(head: HeadRecord | None) -> dict[str, float]:
    return {} if head is None else dict(zip(head.features, head.weights, strict=True))


def _head_fields(head: HeadRecord | None, features: Sequence[str]) -> dict[str, Any]:
    if head is None:
        return {}
    fields = {"bias": head.bias, "slope": head.calibration.slope, "intercept": head.calibration.intercept}
    steering = dict(zip(head.features, head.steering, strict=True))
    return fields | {f"steering {feature}": steering[feature] for feature in features}


def _threshold_moves(before: Bank, after: Bank) -> Iterator[ThresholdMove]:
    for domain in dict.fromkeys((*before.heads, *after.heads)):
        for kind, name in (("whole", "thresholds"), ("streaming", "streaming_thresholds")):
            old, new = (getattr(bank.heads.get(domain), name, {}) for bank in (before, after))
            for change in sorted(_changes(old, new), key=lambda change: change.name):
                yield ThresholdMove(
                    domain=domain, kind=kind, rate=change.name, before=change.before, after=change.after
                )


def _hook_fields(bank: Bank) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for hook in bank.manifest.hook_points:
        fields[hook.hook_name] = "present"
        record = hook.model_dump(exclude={"hook_name"})
        fields |= {f"{hook.hook_name}.{name}": value for name, value in record.items()}
    return fields


def _origin(bank: Bank) -> dict[str, Any]:
    pooling = {f"pooling.{name}": value for name, value in bank.pooling.model_dump().items()}
    return pooling | {name: value for name, value in bank.manifest.model_dump().items() if name in _ORIGIN}
