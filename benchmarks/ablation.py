"""What each part of the detector is worth: features a domain, layers, kinds of features, pooling, evidence tokens.

    python -m benchmarks.ablation --data DIR --work FOLDER [--bank FOLDER] [--docs]

DIR holds `fit.jsonl.gz`, `general.jsonl.gz` and `dev.jsonl.gz`; FOLDER is the work folder of the run that made the
bank. Heads are fitted anew on the discovery rows, over the bank's own features, with one thing changed at a time;
pooling and evidence are changed under the heads that the bank has. AUROC on fitting rows that were held out, and on
development rows. Nothing was chosen by this table.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.leave_one_source_out import RefittedBank
from benchmarks.results import RESULTS, Figure, write_result
from benchmarks.rows import Floats, read_all
from feature_bank.taxonomy import DOMAINS
from training.corpus import Document

SIZES = (8, 16, 32, 64, 128, 256)
WINDOWS = (1, 8, 16, 32, 64, 128, 100_000)
EVIDENCE = (1, 2, 3, 5, 8)
BATCH_TOKENS = 4096


class Part(NamedTuple):
    """Documents and the activations of the bank's features on every token of theirs."""

    documents: Sequence[Document]
    acts: Any
    """(tokens, F) float16"""
    owner: Any
    """(tokens,) the document of every row"""


class Variant(NamedTuple):
    """One row of the table."""

    group: str
    name: str
    max_features: int = 256
    allowed: Collection[tuple[str, int]] | None = None
    """Features that a head may use; None: the bank's heads as they are."""
    window: int | None = None
    evidence_tokens: int | None = None


def variants(bank: Any) -> Iterator[Variant]:
    """All rows, the bank as it is first."""
    keys = {(f.hook_name, f.index) for f in bank.features}
    yield Variant("bank", "as it is")
    for size in SIZES:
        yield Variant("features a domain, at most", str(size), max_features=size, allowed=keys)
    for hook in bank.hook_names:
        yield Variant("layers", hook, allowed={key for key in keys if key[0] == hook})
    yield Variant("layers", "all", allowed=keys)
    directions = {(f.hook_name, f.index) for f in bank.features if f.direction}
    yield Variant("kinds of features", "features of the SAEs alone", allowed=keys - directions)
    if directions:
        yield Variant("kinds of features", "directions alone", allowed=directions)
    for window in WINDOWS:
        name = f"{window} tokens" if window < 10_000 else "the whole text"
        yield Variant("moving average over", name, window=window)
    for tokens in EVIDENCE:
        yield Variant("evidence tokens", str(tokens), evidence_tokens=tokens)


def encode_documents(bank: Any, loaded: Any, documents: Sequence[Document]) -> Part:
    """The bank's features on every scored token of the documents, in their order."""
    import torch

    from feature_bank.layout import render, scored_positions
    from guard.capture import length_batches, pad_batch, truncated_forward
    from guard.encoder import SelectedEncoder

    encoder = SelectedEncoder(bank, torch.device("cpu"))
    model, tokenizer = loaded.model, loaded.tokenizer
    context = int(model.config.max_position_embeddings)
    rendered = [render(tokenizer, d.text, d.role, max_tokens=context) for d in documents]
    found: dict[int, Any] = {}
    for batch in length_batches([len(r.ids) for r in rendered], BATCH_TOKENS):
        ids, mask = pad_batch([rendered[i].ids for i in batch], 0, torch.device("cpu"))
        hidden = truncated_forward(model, encoder.hook_names, ids, mask)
        for row, i in enumerate(batch):
            at = torch.from_numpy(scored_positions(rendered[i], tokenizer.all_special_ids))
            acts = encoder.encode({name: h[row, at] for name, h in hidden.items()})
            found[i] = acts.clamp_max(6e4).half().numpy()
        print(f"activations: {len(found)}/{len(documents)}", flush=True)
    lengths = [len(found[i]) for i in range(len(documents))]
    return Part(
        documents,
        np.concatenate([found[i] for i in range(len(documents))]),
        np.repeat(np.arange(len(documents)), lengths),
    )


