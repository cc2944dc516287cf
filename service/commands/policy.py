"""`policy check`, `explain` and `schema`: whether a policy file can be used, and what it will do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands.bank_reader import read_bank
from service.commands.options import BankOption, JsonOption
from service.commands.terminal import output_console, plain, print_json

if TYPE_CHECKING:
    from feature_bank.bank import Bank
    from guard.monitor import Monitor
    from guard.rules import BoundRule

__all__ = ["build_app"]

PolicyArgument = Annotated[
    str, typer.Argument(metavar="POLICY", help="Policy file (YAML), or monitor, balanced or strict.")
]
_ON_ERROR = {
    "block": "every sequence of the batch is stopped",
    "flag": "the generation goes on, and its report is flagged",
    "allow": "the generation goes on; it is counted and logged",
}


def build_app() -> typer.Typer:
    """The group `policy`."""
    app = typer.Typer(help="Check and explain policy files.", no_args_is_help=True)
    app.command()(check)
    app.command()(explain)
    app.command()(schema)
    return app


def check(policy: PolicyArgument, bank: BankOption = None, as_json: JsonOption = False) -> None:
    """Check a policy against a bank: its fields, its thresholds, and that every rule can come to act."""
    monitor = _bind(policy, bank)
    if as_json:
        print_json({"policy": monitor.policy.version, "bank": monitor.bank.version, "rules": len(monitor.policy.rules)})
        return
    rules = len(monitor.policy.rules)
    output_console().print(
        plain(f"{monitor.policy.version}: {rules} rule{'s' * (rules != 1)}, usable with {monitor.bank.version}"),
        markup=False,
        soft_wrap=True,
    )


def explain(policy: PolicyArgument, bank: BankOption = None, as_json: JsonOption = False) -> None:
    """Say in words what a policy does with a bank: when each rule fires, and what happens then."""
    monitor = _bind(policy, bank)
    rules = [_rule(monitor, number) for number in range(len(monitor.policy.rules))]
    if as_json:
        given = monitor.policy
        facts = {"policy": given.version, "bank": monitor.bank.version, "allow": list(given.allow)}
        print_json({**facts, "on_error": given.on_error, "refusal": given.refusal, "rules": rules})
        return
    lines = [f"{monitor.policy.version} with {monitor.bank.version}", ""]
    for rule in rules:
        lines += [f"{rule['name']}: {rule['then']}", *(f"  {text}" for text in rule["when"].values())]
    lines += [
        f"allowed: {len(places)} features tell nothing of {domain} but allowed concepts, and do not raise its score"
        for domain, places in monitor.allowed.items()
    ]
    lines += ["", f"If the guard itself fails: {_ON_ERROR[monitor.policy.on_error]}."]
    if any(rule.action == "block" for rule in monitor.policy.rules):
        lines.append(f"A blocked answer ends with: {monitor.policy.refusal}")
    for line in lines:
        output_console().print(plain(line), markup=False, soft_wrap=True, highlight=False)


def schema() -> None:
    """Print the JSON Schema of policy files, for editors that complete and check YAML."""
    from guard.policy_loading import PolicyFile

    typer.echo(json.dumps(PolicyFile.model_json_schema(), indent=2, ensure_ascii=False))


def _bind(policy: str, path: Path | None) -> Monitor:
    import torch

    from guard.monitor import Monitor
    from guard.policy import Policy

    bank: Bank = read_bank(path)
    return Monitor(bank, Policy.load(policy), torch.device("cpu"))


def _rule(monitor: Monitor, number: int) -> dict[str, Any]:
    rule = monitor.policy.rules[number]
    found = dict(_conditions(monitor, number))
    return {
        "name": rule.label,
        "domain": rule.domain,
        "action": rule.action,
        "then": _then(monitor, number),
        "thresholds": {name: round(bound.threshold, 6) for name, (bound, _) in found.items()},
        "evidence_tokens": {name: bound.evidence_tokens for name, (bound, _) in found.items()},
        "when": {name: text for name, (_, text) in found.items()},
    }


def _conditions(monitor: Monitor, number: int) -> Iterator[tuple[str, tuple[BoundRule, str]]]:
    """Of each way in which text is judged that the rule is for: the rule as it is bound there, and when it fires."""
    rule, pooling = monitor.policy.rules[number], monitor.bank.pooling
    whole = f"averaged over {pooling.window} tokens or a shorter text"
    later = f"from token {pooling.settle_tokens} on, averaged over the last {pooling.streamed.window}"
    ways = (
        ("prompt", monitor.rules["prompt"], "prompts", whole),
        ("response", monitor.streaming_rules, "answers as they come", later),
        ("whole response", monitor.rules["response"], "answers that are there whole", whole),
    )
    for name, table, what, where in ways:
        for bound in table.rules:
            if bound.rule is rule:
                tokens = "1 token" if bound.evidence_tokens == 1 else f"{bound.evidence_tokens} tokens running"
                if rule.when is not None:
                    text = f"{what}: where {rule.when} on {tokens}"
                elif rule.domain is None:
                    fires = "the feature" if rule.feature else f"any of {len(bound.columns)} features"
                    text = f"{what}: where {fires} is at {bound.threshold:g} of its 99.9th percentile on {tokens}"
                else:
                    fpr = None if rule.threshold is None else rule.threshold.fpr
                    rate = "" if fpr is None else f" ({100 * fpr:g} % of the calibration's negatives reach it)"
                    text = f"{what}: at a probability of {bound.threshold:.3f}{rate} on {tokens}, {where}"
                yield name, (bound, text)


def _then(monitor: Monitor, number: int) -> str:
    rule = monitor.policy.rules[number]
    until = "" if rule.cooldown_tokens is None else f", until {rule.cooldown_tokens} tokens running stay below"
    if rule.action == "flag":
        return f"{rule.target} is reported, nothing else changes" + (until and f"; not again{until}")
    if rule.action == "block":
        return f"{rule.target} stops the generation before the deciding token is shown"
    what = next((f"the {kind}'s" for kind in ("domain", "concept", "feature") if getattr(rule, kind)), "each part's")
    steer = rule.steer
    how = {
        "add": f"{steer.strength:+g} times {what} direction is added",
        "clamp": f"{what} activation is held at {steer.value:g} of its scale",
        "ablate": f"{what} activation is taken out",
    }[steer.op]
    where = "from the next token on" if not steer.prompt else "from the next token on, the prompt's own tokens too"
    return f"{rule.target} is steered {where}{until}: {how}, by at most {steer.limit:g} of a token's norm"
