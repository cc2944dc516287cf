"""A bank whose records have every field, with texts of several scripts and texts that mean a page harm."""

from __future__ import annotations

import hashlib
import random
import re
from pathlib import Path
from typing import Any

import numpy as np

from feature_bank.bank import Bank, Rows, save_bank
from feature_bank.schema import (
    Calibration,
    Causality,
    ConceptScore,
    Duplicate,
    Evidence,
    Explainer,
    FeatureRecord,
    HeadRecord,
    Heads,
    Pooling,
    Predicate,
    PredicateTerm,
    SimulationScore,
    Term,
)
from feature_bank.taxonomy import DOMAINS, Domain, Taxonomy

LAYERS = (6, 14, 22)
WIDTH = 4
HOSTILE = (
    "<script>document.title='taken'</script>",
    "</script><script>document.title='taken'</script>",
    "</style><style>body{display:none}</style>",
    "<!-- <script> --> ]]>",
    '" onmouseover="document.title=\'taken\'" x="',
    "' autofocus onfocus='document.title=1' x='",
    "`${document.title='taken'}` {{ 7 * 7 }} {% raw %}",
    "<img src=x onerror=\"document.title='taken'\">",
    "<svg><animate onbegin=\"document.title='taken'\"/></svg>",
    "&lt;b&gt; &#x3c;script&#x3e; &amp;amp;",
    "javascript:document.title='taken'",
    "Donaudampfschifffahrtsgesellschaftskapitänsmützenabzeichen" * 3,
    "\x1b[31mred\x00 \x07bell \x85 \u202egnihsup\u2066 \ufeff",
    "人民代表大会于周一开幕，记者在现场报道。",
    "أعلنت اللجنة نتائج التصويت صباح الاثنين.",
    "הוועדה פרסמה את תוצאות ההצבעה ביום שני.",
    "👩🏽‍⚖️ e\u0301 ﷽ \u0e01\u0e33",
)


def write_rich_bank(folder: Path, taxonomy: Taxonomy, *, features: int = 30, hostile: bool = True) -> Bank:
    """Write a bank of made-up figures. With `hostile`, every text field of some feature holds each of HOSTILE."""
    generator = random.Random(0)
    each = [features // len(LAYERS) + (i < features % len(LAYERS)) for i in range(len(LAYERS))]
    records = [
        _record(generator, layer, i, taxonomy)
        for layer, number in zip(LAYERS, each, strict=True)
        for i in range(number)
    ]
    if hostile:
        records = [_poison(record, HOSTILE[i % len(HOSTILE)]) for i, record in enumerate(records)]
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in LAYERS]
    text = HOSTILE[0] if hostile else "A committee read the report on the harbour twice."
    manifest = {
        "name": "rich" if not hostile else f"rich {HOSTILE[2]}",
        "version": "1.0",
        "created": "2026-01-02",
        "tool_version": "0",
        "parent": "rich@0.9+00000000",
        "model": {
            "id": "model" if not hostile else HOSTILE[7],
            "revision": "main",
            "config_hash": _digest("c"),
            "tokenizer_hash": _digest("t"),
            "d_model": WIDTH,
            "n_layers": 30,
        },
        "hook_points": [
            {
                "hook_name": hook,
                "d_in": WIDTH,
                "d_sae": 4608,
                "n_selected": number,
                "sae_sha256": _digest(hook),
                "fvu": 0.12,
                "l0": 32.0,
                "dead_fraction": 0.001,
                "fires_precision": 0.99,
                "fires_recall": 0.9,
            }
            for hook, number in zip(hooks, each, strict=True)
        ],
        "corpus": [
            {"name": "own", "licence": "CC0-1.0" if not hostile else text, "sha256": _digest("o"), "rows": 1234}
        ],
        "canary": {"text": text, "activations": {records[0].id: 1.0}, "tolerance": 0.05},
        "quality": {
            **{f"test_auroc_{domain}": 0.9 + 0.01 * i for i, domain in enumerate(DOMAINS)},
            **{f"test_tpr_at_fpr1_{domain}": 0.6 + 0.05 * i for i, domain in enumerate(DOMAINS)},
            "corr_score_mean": 0.41,
        },
    }
    return save_bank(
        folder,
        manifest=manifest,
        features=records,
        heads=_heads(records, generator),
        rows={
            hook: Rows(
                W_enc=np.ones((WIDTH, number), np.float32),
                W_dec=np.ones((number, WIDTH), np.float32),
                b_enc=np.zeros(number, np.float32),
                threshold=np.ones(number, np.float32),
            )
            for hook, number in zip(hooks, each, strict=True)
        },
    )


