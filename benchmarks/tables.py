"""The tables of the pages under docs/ that show measurements, made from the committed results alone.

`python -m benchmarks.tables` does it after a result was written without --docs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, Result, read_result
from feature_bank.atomic import atomic_file
from feature_bank.errors import DataError
from feature_bank.taxonomy import DOMAINS

BEGIN, END = "<!-- BEGIN table -->", "<!-- END table -->"
TRAINING, EXPLANATION = "training", "explanation"  # the names of further pairs of markers in docs/performance.md
DOCS = Path(__file__).parents[1] / "docs"
NOT_MEASURED = "No result is committed yet."
_DETECTORS = ("bank", "probe", "tfidf", "keywords")
_SUFFIXES = ("", "_probe", "_tfidf", "_keywords")
_HEADINGS = ("bank", "probe", "TF-IDF", "keywords")


def replace_table(text: str, table: str, file: str, *, name: str = "table") -> str:
    """`text` with what stands between the markers called `name` replaced.

    Raises DataError unless each marker occurs once, in order.
    """
    begin, end = (marker.replace("table", name) for marker in (BEGIN, END))
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise DataError(f"{file}: needs one {begin} and, after it, one {end}")
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    return f"{head}{begin}\n{table}\n{end}{tail}"


def markdown(heading: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; None becomes a dash, the first column is aligned left and the others right."""
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    return "\n".join("| " + " | ".join("–" if c is None else str(c) for c in line) + " |" for line in lines)


def quality_tables(result: Result) -> str:
    """Everything docs/quality.md shows."""
    detail = result.detail
    parts = [f"Bank `{detail['bank']['version']}`, policy `{detail['policy']}`, {result.date}."]
    if detail["limit"] is not None:
        parts.append(f"**A trial on {detail['limit']} rows of each part; the figures mean nothing.**")
    if detail.get("dev_sample") is not None:
        parts.append(
            f"The development rows are a sample of {detail['dev_sample']} of the file's, chosen by the hash of their "
            "ids; the intervals below say how wide that leaves the figures."
        )
    for part, title, names in (
        ("dev", "Development rows", ("auroc", "auprc", "tpr_at_fpr1", "tpr_at_fpr5")),
        ("unseen", "Development rows of sources that no fitting row comes from", ("auroc",)),
        ("own", "Test rows written for the project", ("auroc",)),
    ):
        rows = [
            [
                domain,
                f"{detail['domains'][domain][part]['positive']} / {detail['domains'][domain][part]['rows']}",
                _MEASURES[name],
                *(_number(result.value(f"{part}_{name}_{domain}{suffix}")) for suffix in _SUFFIXES),
            ]
            for domain in DOMAINS
            for name in names
        ]
        parts += [f"### {title}", markdown(["domain", "positive / rows", "measure", *_HEADINGS], rows)]
    parts += ["### How sure the AUROC is (95 %, bootstrap over rows)", _intervals(detail)]
    parts += [
        "### At the thresholds for one false positive in a hundred",
        _operation(result),
        _points(detail),
    ]
    parts += ["### Probes by layer (AUROC on the development rows)", _layers(detail)]
    if left_out := detail.get("leave_one_source_out"):
        parts += ["### One source of positives left out of the fitting (AUROC)", _left_out(result, left_out)]
    parts += ["### By source", _sources(detail)]
    return "\n\n".join(parts)


_MEASURES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "tpr_at_fpr1": "found at 1 % false positives",
    "tpr_at_fpr5": "found at 5 % false positives",
}


def _intervals(detail: dict[str, Any]) -> str:
    names = ("bank", "probe", "probe_lead", "tfidf_lead")
    rows = [
        [domain, part, *(_interval(intervals[name]) for name in names)]
        for domain in DOMAINS
        for part in ("dev", "unseen", "own")
        if (intervals := detail["domains"][domain][part].get("auroc_95"))
    ]
    return markdown(["domain", "rows", "bank", "probe", "bank minus probe", "bank minus TF-IDF"], rows)


def _operation(result: Result) -> str:
    titles = {
        "benign_blocked": "harmless development rows blocked",
        "benign_flagged": "harmless development rows flagged, politics included",
        "hard_negative_blocked": "hard negatives written for the project, blocked",
        "hard_negative_flagged": "hard negatives flagged, politics included",
    }
    rows = [
        [
            title,
            figure.n if (figure := result.figures.get(key)) else None,
            *(_percent(result.value(f"{key}{suffix}")) for suffix in _SUFFIXES),
        ]
        for key, title in titles.items()
    ]
    return markdown(["share of", "rows", *_HEADINGS], rows)