def aurocs(variant: Variant, bank: Any, run: RefittedBank, parts: dict[str, Part]) -> dict[str, dict[str, float]]:
    """By domain and part."""
    from training.heads import fit_heads

    changes = {"window": variant.window, "evidence_tokens": variant.evidence_tokens}
    pooling = bank.pooling.model_copy(update={name: v for name, v in changes.items() if v is not None})
    position = {(f.hook_name, f.index): i for i, f in enumerate(bank.features)}
    by_id = {f.id: (f.hook_name, f.index) for f in bank.features}
    if variant.allowed is None:
        heads = {d: ([by_id[f] for f in h.features], h.weights, h.bias) for d, h in bank.heads.items()}
    else:
        fitted = fit_heads(
            run.pooled,
            run.documents,
            candidates=run.preset.candidates,
            max_features=variant.max_features,
            report=lambda *_: None,
            allowed=variant.allowed,
        )
        heads = {d: (list(h.features), list(h.weights), h.bias) for d, h in fitted.items()}
    found: dict[str, dict[str, float]] = {}
    for domain, (keys, values, bias) in heads.items():
        weights = np.zeros(len(bank.features), dtype=np.float32)
        weights[[position[key] for key in keys]] = values
        found[domain] = {name: _auroc(part, domain, name, weights, bias, pooling) for name, part in parts.items()}
        found[domain]["features"] = int((weights != 0).sum())
    return found


def _auroc(part: Part, domain: str, name: str, weights: Floats, bias: float, pooling: Any) -> float:
    from training.calibration import document_scores
    from training.discovery import auroc, labels

    scores = document_scores(part.acts, part.owner, weights, bias, pooling, len(part.documents))
    splits = ("calibration", "test") if name == "held_out" else ("discovery", "calibration", "test")
    rows, y = labels(part.documents, domain, splits)
    seen = np.isfinite(scores[rows])
    return round(float(auroc(scores[rows[seen]], y[seen])[0]), 4)


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with fit, general and dev.jsonl.gz")
    parser.add_argument("--work", type=Path, required=True, help="work folder of the bank's training run")
    parser.add_argument("--bank", type=Path, help="bank folder; the shipped one if left out")
    parser.add_argument("--limit", type=int, help="development rows, for a trial; needs --out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--docs", action="store_true", help="put the figures into docs/quality.md")
    options = parser.parse_args(arguments)
    if options.limit is not None and options.out == RESULTS:
        parser.error("--limit is for trials, whose figures are not published; give --out another folder")

    from benchmarks.tables import update
    from feature_bank.bank import Bank, shipped_bank_path
    from guard import load_model
    from training.candidates import encode

    bank = Bank.load(options.bank or shipped_bank_path())
    loaded = load_model(dtype="float32", device="cpu")
    run = RefittedBank(loaded, options.data, options.work)
    rows = read_all(options.data, options.limit)
    dev = [d for own, d in zip(rows.is_own, rows.evaluated, strict=True) if not own]
    keys = [(f.hook_name, f.index) for f in bank.features]
    scales = {name: stats.scale for name, stats in run.stats.items()}
    held_out = Part(run.documents, encode(run.hooks, keys, run.cache, scales).acts, run.cache.documents)
    parts = {"held_out": held_out, "dev": encode_documents(bank, loaded, dev)}
    table, figures = [], {}
    for variant in variants(bank):
        found = aurocs(variant, bank, run, parts)
        print(variant.group, variant.name, found, flush=True)
        table.append({"group": variant.group, "name": variant.name, "domains": found})
        if variant.group == "bank":
            figures = {
                f"{name}_auroc_{domain}": Figure(value=found[domain][name], unit="auroc", n=len(part.documents))
                for name, part in parts.items()
                for domain in DOMAINS
            }
    detail = {
        "table": table,
        "bank": {"version": bank.version, "content_hash": bank.content_hash, "pooling": bank.pooling.model_dump()},
        "limit": options.limit,
    }
    print(write_result("ablation", figures, detail, packages=("scikit-learn",), folder=options.out))
    if options.docs:
        update("ablation", options.out)


if __name__ == "__main__":
    main()