def _record(generator: random.Random, layer: int, i: int, taxonomy: Taxonomy) -> FeatureRecord:
    domain = generator.choice(DOMAINS)
    domains: list[Domain] = [domain] if i % 7 else sorted({domain, generator.choice(DOMAINS)})
    concept = generator.choice(taxonomy[domain].concepts)
    refused = i % 4 == 3
    strength = generator.uniform(0.1, 0.6) * (0.4 if refused else 1.0)
    words = re.findall(r"\w+", concept.name.lower())
    terms = [
        PredicateTerm(kind="concept", text=f"{domain}/{concept.id}", weight=generator.uniform(1, 3)),
        *(PredicateTerm(kind="token", text=f" {word}", weight=generator.uniform(-1, 3)) for word in words[:5]),
    ]
    return FeatureRecord(
        id=f"L{layer}/{17 * i + 5}",
        hook_name=f"blocks.{layer}.hook_resid_post",
        layer=layer,
        index=17 * i + 5,
        domains=domains,
        concepts=[concept.id],
        explanation=f"Fires on {', '.join(f'“{word}”' for word in words)} in text about {concept.name.lower()}.",
        explainer=Explainer(method="executable", model="sparse logistic", seed=0),
        predicate=Predicate(terms=terms, bias=-2.5),
        kind=generator.choice(("lexical", "conceptual")),
        lexicality=generator.random(),
        trigger_tokens=[
            Term(text=word, z=generator.uniform(5, 40), documents=generator.randint(5, 90)) for word in words
        ],
        ngrams=[Term(text=f"the {word}", z=generator.uniform(5, 20), documents=12) for word in words],
        promoted_tokens=[f" {word}" for word in words],
        scores=_scores(generator, domains),
        fidelity=[
            SimulationScore(
                level=level,
                simulator="executable",
                n=generator.randint(200, 900),
                missing=i % 3,
                corr=strength + shift,
                corr_low=strength + shift - 0.07,
                corr_high=strength + shift + 0.06,
                corr_null=0.13,
                corr_null_mean=generator.gauss(0.02, 0.02),
                auroc=0.5 + strength / 2,
                balanced_accuracy=0.5 + strength / 3,
                pr_auc=strength,
            )
            for level, shift in (("segment", 0.03), ("token", 0.0))
        ],
        concept_scores=[
            ConceptScore(
                domain=domain, concept=c.id, pairs=8, frequency=0.9 / (j + 1), reverse=0.02 * j, q=0.001 * (j + 1)
            )
            for j, c in enumerate([concept, *generator.sample(taxonomy[domain].concepts, 3)])
        ],
        causality=_causality(generator, domains),
        admitted=not refused,
        refusals=["fidelity: interval reaches its null", "detection: look-alikes above 0.1"][: 1 + i % 2]
        if refused
        else [],
        duplicates=[Duplicate(id=f"L14/{17 * i + 5}", correlation=0.95)] if layer == 6 and i % 5 == 0 else [],
        threshold=2.0,
        scale=10.0,
        density=10 ** generator.uniform(-5, -2),
        quantiles={"0.5": 0.4, "0.9": 0.9, "0.99": 1.2},
        histogram=[int(4000 * generator.random() * 0.7**b) for b in range(20)],
        evidence=[_evidence(generator, pair.positive) for pair in generator.sample(concept.pairs, 3)],
    )


def _scores(generator: random.Random, domains: list[Domain]) -> dict[str, float]:
    found = {}
    for domain in DOMAINS:
        auroc = generator.uniform(0.6, 0.9) if domain in domains else generator.gauss(0.5, 0.05)
        found |= {
            f"auroc_{domain}": auroc,
            f"auroc_{domain}_low": auroc - 0.03,
            f"auroc_{domain}_high": auroc + 0.03,
            f"auroc_{domain}_null": generator.uniform(0.51, 0.53),
            f"tpr_{domain}": generator.random(),
            f"lookalike_fpr_{domain}": generator.random() / 10,
        }
    return found


def _causality(generator: random.Random, domains: list[Domain]) -> Causality:
    effects = {d: generator.uniform(-0.9, -0.1) if d in domains else generator.gauss(0, 0.03) for d in DOMAINS}
    return Causality(
        texts=64,
        effects=effects,
        low={d: value - 0.12 for d, value in effects.items()},
        high={d: value + 0.12 for d, value in effects.items()},
    )


def _evidence(generator: random.Random, text: str) -> Evidence:
    tokens = re.findall(r"\s?\w+|\s?[^\w\s]", text) if text.isascii() else list(text)
    activations = [max(0.0, generator.gauss(-0.6, 0.8)) for _ in tokens]
    top = max(range(len(tokens)), key=activations.__getitem__)
    activations[top] = max(activations[top], 0.7)
    return Evidence(text=text, peak=tokens[top], activation=activations[top], tokens=tokens, activations=activations)


def _poison(record: FeatureRecord, text: str) -> FeatureRecord:
    """The record with a hostile text in every field that takes one."""
    fields: dict[str, Any] = record.model_dump()
    fields["explanation"] = text
    fields["concepts"] += [text]
    fields["promoted_tokens"] += [text, f" {text}\n"]
    fields["quantiles"] |= {text: 0.5}
    fields["explainer"] |= {"model": text}
    for name in ("trigger_tokens", "ngrams"):
        fields[name][0]["text"] = text
    fields["predicate"]["terms"][0]["text"] = text
    fields["fidelity"][0]["simulator"] = text
    fields["concept_scores"][0]["concept"] = text
    fields["refusals"] += [text] if not record.admitted else []
    fields["evidence"] += [
        {"text": text, "peak": text[3:9], "activation": 0.8},
        {"text": text, "peak": text, "activation": 0.8, "tokens": list(text), "activations": [0.5] * len(text)},
        {"text": text, "peak": "not in it " + text, "activation": 0.8},
    ]
    return FeatureRecord.model_validate(fields)


def _heads(records: list[FeatureRecord], generator: random.Random) -> Heads:
    heads = {}
    for domain in DOMAINS:
        ids = [r.id for r in records if domain in r.domains and r.admitted] or [records[0].id]
        heads[domain] = HeadRecord(
            features=ids,
            weights=[generator.gauss(0.5, 0.3) for _ in ids],
            bias=-2.0,
            calibration=Calibration(slope=1.0, intercept=0.0),
            thresholds={"0.001": 0.99, "0.01": 0.9, "0.05": 0.5},
            streaming_thresholds={"0.001": 0.995, "0.01": 0.95},
            steering=[0.1] * len(ids),
        )
    return Heads(pooling=Pooling(window=8, min_tokens=2, ceiling=1.0, evidence_tokens=3), heads=heads)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
