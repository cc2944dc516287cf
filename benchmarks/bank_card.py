"""The tables of docs/bank-card.md, made from the shipped bank and nothing else.

python -m benchmarks.bank_card
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from benchmarks.tables import DOCS, markdown, replace_table
from feature_bank.atomic import atomic_file
from feature_bank.bank import Bank, shipped_bank_path
from feature_bank.schema import FeatureRecord, SimulationScore
from training.causality import selective

PAGE = DOCS / "bank-card.md"


def card_tables(bank: Bank) -> str:
    """What the bank holds, by domain and layer, and how its explanations and features score."""
    manifest, quality = bank.manifest, bank.manifest.quality
    size = sum(path.stat().st_size for path in shipped_bank_path().iterdir())
    layers = sorted({feature.layer for feature in bank.features})
    facts = [
        ["bank", f"`{bank.version}`"],
        ["made", f"{manifest.created} by sailguard {manifest.tool_version}"],
        ["size", f"{size / 1e6:.2f} MB"],
        ["features", f"{len(bank.features):,} of {quality['described']:,.0f} that were described"],
        ["of these directions", f"{sum(bool(feature.direction) for feature in bank.features):,}"],
        ["admitted", f"{quality['admitted']:,.0f} of those described"],
        ["hook points", ", ".join(f"`{name}`" for name in bank.hook_names)],
    ]
    counts = []
    for domain, head in bank.heads.items():
        tagged = [feature for feature in bank.features if domain in feature.domains]
        by_layer = Counter(feature.layer for feature in tagged)
        counts.append(
            [
                domain,
                len(tagged),
                *(by_layer[layer] for layer in layers),
                sum(weight != 0 for weight in head.weights),
                sum(share > 0 for share in head.steering),
                len({name for feature in tagged for name in feature.concepts if name.startswith(f"{domain}/")}),
                _figure(quality.get(f"judge_auroc_{domain}")),
            ]
        )
    scores = [
        [
            kind,
            level,
            len(found),
            *(_figure(float(np.quantile([s.corr for s in found], q))) for q in (0.1, 0.5, 0.9)),
            _figure(float(np.mean([s.corr_null for s in found]))),
            f"{np.mean([s.corr_low > s.corr_null for s in found]):.1%}",
            int(np.median([s.n for s in found])),
        ]
        for kind, members in _by_kind(bank)
        for level in ("segment", "token")
        if (found := _scores(members, level))
    ]
    causal = [
        [
            kind,
            len(measured := [f for f in members if f.causality is not None]),
            len([f for f in measured if f.causality is not None and any(selective(f.causality, d) for d in f.domains)]),
        ]
        for kind, members in _by_kind(bank)
    ]
    kinds = Counter(feature.kind for feature in bank.features)
    return "\n\n".join(
        [
            markdown(["", "shipped bank"], facts),
            "### Features by domain (a feature may have several)",
            markdown(
                [
                    "domain",
                    "tagged",
                    *(f"layer {n}" for n in layers),
                    "in its head",
                    "steer it",
                    "concepts",
                    "AUROC of causal judge",
                ],
                counts,
            ),
            "### Explanations on text of the test split: CorrScore",
            markdown(
                [
                    "features",
                    "level",
                    "number",
                    "10th percentile",
                    "median",
                    "90th",
                    "null, mean",
                    "above null",
                    "units, median",
                ],
                scores,
            ),
            "### Causality: ablation lowers a domain that the feature is tagged with, and no other by more",
            markdown(["features", "ablated", "selective"], causal),
            f"{kinds['lexical']:,} features are lexical (the token alone explains most of the activation), "
            f"{kinds['conceptual']:,} conceptual.",
        ]
    )


def _by_kind(bank: Bank) -> Iterator[tuple[str, list[FeatureRecord]]]:
    yield "of SAEs", [feature for feature in bank.features if not feature.direction]
    yield "directions", [feature for feature in bank.features if feature.direction]


def _scores(features: Iterable[FeatureRecord], level: str) -> list[SimulationScore]:
    return [score for feature in features for score in feature.fidelity if score.level == level]


def _figure(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def page() -> str:
    """What docs/bank-card.md should say."""
    table = card_tables(Bank.load(shipped_bank_path()))
    return replace_table(PAGE.read_text(encoding="utf-8"), table, PAGE.name)


if __name__ == "__main__":
    text = page()
    with atomic_file(PAGE) as tmp:
        tmp.write_text(text, encoding="utf-8")