def _points(detail: dict[str, Any]) -> str:
    rows = [
        [domain, title, *(_percent(detail["operating_points"][domain][d][name]) for d in _DETECTORS)]
        for domain in DOMAINS
        for name, title in (("tpr", "found"), ("fpr", "false positives"), ("precision", "precision"))
    ]
    return markdown(["domain", "development rows", *_HEADINGS], rows)


def _layers(detail: dict[str, Any]) -> str:
    layers = list(detail["probe"][DOMAINS[0]]["layers"])
    rows = []
    for domain in DOMAINS:
        about = detail["probe"][domain]
        found = [_number(about["layers"][layer].get("auroc")) for layer in layers]
        hindsight = about["best_on_dev"]
        best = None if "auroc" not in hindsight else f"{hindsight['auroc']:.3f} (layer {hindsight['layer']})"
        rows.append([domain, *found, about["chosen"]["layer"], best])
    return markdown(["domain", *(f"layer {n}" for n in layers), "layer chosen", "best in hindsight"], rows)


def _left_out(result: Result, detail: dict[str, Any]) -> str:
    detectors = ("bank", "probe", "tfidf")
    rows: list[list[object]] = []
    for domain, sources in detail.items():
        rows += [
            [domain, source, f"{found['positive']} / {found['rows']}", *(_number(found[d]) for d in detectors)]
            for source, found in sources.items()
        ]
        means = [_number(result.value(f"loso_auroc_{domain}{suffix}")) for suffix in _SUFFIXES[:3]]
        rows.append([domain, "**mean**", None, *means])
    return markdown(["domain", "source left out", "positive / rows", *_HEADINGS[:3]], rows)


def _sources(detail: dict[str, Any]) -> str:
    rows = [
        [
            row["domain"],
            row["source"],
            "yes" if row["in_fit"] else "no",
            f"{row['positive']} / {row['rows']}",
            *(_percent(row[d][rate]) for d in ("bank", "probe") for rate in ("tpr", "fpr")),
            *(_number(row[d]["auroc"]) for d in ("bank", "probe")),
        ]
        for row in detail["sources"]
    ]
    heading = ["domain", "source", "fitted on", "positive / rows", "bank: found", "bank: false"]
    return markdown([*heading, "probe: found", "probe: false", "bank: AUROC", "probe: AUROC"], rows)


def overhead_tables(result: Result) -> str:
    """Everything docs/performance.md shows."""
    detail, machine = result.detail, result.machine
    features = sum(detail["bank"]["hook_points"].values())
    hooks = len(detail["bank"]["hook_points"])
    where = (
        f"{result.date}, {machine.cores} cores ({machine.cpu}), {machine.memory_gb:g} GB, "
        f"torch threads: {detail['threads']}, {detail['dtype']}, torch {result.versions['torch']}. "
        f"Bank `{detail['bank']['version']}`: {features} features at {hooks} hook points, decoding steps "
        f"{'compiled' if detail.get('compiled_step') else 'through torch'}."
    )
    titles = {
        "decode_bs1": f"decoding, batch 1, {detail['tokens']} tokens",
        "decode_bs8": f"decoding, batch 8, {detail['tokens']} tokens",
        "prefill": f"prefill, batch 1, {detail['prefill_tokens']} tokens",
    }
    whole = f"whole SAEs ({detail['full_sae']['d_sae']} features a hook point)"
    arms = {"guarded": "guarded", "torch": "guarded, through torch", "again": "unguarded again", "full_sae": whole}
    arms = {name: title for name, title in arms.items() if name in detail["decode_bs1"]}
    if "sae_lens" in detail["decode_bs1"]:
        arms["sae_lens"] = "the same by sae-lens " + result.versions["sae-lens"]
    compared = [
        [
            title,
            *(_median(detail[key][arm]) for arm in arms),
            detail[key]["guarded"]["n"],
            _ms(detail[key]["plain_ms_per_token"]),
        ]
        for key, title in titles.items()
    ]
    scatter = [[title, *(_spread(detail[key][arm]) for arm in arms)] for key, title in titles.items()]
    apart = [
        [
            titles[key],
            _percent(own["hooks_share"]["median"]),
            _ms(own["hooks_ms_per_step"] if "hooks_ms_per_step" in own else own["hooks_ms"]),
            _ms(own["flush_ms"]) if "flush_ms" in own else None,
            _spread(own["ratio"]) if "ratio" in own else None,
        ]
        for key in titles
        if (own := detail.get(f"{key}_own")) is not None
    ]
    return "\n\n".join(
        [
            where,
            "### Time over the unguarded model's (1.00 = free; median of interleaved pairs, its 95 % interval)",
            markdown(["", *arms.values(), "pairs", "unguarded, ms a token"], compared),
            "### How single pairs scatter (median, quartiles)",
            markdown(["", *arms.values()], scatter),
            "### The guard's own time, measured inside one whole `model.generate`, and inside one pass over a prompt",
            markdown(
                ["", "share of the time", "ms a step or pass", "last token, ms", "ratio, last token included"], apart
            ),
            *_memory(result),
        ]
    )


