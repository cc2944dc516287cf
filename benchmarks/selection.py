"""Whether contrast pairs tell, before anything is explained, which SAE will detect best.

    python -m benchmarks.selection --data DIR --work FOLDER [--cache FOLDER] [--sparsities 8 32 128] [--docs]

FOLDER is the work folder of the finished training run of the shipped preset: its documents and activations are read,
only its lock is taken. BatchTopK SAEs of several sparsities are trained at each of its hook points and ranked by the
figures of `train select`; then sparse heads are fitted on each SAE alone, and judged on rows that they were not fitted
on: those of the same sources that were held out, and `dev.jsonl.gz`. Published is the rank correlation of the two,
whatever it is, and that of reconstruction and sparsity. All is kept in the cache folder; a second run goes on there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.correlation import rank_correlation, within_groups
from benchmarks.detection import DEV, FEATURES, PARTS, Aurocs, Detection, Run
from benchmarks.results import RESULTS, Figure, write_result
from benchmarks.rows import read_all
from feature_bank.taxonomy import DOMAINS
from training.cache import Harvest
from training.corpus import Document
from training.ranking import Candidate, Ranked
from training.trainer import TrainedSae

PRESET = "smollm2-135m"
METRICS: Mapping[str, str] = {
    "separation": "separation above its null",
    "concept_separation": "the same by concept, mean over concepts",
    "i_cdf": "I_CDF",
    "i_cdf_margin": "I_CDF above its null",
    "net_margin": "net I_CDF above its null",
    "reconstruction": "reconstruction (FVU, the lower the better)",
    "l0": "L0, the denser the better",
}


class Report:
    """Stages on standard output: a line when one ends, and one a minute."""

    def __init__(self) -> None:
        self.started = self.said = time.monotonic()

    def __call__(self, stage: str, done: int, total: int, detail: str) -> None:
        now = time.monotonic()
        if done >= total or now - self.said > 60:
            self.said = now
            print(f"{now - self.started:6.0f} s  {stage} {done}/{total}: {detail}", flush=True)


def figures_of(entry: Ranked, trained: TrainedSae, domain: str | None) -> dict[str, float]:
    """What an SAE would be ranked by, for one domain or over all; larger is said to be better."""
    if domain is None:
        own = {
            "separation": entry.separation,
            "concept_separation": entry.mean_over_concepts("separation"),
            "i_cdf": entry.mean("i_cdf", margin=False),
            "i_cdf_margin": entry.mean("i_cdf"),
            "net_margin": entry.mean("net"),
        }
    else:
        found = next(d for name, d in entry.domains.items() if name == domain)
        own = {
            "separation": found.separation.margin,
            "concept_separation": float(np.mean([c.separation.margin for c in found.concepts.values()])),
            "i_cdf": found.i_cdf.value,
            "i_cdf_margin": found.i_cdf.margin,
            "net_margin": found.net.margin,
        }
    return {**own, "reconstruction": -trained.figures["fvu"], "l0": trained.figures["l0"]}


def summarise(
    ranked: Sequence[Ranked], trained: Mapping[str, TrainedSae], detected: Mapping[str, Aurocs]
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Correlations of every figure with detection, over all SAEs, for each domain and for the mean over domains."""
    names = [entry.name for entry in ranked]
    groups = [entry.candidate.hook_name for entry in ranked]
    domains = [d for d in DOMAINS if all(d in detected[name][part] for name in names for part in PARTS)]
    figures: dict[str, Figure] = {}
    detail: dict[str, Any] = {"correlations": {}, "picks": {}, "saes": []}
    means = {part: [float(np.mean([detected[n][part][d] for d in domains])) for n in names] for part in PARTS}
    for metric in METRICS:
        detail["correlations"][metric] = {}
        for part in PARTS:
            found: dict[str, Any] = {}
            for domain in (None, *domains):
                metrics = [figures_of(e, trained[e.name], domain)[metric] for e in ranked]
                quality = means[part] if domain is None else [detected[n][part][domain] for n in names]
                found[domain or "mean"] = about = {
                    **rank_correlation(metrics, quality),
                    "within": rank_correlation(
                        within_groups(metrics, groups), within_groups(quality, groups), groups=groups
                    ),
                }
                key = f"spearman_{metric}_{part}" + ("" if domain is None else f"_{domain}")
                figures[key] = Figure(value=about["rho"], unit="spearman", n=len(names))
            detail["correlations"][metric][part] = found
            overall = [figures_of(e, trained[e.name], None)[metric] for e in ranked]
            pick = int(np.argmax(overall))
            detail["picks"].setdefault(metric, {})[part] = {"sae": names[pick], "auroc": round(means[part][pick], 5)}
            figures[f"picked_auroc_{part}_{metric}"] = Figure(
                value=round(means[part][pick], 5), unit="auroc", n=len(domains)
            )
    for part in PARTS:
        for name, value in (("best", max(means[part])), ("mean", float(np.mean(means[part])))):
            figures[f"{name}_auroc_{part}"] = Figure(value=round(value, 5), unit="auroc", n=len(names))
    detail["parts"] = rank_correlation(means["held_out"], means["dev"])
    figures["spearman_held_out_dev"] = Figure(value=detail["parts"]["rho"], unit="spearman", n=len(names))
    for place, entry in enumerate(ranked, 1):
        own = trained[entry.name]
        detail["saes"].append(
            {
                "name": entry.name,
                "rank": place,
                "hook_name": entry.candidate.hook_name,
                "l0": round(own.figures["l0"], 3),
                "fvu": round(own.figures["fvu"], 5),
                "l0_on_pairs": round(entry.l0, 3),
                "separation_error": entry.error,
                **{m: round(v, 6) for m, v in figures_of(entry, own, None).items() if m != "l0"},
                **{f"auroc_{part}": round(means[part][place - 1], 5) for part in PARTS},
                "auroc": detected[entry.name],
            }
        )
    return figures, detail


