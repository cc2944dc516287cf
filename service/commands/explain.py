"""`train explain`: explanations by a language model behind an endpoint, and how well they predict the features."""

from __future__ import annotations

import json
import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from feature_bank.errors import SailguardError
from service.commands.cluster import ClusterOption, stages_on
from service.commands.options import JsonOption
from service.commands.stages import StageReport
from service.commands.terminal import error_console, output_console, plain, print_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from training.explain.endpoint import Estimate
    from training.simulation.prompts import Level

__all__ = ["explain"]

CACHE_FOLDER = "endpoint-replies"


class Simulate(StrEnum):
    """At which level explanations are put to the test."""

    NONE = "none"
    TOKEN = "token"
    SEGMENT = "segment"
    BOTH = "both"


def explain(
    bank: Annotated[Path, typer.Option("--bank", metavar="FOLDER", help="The bank whose features are explained.")],
    work: Annotated[Path, typer.Option("--work", metavar="FOLDER", help="Work folder of the run that trained it.")],
    endpoint: Annotated[
        str, typer.Option("--endpoint", metavar="URL", help="Its address, such as http://127.0.0.1:8801/v1.")
    ],
    model: Annotated[str, typer.Option("--model", metavar="NAME", help="The model's name at the endpoint.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="JSON lines to write, one a feature.")],
    api_key_env: Annotated[
        str | None,
        typer.Option("--api-key-env", metavar="NAME", help="Environment variable that holds the API key."),
    ] = None,
    max_calls: Annotated[int, typer.Option("--max-calls", min=0, help="Most calls of this run.")] = 1000,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=0, help="Most tokens of this run, prompts and answers together.")
    ] = 1_000_000,
    features: Annotated[
        str | None,
        typer.Option("--features", metavar="N|IDS", help="The bank's first N features, or ids separated by commas."),
    ] = None,
    simulate: Annotated[
        Simulate, typer.Option("--simulate", help="Let the model predict where the features fire on test text.")
    ] = Simulate.NONE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost, and send nothing.")] = False,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds for one call.")] = 120.0,
    workers: Annotated[int, typer.Option("--workers", min=1, max=64, help="Calls under way at once.")] = 1,
    per_minute: Annotated[
        int | None, typer.Option("--per-minute", min=1, metavar="N", help="Most calls begun within any minute.")
    ] = None,
    cluster: ClusterOption = None,
    as_json: JsonOption = False,
) -> None:
    """Have a language model explain features, through any OpenAI-compatible endpoint.

    Text of the training corpus is sent to the endpoint. Run again after an interruption or a cap, it goes on where it
    stopped: answers are kept in the work folder and never paid for twice.
    """
    from feature_bank.bank import Bank
    from training.explain.endpoint import ChatEndpoint
    from training.explain.material import MATERIAL_FILE, load_material
    from training.simulation.llm_run import estimate

    levels: list[Level] = []
    if simulate in (Simulate.TOKEN, Simulate.BOTH):
        levels.append("token")
    if simulate in (Simulate.SEGMENT, Simulate.BOTH):
        levels.append("segment")
    if out.is_dir():
        raise SailguardError(f"{out}: --out is a folder; name a file")
    wanted = _chosen(features, list(Bank.load(bank).by_id))
    material = load_material(work / MATERIAL_FILE, set(wanted))
    if unknown := [id_ for id_ in wanted if id_ not in material]:
        raise SailguardError(f"{work / MATERIAL_FILE}: nothing on feature {unknown[0]}; is it this bank's work folder?")
    evidence = [material[id_].evidence for id_ in wanted]
    segments = {id_: material[id_].segments for id_ in wanted}
    with (
        stages_on(None if dry_run else cluster) as stages,
        ChatEndpoint(
            endpoint,
            model,
            cache=work / CACHE_FOLDER,
            api_key_env=api_key_env,
            max_calls=max_calls,
            max_tokens=max_tokens,
            timeout=timeout,
            workers=workers,
            per_minute=per_minute,
        ) as chat,
    ):
        if dry_run:
            _print_estimates(estimate(evidence, segments, endpoint=chat, levels=levels), as_json)
            return
        with StageReport() as report:
            done = stages.explain(evidence, segments, endpoint=chat, levels=levels, report=report)
    _write(out, done.rows)
    if as_json:
        print_json(done.summary | {"stopped": None if done.stopped is None else plain(str(done.stopped))})
    else:
        _print_summary(done.summary, out)
    if done.stopped is not None:
        raise done.stopped


def _chosen(features: str | None, ids: list[str]) -> list[str]:
    """The ids that `--features` names, in the bank's order or in its own."""
    if features is None:
        return ids
    if re.fullmatch("[1-9][0-9]{0,8}", features):
        return ids[: int(features)]
    wanted = list(dict.fromkeys(part.strip() for part in features.split(",") if part.strip()))
    if unknown := [id_ for id_ in wanted if id_ not in set(ids)]:
        raise SailguardError(f"--features: the bank has no feature {plain(unknown[0])!r}")
    if not wanted:
        raise SailguardError("--features: give a number above 0, or ids separated by commas")
    return wanted


def _write(out: Path, rows: list[dict[str, Any]]) -> None:
    from feature_bank.atomic import atomic_file

    with atomic_file(out) as file:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")


def _print_estimates(estimates: Mapping[str, Estimate], as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        print_json({step: asdict(estimate) for step, estimate in estimates.items()})
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("step", "calls", "in the cache", "prompt tokens", "answer tokens, at most"):
        table.add_column(name, justify="left" if name == "step" else "right")
    for step, cost in estimates.items():
        figures = (cost.calls, cost.cached, cost.prompt_tokens, cost.max_completion_tokens)
        table.add_row(step, *(f"{figure:,}" for figure in figures))
    output_console().print(table)
    error_console().print("estimates; nothing was sent")


def _print_summary(summary: Mapping[str, Any], out: Path) -> None:
    console = output_console()

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    say(
        f"{summary['explained']} of {summary['features']} features explained, {summary['unreadable']} without a usable "
        f"answer, in {out}"
    )
    say(
        f"{summary['calls']:,} calls, {summary['prompt_tokens']:,} prompt tokens, {summary['completion_tokens']:,} "
        "answer tokens in this run"
    )
    for level in ("token", "segment"):
        if (figures := summary.get(level)) and figures["features"]:
            say(
                f"{level} level: {figures['features']} features, {figures['tokens']:,} tokens, "
                f"{figures['missing_share']:.1%} of the predictions missing"
            )
    if summary.get("segment_token_saving") is not None:
        rank = summary["segment_rank_correlation"]
        said = "not known (fewer than three scores that differ)" if rank is None else f"{rank:.2f}"
        say(f"the segment level saves {summary['segment_token_saving']:.1%} of the tokens; rank correlation {said}")
