"""The tables of docs/quality.md on streaming, on steering and on what each part of the detector is worth."""

from __future__ import annotations

from typing import Any

from benchmarks.results import Result
from benchmarks.tables import markdown
from feature_bank.taxonomy import DOMAINS

__all__ = ["ablation_tables", "steering_tables", "streaming_tables"]

_PARTS = {"dev": "development rows", "own": "test rows written for the project"}


def streaming_tables(result: Result) -> str:
    """How many spans are detected, and how soon."""
    detail = result.detail
    figures = {name: figure.value for name, figure in result.figures.items()}
    rows = []
    short = f"of at most {detail['short_tokens']} tokens"
    titles = {**_PARTS, **{f"{part}_short": f"{title}, {short}" for part, title in _PARTS.items()}}
    for part, title in titles.items():
        for domain in DOMAINS:
            about = detail["domains"][domain][part]
            rows.append(
                [
                    domain,
                    title,
                    about["spans"],
                    _percent(figures.get(f"{part}_{domain}_detected")),
                    _percent(figures.get(f"{part}_{domain}_in_time")),
                    _quartiles(about["tokens"]),
                    about["early"],
                    _percent(figures.get(f"harmless_{domain}")),
                ]
            )
        total, found = (_percent(figures.get(f"{part}_{name}")) for name in ("detected", "in_time"))
        rows.append(["**all**", title, None, total, found, None, None, None])
    within = f"of these within {detail['in_time_tokens']} tokens"
    heading = ["domain", "spans from", "spans", "detected", within, "tokens to the flag: median (quartiles)"]
    return "\n\n".join(
        [
            f"Bank `{detail['bank']['version']}`, policy `{detail['policy']}`, {result.date}. Moving average over "
            f"{detail['window']} tokens, {detail['evidence_tokens']} tokens of evidence, from token "
            f"{detail['settle_tokens']} of the response on.",
            markdown([*heading, "flagged before the span", "harmless responses flagged"], rows),
        ]
    )


def ablation_tables(result: Result) -> str:
    """One row a variant, AUROC by domain on held-out fitting rows and on development rows."""
    rows = [
        [
            variant["group"],
            variant["name"],
            " / ".join(str(variant["domains"].get(d, {}).get("features", "–")) for d in DOMAINS),
            *(_auroc(variant["domains"], domain, part) for part in ("held_out", "dev") for domain in DOMAINS),
        ]
        for variant in result.detail["table"]
    ]
    heading = ["what is changed", "to", "features"]
    return "\n\n".join(
        [
            f"Bank `{result.detail['bank']['version']}`, {result.date}. AUROC on fitting rows that were held out "
            f"(h) and on development rows (d); features by domain in the order {', '.join(DOMAINS)}.",
            markdown([*heading, *(f"{domain}, {part}" for part in "hd" for domain in DOMAINS)], rows),
        ]
    )


def steering_tables(result: Result) -> str:
    """What is written with and without steering, and how fluent it is."""
    detail = result.detail
    rows = []
    for domain, arms in detail["domains"].items():
        for name, arm in arms.items():
            base = arms["harmless, unguarded" if name.startswith("harmless") else "unguarded"]["share"]
            change = None if arm["share"] == base or not base else f"{100 * (arm['share'] / base - 1):+.0f} %"
            equal = _percent(arm.get("difference_in_means_at_equal_nll"))
            figures = (f"{arm['nll']:.2f}", equal, _percent(arm["repeated"]), _percent(arm["steered"]))
            rows.append([domain, name, int(arm["prompts"]), _percent(arm["share"]), change, *figures])
    harmless, judge = detail["benign"], detail["judge"]
    found = ", ".join(f"{domain} {_percent(share)}" for domain, share in judge["found_on_held_out_rows"].items())
    heading = ["domain", "how", "prompts", "found in the domain", "change", "nats a token"]
    heading += ["difference in means at as many nats", "trigrams repeated", "rule fired"]
    return "\n\n".join(
        [
            f"Bank `{detail['bank']['version']}`, {result.date}. Judge: layer {judge['layer']}; of positives held out "
            f"from its fitting it finds {found}.",
            markdown(heading, rows),
            f"Under a policy that steers all four domains ({detail['harmless_steer']}) the perplexity of "
            f"{harmless['texts']} harmless texts is {harmless['ratio']:.4f} times the unguarded one. Of "
            f"{harmless['prompts']} harmless prompts a rule fires on {_percent(harmless['fired'])}; of the answers to "
            f"the others {_percent(harmless['identical_where_not_fired'])} are the unguarded ones, token for token.",
        ]
    )


def _auroc(domains: dict[str, Any], domain: str, part: str) -> str | None:
    return f"{domains[domain][part]:.3f}" if domain in domains else None


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"


def _quartiles(tokens: list[float] | None) -> str | None:
    return None if tokens is None else f"{tokens[1]:.0f} ({tokens[0]:.0f} to {tokens[2]:.0f})"
