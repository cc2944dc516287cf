"""The next version of a bank from what people marked in its traffic: its own features, its own heads, held to both.

Nothing but the bank and its model is needed. Texts are replayed (the project's own, and `data`), what the bank's rows
give on them is kept in a work folder, heads are fitted again and recalibrated, and the next version is compared with
the present one on texts that were never fitted on. It is written as a candidate whatever comes of that; whether it may
be promoted stands in `refresh.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from feature_bank.atomic import atomic_file
from feature_bank.bank import CURRENT, Bank, bank_folder, save_bank
from feature_bank.errors import DataError
from feature_bank.identity import check_identity
from feature_bank.review import carry_reviews, rejected_ids
from feature_bank.schema import CorpusRecord, Heads
from feature_bank.spool import MAX_TOKENS
from feature_bank.versions import VersionStore
from training.corpus import OWN_SOURCE, Document, read_documents
from training.packing import Report
from training.pipeline import own_corpora
from training.refit import next_version
from training.refresh_checks import Version, check_fixed, check_items, problems_of
from training.refresh_fit import RATE, Refitted, Replay, refit_head
from training.refresh_marks import Items, read_items, take_items
from training.refresh_texts import Texts, encode_texts, rows_digest

__all__ = ["BANK", "REFRESH", "Refreshed", "Retrain", "refresh_bank"]

BANK = "bank"
REFRESH = "refresh.json"
WORK = "work"
ENCODED = "encoded"
RETRAINED = "retrained"
TEST = "the test split"
DEV = "--dev"
MARGIN = 0.02

Retrain = Callable[[Bank, Path, Path, Report, Collection[str]], Bank]
"""retrain(bank, spool, work, report, apart): a bank of new features, for the same domains, made in the folder `work`
without the texts in `apart`."""


@dataclass(frozen=True, kw_only=True)
class Refreshed:
    """A candidate, and what was found of it."""

    before: Bank
    bank: Bank
    folder: Path
    """Of the candidate."""
    problems: tuple[str, ...]
    """What speaks against it; it is to be promoted only if that is nothing."""
    report: Mapping[str, Any]
    """What `refresh.json` holds."""


def refresh_bank(
    source: Path,
    *,
    spool: Path,
    model: Any,
    tokenizer: Any,
    out: Path,
    report: Report,
    data: Sequence[Path] = (),
    dev: Sequence[Path] = (),
    store: Path | None = None,
    margin: float = MARGIN,
    rate: str = RATE,
    own: Sequence[Path] | None = None,
    retrain: Retrain | None = None,
    beyond_own: bool = False,
) -> Refreshed:
    """Write the next version of the bank at `source` to `out/bank`, and `out/refresh.json` beside it.

    source: a bank or a folder of versions, of which the current one is meant. store: a folder of versions; items that
    were judged with one of them count too, if its features are the same, and others by their texts, if these were kept.
    data: files of text that holds the heads beside the project's own, as `train` reads them; dev: files that are only
    measured on. margin: what a domain's AUROC or true-positive rate may fall by, or a false-positive rate rise. rate:
    of the thresholds that marked texts have to be on the right side of. own: files in place of the project's own.
    retrain: trains new features, over which the heads are then fitted. beyond_own: insist on labelled text to compare
    the versions on that is not the project's own.

    Encoded text is kept under `out/work`, for this user alone: run again, only what is missing is read by the model.
    Raises DataError if nothing of the spool can be used, a file is malformed, or there is nothing to compare on;
    BankError for a damaged bank or store, ModelError for another model.
    """
    folder = bank_folder(source).resolve()
    bank = Bank.load(folder)
    check_identity(model, tokenizer, bank.manifest.model)
    _check_rate(bank, rate)
    taken = take_items(spool)
    own = own_corpora() if own is None else own
    documents, corpora = read_documents([*own, *data])
    measured, measured_records = read_documents(list(dev)) if dev else ([], [])
    if measured and not any(d.known for d in measured):
        raise DataError("--dev: no row has labels ('domains', 'known'), so that nothing can be measured on it")
    apart = {d.text for d in measured}
    documents = [d for d in documents if d.text not in apart]
    compared = [*measured, *(d for d in documents if d.split == "test" and d.source != OWN_SOURCE)]
    if beyond_own and not any(d.known for d in compared):
        raise DataError(
            "--promote wants the versions compared on more than the project's own texts: give labelled rows "
            "('domains', 'known') with --dev, or some hundreds with --data, of which a part is never fitted on"
        )
    work = out / WORK
    work.mkdir(parents=True, exist_ok=True)
    work.chmod(0o700)  # users' texts lie in it, as what the model made of them
    start = bank if retrain is None else retrain(bank, spool, work / RETRAINED / bank.content_hash[:12], report, apart)
    new_rows = start is not bank
    _check_rate(start, rate)
    rejected = frozenset[str]() if new_rows else rejected_ids(folder)

    def encode(of: Bank, texts: Sequence[Document], **options: Any) -> Texts:
        return encode_texts(
            texts, bank=of, model=model, tokenizer=tokenizer, folder=work / ENCODED, report=report, **options
        )

    def marked_and_not(of: Bank) -> tuple[Items, Items]:
        """The spool's items as the bank's features see them."""
        reading: dict[str, Any] = {
            "features": len(of.features),
            "hashes": _known_hashes(of, source, store),
            "domains": bank.heads.keys() & start.heads.keys(),
            "read": lambda texts: encode(of, texts, max_tokens=MAX_TOKENS),
            "texts_only": new_rows,
            "apart": apart,
        }
        return read_items(taken.marked, spool, **reading), read_items(taken.unmarked, spool, **reading)

    items, unmarked = marked_and_not(start)
    if not len(items) and not rejected and not new_rows:
        why = "; ".join(f"{count} {reason}" for reason, count in items.skipped.items()) or "none is marked"
        raise DataError(f"{spool}: no marked item can be used with {bank.version}: {why}. Mark items, and run it again")
    report("marks", 1, 1, f"{len(items)} marked items, {len(unmarked)} others, {len(rejected)} rejected features")

    replay = Replay(documents=documents, texts=encode(start, documents))
    present = Version.of(start)
    refitted: dict[str, Refitted] = {}
    for done, (domain, head) in enumerate(start.heads.items(), 1):
        refitted[domain] = refit_head(
            domain, head, start.pooling, present.position, replay=replay, items=items, rejected=rejected, rate=rate
        )
        report("heads", done, len(start.heads), f"{domain}: {'fitted' if refitted[domain].changed else 'as it was'}")
    heads = {domain: found.head for domain, found in refitted.items()}

    before, after = Version.of(bank), replace(present, heads=heads)
    test = replay.rows("test")
    sets = {TEST: [documents[row] for row in test.tolist()]} | ({DEV: measured} if measured else {})
    seen = {TEST: replay.texts.choose(test)} | ({DEV: encode(start, measured)} if measured else {})
    was_seen = {name: encode(bank, texts) for name, texts in sets.items()} if new_rows else seen
    fixed = {name: check_fixed(sets[name], (before, was_seen[name]), (after, seen[name])) for name in sets}
    were = marked_and_not(bank) if new_rows else (items, unmarked)
    fresh = check_items((before, *were), (after, items, unmarked), rate=rate, judge=bank.content_hash)
    changed = [domain for domain, found in refitted.items() if found.changed]
    candidate = _write(bank, start, folder, out / BANK, heads, corpora, _quality(start, fixed[TEST], changed))
    report("pack", 1, 1, str(out / BANK))
    problems = [
        *(
            f"{domain}: the bank has a head for it, the candidate has none"
            for domain in bank.heads
            if domain not in heads
        ),
        *(
            f"{domain}: no text that was not fitted on has a label for it, so that nothing tells whether it fell"
            for domain in bank.heads
            if (new_rows or domain in changed) and not any(domain in figures for figures in fixed.values())
        ),
        *problems_of(fixed, fresh, margin=margin, rate=rate),
    ]
    found = {
        "before": bank.version,
        "after": candidate.version,
        "content_hash": candidate.content_hash,
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "tool_version": version_of("sailguard"),
        "margin": margin,
        "rate": rate,
        "retrained": new_rows,
        "accepted": not problems,
        "problems": problems,
        "spool": {"marked": len(items), "unmarked": len(unmarked), "skipped": dict(items.skipped)},
        "replay": [record.model_dump() for record in corpora],
        "dev": [record.model_dump() for record in measured_records],
        "rejected": sorted(rejected & set(bank.by_id)),
        "heads": {d: {"changed": r.changed, "strength": dict(r.strength)} for d, r in refitted.items()},
        "fixed": fixed,
        "fresh": fresh,
    }
    with atomic_file(out / REFRESH) as tmp:
        tmp.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    report("compare", 1, 1, "nothing fell" if not problems else f"{len(problems)} problems")
    return Refreshed(before=bank, bank=candidate, folder=out / BANK, problems=tuple(problems), report=found)


def _write(
    bank: Bank,
    start: Bank,
    source: Path,
    target: Path,
    heads: Mapping[str, Any],
    records: Sequence[CorpusRecord],
    quality: Mapping[str, float],
) -> Bank:
    """`start` with other heads, as the bank's next version; reviews go with it if they are of its features."""
    manifest = start.manifest.model_dump(exclude={"schema_version", "files", "sha256"})
    known = {record["sha256"] for record in manifest["corpus"]}
    written = save_bank(
        target,
        manifest={
            **manifest,
            "version": next_version(bank.manifest.version),
            "created": datetime.now(UTC).strftime("%Y-%m-%d"),
            "tool_version": version_of("sailguard"),
            "parent": bank.version,
            "quality": dict(quality),
            "corpus": [*manifest["corpus"], *(r.model_dump() for r in records if r.sha256 not in known)],
        },
        features=start.features,
        heads=Heads.model_validate({"pooling": start.pooling, "heads": dict(heads)}),
        rows=start.rows,
    )
    if start is bank:
        carry_reviews(source, target)
    return written


