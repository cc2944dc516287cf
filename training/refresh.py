"""The next version of a bank from what people marked in its traffic: its own features, its own heads, held to both.

Nothing but the bank and its model is needed. Texts are replayed (the project's own, and `data`), what the bank's rows
give on them is kept in a work folder, heads are fitted again and recalibrated, and the next version is compared with
the present one on texts that were never fitted on. It is written as a candidate whatever comes of that; whether it may
be promoted stands in `refresh.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from feature_bank.atomic import atomic_file
from feature_bank.bank import Bank, bank_folder, save_bank
from feature_bank.errors import BankError, DataError
from feature_bank.identity import check_identity
from feature_bank.review import carry_reviews, rejected_ids
from feature_bank.schema import CorpusRecord, Heads
from feature_bank.versions import VersionStore
from training.corpus import Document, read_documents
from training.packing import Report
from training.pipeline import own_corpora
from training.refit import next_version
from training.refresh_checks import check_fixed, check_items, problems_of
from training.refresh_fit import RATE, Refitted, Replay, refit_head
from training.refresh_marks import read_items
from training.refresh_texts import encode_texts, rows_digest

__all__ = ["BANK", "REFRESH", "Refreshed", "refresh_bank"]

BANK = "bank"
REFRESH = "refresh.json"
WORK = "work"
TEST = "the test split"
DEV = "--dev"
MARGIN = 0.01


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
) -> Refreshed:
    """Write the next version of the bank at `source` to `out/bank`, and `out/refresh.json` beside it.

    source: a bank or a folder of versions, of which the current one is meant. store: a folder of versions; items that
    were judged with one of them count too, if its features are the same. data: files of text that holds the heads
    beside the project's own, as `train` reads them; dev: files that are only measured on. margin: what a domain's AUROC
    or true-positive rate may fall by. rate: of the thresholds that marked texts have to be on the right side of. own:
    files in place of the project's own.

    Encoded text is kept under `out/work`: run again, only what is missing is read by the model. Raises DataError if
    nothing of the spool can be used or a file is malformed, BankError for a damaged bank, ModelError for another model.
    """
    folder = bank_folder(source).resolve()
    bank = Bank.load(folder)
    check_identity(model, tokenizer, bank.manifest.model)
    if any(rate not in head.thresholds or rate not in head.streaming_thresholds for head in bank.heads.values()):
        raise DataError(f"the bank {bank.version} has no threshold for the false-positive rate {rate} in every domain")
    rejected = rejected_ids(folder)
    reading: dict[str, Any] = {
        "features": len(bank.features),
        "hashes": _known_hashes(bank, source, store),
        "domains": frozenset(bank.heads),
    }
    items = read_items(spool, marked=True, **reading)
    unmarked = read_items(spool, marked=False, **reading)
    if not len(items) and not rejected:
        why = "; ".join(f"{count} {reason}" for reason, count in items.skipped.items()) or "none is marked"
        raise DataError(f"{spool}: no marked item can be used with {bank.version}: {why}. Mark items, and run it again")
    report("marks", 1, 1, f"{len(items)} marked items, {len(unmarked)} others, {len(rejected)} rejected features")

    documents, corpora = read_documents([*(own_corpora() if own is None else own), *data])
    measured, measured_records = read_documents(list(dev)) if dev else ([], [])
    documents = _apart(documents, measured)
    encoding: dict[str, Any] = {
        "bank": bank,
        "model": model,
        "tokenizer": tokenizer,
        "folder": out / WORK,
        "report": report,
    }
    replay = Replay(documents=documents, texts=encode_texts(documents, **encoding))
    position = {feature.id: place for place, feature in enumerate(bank.features)}
    refitted: dict[str, Refitted] = {}
    for done, (domain, head) in enumerate(bank.heads.items(), 1):
        refitted[domain] = refit_head(
            domain, head, bank.pooling, position, replay=replay, items=items, rejected=rejected, rate=rate
        )
        report("heads", done, len(bank.heads), f"{domain}: {'fitted' if refitted[domain].changed else 'as it was'}")
    heads = {domain: found.head for domain, found in refitted.items()}
    test = replay.rows("test")
    sets = {TEST: ([documents[row] for row in test.tolist()], replay.texts.choose(test))}
    if measured:
        sets[DEV] = (measured, encode_texts(measured, **encoding))
    sides = (bank.heads, heads, bank.pooling, position)
    fixed = {name: check_fixed(labelled, texts, *sides) for name, (labelled, texts) in sets.items()}
    fresh = check_items(items, unmarked, *sides, rate=rate)
    changed = [domain for domain, found in refitted.items() if found.changed]
    candidate = _write(bank, folder, out / BANK, heads, corpora, _quality(bank, fixed[TEST], changed))
    report("pack", 1, 1, str(out / BANK))
    problems = problems_of(fixed, fresh, margin=margin)
    found = {
        "before": bank.version,
        "after": candidate.version,
        "content_hash": candidate.content_hash,
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "tool_version": version("sailguard"),
        "margin": margin,
        "rate": rate,
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
    source: Path,
    target: Path,
    heads: Mapping[str, Any],
    records: Sequence[CorpusRecord],
    quality: Mapping[str, float],
) -> Bank:
    """The bank with other heads, as its next version; reviews go with it."""
    manifest = bank.manifest.model_dump(exclude={"schema_version", "files", "sha256"})
    known = {record["sha256"] for record in manifest["corpus"]}
    written = save_bank(
        target,
        manifest={
            **manifest,
            "version": next_version(bank.manifest.version),
            "created": datetime.now(UTC).strftime("%Y-%m-%d"),
            "tool_version": version("sailguard"),
            "parent": bank.version,
            "quality": dict(quality),
            "corpus": [*manifest["corpus"], *(r.model_dump() for r in records if r.sha256 not in known)],
        },
        features=bank.features,
        heads=Heads.model_validate({"pooling": bank.pooling, "heads": dict(heads)}),
        rows=bank.rows,
    )
    carry_reviews(source, target)
    return written


def _quality(bank: Bank, measured: Mapping[str, Any], changed: Sequence[str]) -> dict[str, float]:
    """The bank's figures; of heads that changed those of the replayed texts' test split, under another name, for it is
    another set of texts."""
    kept = {k: v for k, v in bank.manifest.quality.items() if k not in {f"test_auroc_{domain}" for domain in changed}}
    found = {domain: measured.get(domain, {}).get("whole", {}).get("auroc") for domain in changed}
    return kept | {f"refresh_auroc_{d}": round(pair["after"]["value"], 4) for d, pair in found.items() if pair}


def _known_hashes(bank: Bank, source: Path, store: Path | None) -> frozenset[str]:
    """Content hashes of the versions whose activations mean the same: the bank, and those in the stores that are
    named."""
    found = {bank.content_hash}
    mine = rows_digest(bank)
    for folder in {path for path in (source, store) if path is not None}:
        try:
            versions = VersionStore(folder).versions() if (folder / "versions").is_dir() else []
        except BankError:
            versions = []
        found |= {v.bank.content_hash for v in versions if v.bank is not None and rows_digest(v.bank) == mine}
    return frozenset(found)


def _apart(documents: Sequence[Document], measured: Sequence[Document]) -> list[Document]:
    """The replayed documents without those that are only to be measured on."""
    texts = {d.text for d in measured}
    return [d for d in documents if d.text not in texts]