def _memory(result: Result) -> list[str]:
    if "memory" not in result.figures:
        return []
    return [
        f"Memory: the process grows by {result.figures['memory'].value:.0f} MB when a bank is loaded and attached, and "
        "has watched a batch of eight and a whole prompt."
    ]


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"


def _interval(values: Sequence[float]) -> str:
    return f"{values[0]:.3f} to {values[1]:.3f}"


def _median(values: dict[str, Any]) -> str:
    return f"{values['median']:.3f} ({_interval(values['interval'])})"


def _spread(values: dict[str, Any]) -> str:
    low, high = values["quartiles"]
    return f"{values['median']:.3f} ({low:.3f} to {high:.3f})"


def _ms(values: dict[str, Any]) -> str:
    return f"{values['median']:.3g}"


def bank_training_tables(result: Result) -> str:
    """What docs/training.md shows of a run from text to bank."""
    detail = result.detail
    stages = [[stage, f"{seconds / 60:.1f}"] for stage, seconds in detail["stages"].items() if seconds >= 3]
    minutes, peak = result.value("train_minutes"), result.value("train_peak_gb")
    return "\n\n".join(
        [
            f"{result.date}, {result.machine.cores} cores, {result.machine.memory_gb} GB. Bank "
            f"`{detail['bank']['version']}`: {detail['described']:,.0f} features described, "
            f"{detail['bank']['features']} kept.",
            markdown(["stage", "minutes"], [*stages, ["**all, start and end included**", f"**{minutes:.1f}**"]]),
            f"Peak memory: {peak:.2f} GB.",
        ]
    )


def _training_tables(result: Result) -> str:
    from benchmarks.training_tables import training_tables  # it uses what is above

    return training_tables(result)


def _selection_tables(result: Result) -> str:
    from benchmarks.selection_tables import selection_tables

    return selection_tables(result)


def _streaming_tables(result: Result) -> str:
    from benchmarks.decision_tables import streaming_tables

    return streaming_tables(result)


def _steering_tables(result: Result) -> str:
    from benchmarks.decision_tables import steering_tables

    return steering_tables(result)


def _ablation_tables(result: Result) -> str:
    from benchmarks.decision_tables import ablation_tables

    return ablation_tables(result)


def _explanation_tables(result: Result) -> str:
    from benchmarks.explanation_tables import explanation_tables

    return explanation_tables(result)


def _vllm_tables(result: Result) -> str:
    from benchmarks.vllm_tables import vllm_tables

    return vllm_tables(result)


def _service_tables(result: Result) -> str:
    from benchmarks.service_tables import service_tables

    return service_tables(result)


PAGES: dict[str, tuple[str, str, Callable[[Result], str]]] = {
    "quality": ("quality.md", "table", quality_tables),
    "streaming": ("quality.md", "streaming", _streaming_tables),
    "steering": ("quality.md", "steering", _steering_tables),
    "ablation": ("quality.md", "ablation", _ablation_tables),
    "overhead": ("performance.md", "table", overhead_tables),
    "training": ("performance.md", TRAINING, _training_tables),
    "bank_training": ("training.md", "table", bank_training_tables),
    "explanation": ("performance.md", EXPLANATION, _explanation_tables),
    "selection": ("selection.md", "table", _selection_tables),
    "vllm": ("vllm.md", "table", _vllm_tables),
    "service": ("sidecar.md", "table", _service_tables),
}
"""Result -> (page, name of its markers there, what stands between them)."""


def page(name: str, folder: Path = RESULTS) -> tuple[Path, str]:
    """(the page, what it should say) according to the result `name` in `folder`."""
    file, markers, render = PAGES[name]
    path, source = DOCS / file, folder / f"{name}.json"
    table = render(read_result(source)) if source.exists() else NOT_MEASURED
    return path, replace_table(path.read_text(encoding="utf-8"), table, file, name=markers)


def update(name: str, folder: Path = RESULTS) -> None:
    """Put the figures of the result `name` into its page."""
    path, text = page(name, folder)
    with atomic_file(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for known in PAGES:
        update(known)