def _quality(bank: Bank, measured: Mapping[str, Any], changed: Sequence[str]) -> dict[str, float]:
    """The bank's figures; of heads that changed those of the replayed texts' test split, under another name, for it is
    another set of texts."""
    kept = {k: v for k, v in bank.manifest.quality.items() if k not in {f"test_auroc_{domain}" for domain in changed}}
    found = {domain: measured.get(domain, {}).get("whole", {}).get("auroc") for domain in changed}
    return kept | {f"refresh_auroc_{d}": round(pair["after"]["value"], 4) for d, pair in found.items() if pair}


def _check_rate(bank: Bank, rate: str) -> None:
    rates = set[str].intersection(*({*h.thresholds} & {*h.streaming_thresholds} for h in bank.heads.values()))
    if rate not in rates:
        raise DataError(
            f"the bank {bank.version} has no threshold for the rate {rate!r} in every domain; there are "
            f"{', '.join(sorted(rates)) or 'none'}"
        )


def _known_hashes(bank: Bank, source: Path, store: Path | None) -> frozenset[str]:
    """Content hashes of the versions whose activations mean the same: the bank, and those in the stores that are
    named."""
    found = {bank.content_hash}
    mine = rows_digest(bank)
    source = source.parent if source.name == CURRENT else source
    for folder in {path for path in (source, store) if path is not None}:
        versions = VersionStore(folder).versions() if (folder / "versions").is_dir() else []
        found |= {v.bank.content_hash for v in versions if v.bank is not None and rows_digest(v.bank) == mine}
    return frozenset(found)
