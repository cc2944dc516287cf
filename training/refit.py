"""What reviews ask for, carried out: heads without the rejected features, refitted, as a new version."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feature_bank.bank import Bank, save_bank
from feature_bank.errors import DataError
from feature_bank.identity import check_identity
from feature_bank.review import EffectiveLabel, carry_reviews, effective, load_reviews, rejected_ids
from feature_bank.schema import Explainer, FeatureRecord, ModelIdentity
from training.candidates import encode
from training.packing import cut_rows, fit_guard, guard_records, make_canary, pool_hooks
from training.pipeline import Preset, manifest_head, prepare
from training.sweep import Reporter


def refit_bank(
    source: Path,
    *,
    model: Any,
    tokenizer: Any,
    identity: ModelIdentity,
    preset: Preset,
    data: Sequence[Path],
    work: Path,
    out: Path,
    report: Reporter,
) -> Bank:
    """Write the bank at `source` anew to `out` as its reviews want it: rejected features gone, labels as reviewed.

    Heads are fitted and calibrated on the same text as before; `work` is the folder of the run that made the bank.
    The reviews go with the new version.

    Raises DataError if preset, text or `work` are not those the bank was made with, or if a domain's head has nothing
    left to be fitted on; BankError for a damaged bank or review file.
    """
    bank = Bank.load(source)
    check_identity(model, tokenizer, bank.manifest.model)
    if not (work / "run.json").is_file():  # a new folder would be filled by reading and training all anew
        raise DataError(f"{work} is no work folder of a training run; name that of the run that made {bank.version}")
    rejected = rejected_ids(source)
    labels = effective(bank, load_reviews(source).reviews)
    prepared = prepare(
        model=model, tokenizer=tokenizer, identity=identity, preset=preset, data=data, work=work, report=report
    )
    made_of = {hook.hook_name: hook.sae_sha256 for hook in bank.manifest.hook_points}
    if made_of != {hook.sae.hook_name: hook.sha256 for hook in prepared.hooks}:
        raise DataError(f"{work} holds other SAEs than {bank.version} was cut from; name the work folder of its run")
    stats, pooled = pool_hooks(prepared.hooks, prepared.cache, len(prepared.documents), preset.pooling, work, report)
    scales = {name: s.scale for name, s in stats.items()}
    kept = {(f.hook_name, f.index): f for f in bank.features if f.id not in rejected}
    report("reviews", 1, 1, f"{len(bank.features) - len(kept)} of {len(bank.features)} features rejected")

    candidates = encode(prepared.hooks, list(kept), prepared.cache, scales)
    fit = fit_guard(prepared.hooks, pooled, prepared.documents, candidates, prepared.cache, kept, preset, report)
    lost = sorted(set(bank.heads) - set(fit.heads.heads))
    if lost:
        raise DataError(f"too few features are left for a head of {', '.join(lost)}; reject fewer, or train a new bank")
    records = [_relabelled(kept[key], labels[kept[key].id]) for key in fit.selection.keys]
    rows, hook_records = cut_rows(prepared.hooks, fit.selection, prepared.cache)
    with_review = {name: bank.manifest.quality[name] for name in bank.manifest.quality if name not in fit.quality}
    refitted = save_bank(
        out,
        manifest={
            **manifest_head(preset, identity, prepared.records),
            "name": bank.manifest.name,
            "version": next_version(bank.manifest.version),
            "parent": bank.version,
            "hook_points": [record.model_dump() for record in hook_records],
            "canary": make_canary(model, tokenizer, preset, rows, fit.selection, scales).model_dump(),
            "quality": {**with_review, **fit.quality},
        },
        features=guard_records(records, fit.heads, fit.selection),
        heads=fit.heads,
        rows=rows,
    )
    carry_reviews(source, out)
    report("pack", 1, 1, str(out))
    return refitted


def next_version(version: str) -> str:
    """The version with its last number raised by one: `0.2.0` -> `0.2.1`; one without a number gets `.1`."""
    found = re.search(r"(\d+)(\D*)$", version)
    return f"{version[: found.start()]}{int(found[1]) + 1}{found[2]}" if found else f"{version}.1"


def _relabelled(record: FeatureRecord, label: EffectiveLabel) -> FeatureRecord:
    """The record under its effective label. A reviewer's explanation has not been put to the test: its scores go."""
    update: dict[str, Any] = {"domains": list(label.domains), "concepts": list(label.concepts)}
    if label.explanation != record.explanation:
        update |= {
            "explanation": label.explanation,
            "explainer": Explainer(method="reviewer"),
            "predicate": None,
            "fidelity": [],
        }
    return record.model_copy(update=update)
