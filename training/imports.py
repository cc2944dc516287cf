"""A collection of others' features joined with the rows of their SAEs: a bank that the guard loads.

A collection brings tags and explanations, an SAE the rows; what neither has is measured on text: scales, densities,
thresholds, calibration, the canary. Heads are as plain as what is known allows: every feature that carries a domain's
tag weighs the same. A tag is somebody's reading of an explanation, so where text has labels a feature must show on it
that it tells the domain apart, above what shuffled labels reach, before it counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from feature_bank.bank import Bank, save_bank
from feature_bank.errors import BankError, DataError
from feature_bank.formats import LoadedSAE
from feature_bank.interop.collection import Collection
from feature_bank.interop.records import ImportedFeature
from feature_bank.schema import CorpusRecord, Heads, ModelIdentity
from feature_bank.taxonomy import DOMAINS
from guard.hook_points import parse_hook_name, resolve
from training.corpus import Document, tokenise
from training.harvest import harvest
from training.imported_heads import ImportedHead, record_canary, tagged_head
from training.imported_records import bank_rows, head_record, hook_record, imported_records, measure_hook

if TYPE_CHECKING:
    from training.pipeline import Preset

__all__ = ["Joined", "join_collection", "joinable"]

Report = Callable[[str, int, int, str], None]
LICENCES = {"safe-sail": "MIT"}


@dataclass(frozen=True, kw_only=True)
class Joined:
    """A bank made from a collection, and what became of the rest."""

    bank: Bank
    left_out: Mapping[str, int]
    """Features of the collection that are not in the bank, by the reason."""
    notes: tuple[str, ...]
    """What to know of it, a sentence each."""


def joinable(
    collection: Collection, saes: Sequence[LoadedSAE], *, untagged: bool = False
) -> tuple[dict[str, list[ImportedFeature]], Counter[str]]:
    """By hook point the features that have rows, in order, and how many have none, by the reason.

    untagged: also features without a domain. Hook points without a feature are left out.

    Raises BankError if two SAEs lie in one layer, one is a transcoder, the collection names other hook points, or no
    feature is left.
    """
    by_layer: dict[int, LoadedSAE] = {}
    for source in saes:
        name = source.sae.hook_name
        layer = parse_hook_name(name).layer
        if layer in by_layer:
            raise BankError(f"two SAEs lie in layer {layer}; name one of them", file=str(source.weights))
        if source.sae.is_transcoder:
            raise BankError("is a transcoder, and the features are of an SAE", file=str(source.weights))
        by_layer[layer] = source
    chosen: dict[str, list[ImportedFeature]] = {by_layer[layer].sae.hook_name: [] for layer in sorted(by_layer)}
    left: Counter[str] = Counter()
    for feature in sorted(collection.features, key=lambda f: f.index):
        found = by_layer.get(feature.layer)
        if found is None:
            left["no SAE of its layer was given"] += 1
        elif feature.hook_name not in (None, found.sae.hook_name):
            raise BankError(
                f"reads {found.sae.hook_name}, and the collection's features of layer {feature.layer} are of "
                f"{feature.hook_name}",
                file=str(found.weights),
                field="hook_name",
            )
        elif feature.index >= found.sae.d_sae:
            left["its index lies outside the SAE"] += 1
        elif not feature.domains and not untagged:
            left["it carries no domain's tag"] += 1
        else:
            chosen[found.sae.hook_name].append(feature)
    chosen = {name: features for name, features in chosen.items() if features}
    if not chosen:
        raise BankError(
            f"none of the {len(collection.features)} features has rows in the given SAEs "
            f"({', '.join(f'{count}: {reason}' for reason, count in left.items())})",
            field="features",
        )
    return chosen, left


def join_collection(
    collection: Collection,
    saes: Sequence[LoadedSAE],
    *,
    model: Any,
    tokenizer: Any,
    identity: ModelIdentity,
    preset: Preset,
    documents: Sequence[Document],
    corpora: Sequence[CorpusRecord],
    name: str,
    out: Path,
    work: Path,
    score: str | None = None,
    min_score: float = 0.2,
    untagged: bool = False,
    report: Report = lambda *_: None,
) -> Joined:
    """Measure the collection's features on text and write a bank of them to `out`.

    preset: its pooling, canary, seed and tokens of a text; nothing is trained. score, min_score: features count in
    heads only with at least this of the collection's score by that name. Activations are kept in `work`.

    Raises BankError as `joinable` does or for an SAE of another model's width, DataError if no domain has a head or the
    text is too little.
    """
    chosen, left = joinable(collection, saes, untagged=untagged)
    sources = {source.sae.hook_name: source for source in saes if source.sae.hook_name in chosen}
    for hook_name, source in sources.items():
        resolve(model, hook_name)
        if source.sae.d_in != identity.d_model:
            raise BankError(
                f"the SAE reads {source.sae.d_in} values, and {identity.id!r} has a width of {identity.d_model}",
                file=str(source.weights),
                field="d_in",
            )
    sequences = tokenise(documents, tokenizer, max_tokens=preset.labelled_tokens)
    cache = harvest(
        model,
        sequences,
        list(chosen),
        work / "activations",
        fingerprint={"model": identity.config_hash, "tokenizer": identity.tokenizer_hash},
        on_shard=lambda done, total, tokens: report("harvest", done, total, f"{tokens:,} tokens"),
    )
    hooks = []
    for done, (hook_name, features) in enumerate(chosen.items(), 1):
        source = sources[hook_name]
        hooks.append(
            measure_hook(
                source, features, cache.activations(hook_name), cache.documents, len(documents), preset.pooling
            )
        )
        report("measure", done, len(chosen), f"{len(features):,} features at {hook_name}")
    features = [feature for hook in hooks for feature in hook.features]
    acts = np.concatenate([hook.acts for hook in hooks], axis=1)
    pooled = np.concatenate([hook.pooled for hook in hooks], axis=1)
    deltas = np.concatenate([hook.stats.scale * (not hook.source.sae.encoder_only) for hook in hooks])
    every: dict[str, ImportedHead] = {}
    notes: list[str] = []
    for done, domain in enumerate(DOMAINS, 1):
        wanted = [
            i
            for i, feature in enumerate(features)
            if domain in feature.domains and (score is None or feature.scores.get(score, -1.0) >= min_score)
        ]
        found = tagged_head(domain, wanted, pooled, acts, cache.documents, documents, preset.pooling, seed=preset.seed)
        notes += found.notes
        every[domain] = found
        report("heads", done, len(DOMAINS), f"{domain}: {len(found.columns)} of {len(wanted)} tagged features")
    heads = {domain: head for domain, head in every.items() if head.columns}
    if not heads:
        raise DataError(f"no domain has a head: {' '.join(notes) or 'no feature carries a tag'}")
    rows = {hook.source.sae.hook_name: bank_rows(hook) for hook in hooks}
    records = imported_records(hooks, every, score, min_score)
    if any(hook.source.sae.encoder_only for hook in hooks):
        notes.append("Only encoders were published, so such features are read but never steered.")
    bank = save_bank(
        out,
        manifest={
            "name": name,
            "version": "1",
            "created": datetime.now(UTC).strftime("%Y-%m-%d"),
            "tool_version": version("sailguard"),
            "model": identity.model_dump(),
            "hook_points": [hook_record(hook).model_dump() for hook in hooks],
            "corpus": [record.model_dump() for record in (*corpora, *_provenance(collection))],
            "canary": record_canary(model, tokenizer, preset.canary.strip(), rows, records).model_dump(),
            "quality": {name: value for head in heads.values() for name, value in head.quality.items()},
        },
        features=records,
        heads=Heads.model_validate(
            {
                "pooling": preset.pooling,
                "heads": {domain: head_record(head, records, deltas) for domain, head in heads.items()},
            }
        ),
        rows=rows,
    )
    report("pack", 1, 1, str(out))
    return Joined(bank=bank, left_out=dict(left), notes=tuple(notes))


def _provenance(collection: Collection) -> list[CorpusRecord]:
    licence = LICENCES.get(collection.source, "unknown")
    return [
        CorpusRecord(name=f"{collection.source}: {f.name}", licence=licence, sha256=f.sha256, rows=0)
        for f in collection.files
    ]
