"""What the guard inside vLLM is told, by environment variables, for every process of the engine reads the same ones."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from feature_bank.bank import Bank, shipped_bank_path
from guard.engines.vllm.programs import RuleKey
from guard.errors import GuardError, PolicyError
from guard.monitor import Monitor
from guard.policy import Policy, reason
from guard.rules import BoundRule
from guard.steering_request import PREFIX, steering_rule

BANK, POLICY, TENANTS = "SAILGUARD_BANK", "SAILGUARD_POLICY", "SAILGUARD_TENANTS"
PROGRAMS = "SAILGUARD_STEERING_PROGRAMS"
TENANT_ARG, STEER_ARG = "sailguard_tenant", "sailguard_steer"
SHIPPED = "shipped"
DEFAULT_PROGRAMS = 16


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Tenant(_Section):
    policy: str | None = None
    overrides: bool = False


class _TenantsFile(_Section):
    default: _Tenant = _Tenant()
    tenants: dict[Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")], _Tenant] = {}


class Tenant(NamedTuple):
    """Under which policy a tenant's requests run, and whether they may bring steering of their own."""

    policy: Policy
    overrides: bool


class Options(NamedTuple):
    """What a request asks of the guard."""

    tenant: str
    steer: tuple[str, ...]


class Config(NamedTuple):
    """The bank and the tenants; `""` is who names no tenant."""

    bank: Bank
    tenants: Mapping[str, Tenant]
    programs: int

    def options(self, extra_args: Mapping[str, Any] | None) -> Options:
        """What a request's `vllm_xargs` ask for.

        Raises GuardError for an unknown tenant, for steering that the tenant may not ask for, or that is no steering.
        """
        given = extra_args or {}
        unknown = sorted(k for k in given if k.startswith("sailguard_") and k not in (TENANT_ARG, STEER_ARG))
        if unknown:
            raise GuardError(f"vllm_xargs: {unknown[0]!r} is not known; use {TENANT_ARG} or {STEER_ARG}")
        tenant = given.get(TENANT_ARG, "")
        if not isinstance(tenant, str) or tenant not in self.tenants:
            raise GuardError(f"vllm_xargs: {TENANT_ARG} {tenant!r} is not in the file that {TENANTS} names")
        wanted = given.get(STEER_ARG, ())
        if isinstance(wanted, str):
            wanted = [part.strip() for part in wanted.split(",")]
        items = tuple(wanted) if isinstance(wanted, list | tuple) else (wanted,)
        if items and not self.tenants[tenant].overrides:
            raise GuardError(f"vllm_xargs: {STEER_ARG} is not allowed for this tenant; set 'overrides: true' for it")
        for item in items:
            try:
                steering_rule(self.bank, item)
            except PolicyError as e:
                raise GuardError(f"vllm_xargs: {STEER_ARG} {e}") from None
        return Options(tenant, items)


def wanted(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment asks for a guard."""
    return any(environ.get(name) for name in (BANK, POLICY, TENANTS))


def read_config(environ: Mapping[str, str] = os.environ) -> Config:
    """Load the bank and every policy that is named.

    Raises BankError or PolicyError naming the file and the field that is wrong, GuardError for a setting.
    """
    where = environ.get(BANK) or SHIPPED
    bank = Bank.load(shipped_bank_path() if where == SHIPPED else Path(where))
    name = environ.get(POLICY)
    policy = Policy.load(name) if name else Policy.default()
    number = environ.get(PROGRAMS) or str(DEFAULT_PROGRAMS)
    if not number.isdecimal() or int(number) < 1:
        raise GuardError(f"{PROGRAMS}: expected a whole number from 1 on, got {number!r}")
    path = environ.get(TENANTS)
    if not path:
        return Config(bank, {"": Tenant(policy, overrides=False)}, int(number))
    try:
        text = Path(path).read_text(encoding="utf-8")
        listed = _TenantsFile.model_validate(yaml.safe_load(text) or {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise PolicyError(f"{TENANTS}: cannot read {path!r}: {e}") from e
    except ValidationError as e:
        raise PolicyError(f"{TENANTS}: {path!r}, {reason(e)}") from None
    tenants = {}
    for tenant, entry in {"": listed.default, **listed.tenants}.items():
        if tenant == "" and entry.policy and name:
            raise PolicyError(
                f"{TENANTS}: {path!r} names a default policy, and so does {POLICY}; leave one of them out"
            )
        tenants[tenant] = Tenant(Policy.load(entry.policy) if entry.policy else policy, entry.overrides)
    return Config(bank, tenants, int(number))


def refuse_prompt_steering(policy: Policy) -> None:
    """Raise PolicyError for a rule that has a prompt read once more: vLLM reads it but once."""
    for rule in policy.rules:
        if rule.action == "steer" and rule.steer.prompt:
            raise PolicyError(
                f"{policy.where(rule, 'steer', 'prompt')}: the prompt cannot be read once more under vLLM; leave "
                "'prompt' out"
            )


class Rules:
    """Every rule that may steer, by its key: those of the tenants' policies, and those that requests bring."""

    def __init__(self, bank: Bank, monitors: Mapping[str, Monitor]) -> None:
        self._bank = bank
        self._known: dict[RuleKey, BoundRule] = {}
        for tenant, monitor in monitors.items():
            for table in (*monitor.rules.values(), monitor.streaming_rules):
                self._known.update({(tenant, bound.rule.label): bound for bound in table.rules})

    def find(self, key: RuleKey) -> BoundRule:
        """The rule. Raises PolicyError if the bank does not hold what a request's own rule names."""
        if key[0] == PREFIX:
            return steering_rule(self._bank, key[1])
        return self._known[key]


def own_rules(options: Options) -> list[RuleKey]:
    """The keys of the steering that a request brings with it."""
    return [(PREFIX, item) for item in options.steer]
