"""The tables of docs/sidecar.md."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from benchmarks.results import Result
from benchmarks.tables import markdown


def service_tables(result: Result) -> str:
    """What docs/sidecar.md shows: latency, load, int8 against float32, and the guard's share of the chat server."""
    parts = [
        f"{result.date}; {result.machine.cores} cores, {result.machine.memory_gb:g} GB; "
        f"onnxruntime {result.versions.get('onnxruntime', '?')}, torch {result.versions.get('torch', '?')}."
    ]
    for name, make in (("latency", _latency), ("load", _load), ("auroc", _auroc), ("chat", _chat)):
        if name in result.detail:
            parts += make(result)
    return "\n\n".join(parts)


def _latency(result: Result) -> list[str]:
    detail = result.detail["latency"]
    rows = [
        (name, f"{p50:.1f}", f"{p25:.1f} to {p75:.1f}", f"{p99:.1f}")
        for name, (p25, p50, p75, p99) in detail["ms_p25_p50_p75_p99"].items()
    ]
    names = ("sidecar_vs_full_forward", "sidecar_passage_vs_full_forward", "sidecar_vs_full_forward_bare")
    ratios = [f"{result.figures[name].value:.1f}" for name in names]
    starts = ", ".join(f"{seconds:.1f} s ({name})" for name, seconds in detail["start_seconds"].items())
    return [
        f"A text of {detail['tokens']} tokens, one client. The sidecar is asked over HTTP; torch runs in a process "
        "of its own, in turn with the requests, and judges nothing. Milliseconds:",
        markdown(("", "p50", "quartiles", "p99"), rows),
        "A text is a user's prompt unless the request says otherwise, and is read with the chat template around it (24 "
        "tokens of the embedded model's); a passage has one token before it.",
        f"Torch's pass through the whole model over the same tokens takes {ratios[0]} times as long as the int8 "
        f"sidecar's answer for a prompt, and {ratios[1]} times for a passage; over the text alone, without the "
        f"template that the sidecar reads, {ratios[2]} times as long as for a prompt. From start to ready: {starts}.",
    ]


def _load(result: Result) -> list[str]:
    detail, value = result.detail["load"], result.value
    rates = ", ".join(f"{median(each):.1f} ({name})" for name, each in detail["texts_per_second"].items())
    counts = ", ".join(f"{status}: {count}" for status, count in detail["statuses"].items())
    killed = detail["killed_worker"]
    after = ", ".join(f"{_status(status)}: {count}" for status, count in killed["statuses"].items())
    rows: list[Sequence[object]] = [(f"p{q}", f"{detail['ms'][f'p{q}']:.0f} ms") for q in (50, 90, 99)]
    rows += [
        ("responses other than 200, 429 and 503", f"{value('load_errors'):.0f}"),
        ("memory, first and last tenth", f"{detail['rss_mb']['first']:.0f} and {detail['rss_mb']['last']:.0f} MB"),
        ("memory at most", f"{detail['rss_mb']['most']:.0f} MB"),
    ]
    return [
        f"Texts of 100 tokens a second at saturation, {detail['clients']} clients: {rates}.",
        f"{detail['seconds']:.0f} seconds of {detail['clients']} clients that send texts of 20 to 400 tokens (int8; "
        f"{counts}):",
        markdown(("", ""), rows),
        f"Two workers under load, one killed: {after}; "
        + ("it was started again." if killed["restarted"] else "**it was not started again.**"),
    ]


def _auroc(result: Result) -> list[str]:
    detail = result.detail["auroc"]
    rows = [
        (domain, f"{each['fp32']:.4f}", f"{each['int8']:.4f}", f"{each['int8'] - each['fp32']:+.4f}")
        for domain, each in detail["auroc"].items()
    ]
    return [
        f"AUROC on {detail['rows']:,} labelled development rows, chosen by the hash of their ids; float32 scores lie "
        f"at most {result.figures['fp32_vs_torch_max'].value:.1e} off torch's:",
        markdown(("domain", "float32", "int8", "difference"), rows),
    ]


def _chat(result: Result) -> list[str]:
    detail = result.detail["chat"]
    rows = [
        (name.removeprefix("c"), f"{median(detail['ms_per_token'][name]):.1f}", f"{100 * median(each):.2f} %")
        for name, each in detail["share"].items()
    ]
    return [
        f"The chat server (`--engine transformers`), {detail['tokens']} tokens an answer: what the guard adds to the "
        "passes, by its own clock, as a share of all time:",
        markdown(("clients", "ms a token", "guard"), rows),
    ]


def _status(status: str) -> str:
    return "connections that broke" if status == "0" else status