def prepare_run(loaded: Any, preset: Any, options: argparse.Namespace, report: Report) -> Run:
    """The documents and activations of the preset's training run; for a trial, of a few rows, harvested here."""
    from feature_bank.identity import identify
    from training import pipeline

    if options.limit is None:
        model, tokenizer, model_id = loaded
        run = pipeline.prepare(
            model=model,
            tokenizer=tokenizer,
            identity=identify(model, tokenizer, model_id),
            preset=preset,
            data=[options.data / name for name in ("fit.jsonl.gz", "general.jsonl.gz")],
            work=options.work,
            report=report,
        )
        return Run(run.documents, run.cache)
    documents = read_all(options.data, options.limit).fit
    return Run(documents, harvest_rows(loaded, documents, preset, options.cache / "trial", report))


def harvest_rows(loaded: Any, documents: list[Document], preset: Any, folder: Path, report: Report) -> Harvest:
    """Activations at the preset's hook points, kept in `folder`."""
    from feature_bank.identity import identify
    from training.corpus import tokenise
    from training.harvest import harvest

    identity = identify(loaded.model, loaded.tokenizer, loaded.model_id)
    return harvest(
        loaded.model,
        tokenise(documents, loaded.tokenizer, max_tokens=preset.labelled_tokens),
        preset.hook_points,
        folder,
        fingerprint={"model": identity.config_hash, "tokenizer": identity.tokenizer_hash},
        on_shard=lambda done, total, tokens: report(f"harvest of {folder.name}", done, total, f"{tokens:,} tokens"),
    )


def rank(
    loaded: Any, trained: Sequence[TrainedSae], hooks: Sequence[str], folder: Path, report: Report
) -> list[Ranked]:
    """The SAEs by `train select`'s figures, whose files are left in `folder`."""
    from feature_bank.identity import identify
    from feature_bank.taxonomy import load_taxonomy
    from training.contrast import harvest_contrasts, taxonomy_texts
    from training.ranking import choose, rank_candidates
    from training.selection_report import ACTIVATIONS, write_selection

    identity = identify(loaded.model, loaded.tokenizer, loaded.model_id)
    texts = taxonomy_texts(load_taxonomy())
    fingerprint = {"model": identity.config_hash, "tokenizer": identity.tokenizer_hash}
    cache = harvest_contrasts(
        loaded.model, loaded.tokenizer, texts, hooks, folder / ACTIVATIONS, fingerprint=fingerprint, report=report
    )
    candidates = []
    for found in trained:
        sae = found.load()
        candidates.append(
            Candidate(name=found.run.name, hook_name=sae.hook_name, d_in=sae.d_in, d_sae=sae.d_sae, load=found.load)
        )
    ranked = rank_candidates(candidates, cache, texts, report=report)
    write_selection(folder, ranked, choose(ranked), {"model": {"id": loaded.model_id}})
    return ranked


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with fit, general and dev.jsonl.gz")
    parser.add_argument("--work", type=Path, help="work folder of the shipped preset's training run")
    parser.add_argument("--cache", type=Path, default=Path("runs/selection"), help="folder for all that is kept")
    parser.add_argument("--sparsities", type=int, nargs="+", default=[8, 32, 128], help="k of the SAEs")
    parser.add_argument("--expansion", type=int, default=8, help="features of an SAE over the model's width")
    parser.add_argument("--limit", type=int, help="rows of each part, for a trial; needs --out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--docs", action="store_true", help="put the figures into docs/selection.md")
    options = parser.parse_args(arguments)
    if options.limit is not None and options.out == RESULTS:
        parser.error("--limit is for trials, whose figures are not published; give --out another folder")
    if options.limit is None and options.work is None:
        parser.error("name the work folder of the shipped preset's training run with --work")

    import dataclasses

    from benchmarks.tables import update
    from guard import load_model
    from training.pipeline import load_preset
    from training.sweep import Group, Sweep, train_cached

    report = Report()
    loaded, preset = load_model(device="cpu"), load_preset(PRESET)
    run = prepare_run(loaded, preset, options, report)
    sae = preset.sae
    group = Group(lr=sae.lr, expansion=options.expansion, seed=preset.seed, sweep={"k": list(options.sparsities)})
    batch = sae.batch_tokens if options.limit is None else 256
    sweep = Sweep(hook_points=preset.hook_points, saes=(group,), batch_tokens=batch, epochs=sae.epochs)
    trained = train_cached(sweep, run.cache, options.cache / "sweep", report=report, model_name=loaded.model_id)
    ranked = rank(loaded, trained, preset.hook_points, options.cache / "select", report)

    rows = read_all(options.data, options.limit)
    documents = [
        dataclasses.replace(d, split=DEV) for d, own in zip(rows.evaluated, rows.is_own, strict=True) if not own
    ]
    dev = Run(documents, harvest_rows(loaded, documents, preset, options.cache / "dev", report))
    detection = Detection(preset, run, dev, options.cache / "pooled", report)
    measured = {found.run.name: detection.measure(found) for found in trained}
    figures, detail = summarise(
        ranked, {found.run.name: found for found in trained}, {name: own for name, (own, _) in measured.items()}
    )
    detail |= {
        "model": loaded.model_id,
        "limit": options.limit,
        "features": FEATURES,
        "head_features": {name: sizes for name, (_, sizes) in measured.items()},
        "sparsities": options.sparsities,
        "expansion": options.expansion,
        "tokens": run.cache.tokens,
        "dev_rows": len(documents),
        "corpora": [record.model_dump() for record in rows.records],
        "seconds": round(time.monotonic() - report.started),
    }
    print(write_result("selection", figures, detail, packages=("scikit-learn", "scipy"), folder=options.out))
    if options.docs:
        update("selection", options.out)


if __name__ == "__main__":
    main()
