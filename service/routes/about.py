"""`GET /v1/about`: what this server is, and what the key that asks may do on it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import Response

from feature_bank.review import review_file
from service.auth import KEYLESS, Principal, Role, permits, principal_of, privileged
from service.errors import AsciiJSONResponse
from service.schemas_about import (
    Abilities,
    About,
    AuditOfAbout,
    BankOfAbout,
    LimitsOfAbout,
    PolicyOfAbout,
    RuleOfAbout,
    Thresholds,
)
from service.schemas_errors import ERRORS
from service.services import Services

if TYPE_CHECKING:
    from feature_bank.bank import Bank
    from guard.policy import Policy, Rule

__all__ = ["router"]

router = APIRouter()


@router.get("/v1/about", summary="What this server is", response_model=About, responses=ERRORS, tags=["operations"])
def get_about(request: Request) -> Response:
    """Model, bank, policy and limits, and what the key that asks may do."""
    services = Services.of(request)
    engine, settings = services.engine(), services.settings
    principal = principal_of(request)
    kept = settings.audit is not None
    about = About(
        version=request.app.version,
        model=engine.model_id,
        context_length=engine.context_length,
        bank=_bank(engine.bank, engine.bank_version),
        policy=_policy(engine.policy, engine.policy_version, engine.bank),
        domains=list(engine.bank.heads),
        generates=engine.generates,
        proxy=settings.upstream is not None,
        keys=request.scope.get(KEYLESS) is not True,
        role=None if principal is None else principal.role.value,
        key_id=None if principal is None else principal.key_id,
        can=_abilities(request, principal, services, generates=engine.generates and settings.upstream is None),
        limits=LimitsOfAbout(max_new_tokens=settings.max_new_tokens, max_input_tokens=settings.max_input_tokens),
        audit=AuditOfAbout(on=kept, text=kept and settings.audit_text),
    )
    return AsciiJSONResponse(about.model_dump(mode="json"))


def _abilities(request: Request, principal: Principal | None, services: Services, *, generates: bool) -> Abilities:
    def may(method: str, path: str) -> bool:
        return principal is None or permits(principal.role, method, path)

    admin = principal is not None and principal.role is Role.ADMIN
    return Abilities(
        generate=generates and may("POST", "/v1/playground"),
        trace=may("POST", "/v1/traces"),
        steer=generates and privileged(request),
        compare=privileged(request),
        review=admin and _writable(services.reloader.files.bank),
        audit=admin and services.settings.audit is not None,
        mark=admin and services.settings.spool is not None,
        events=may("GET", "/v1/events"),
    )


def _writable(place: Path) -> bool:
    """Whether reviews can be added to those of the bank at `place`."""
    file = review_file(place)
    return os.access(file if file.exists() else file.parent, os.W_OK)


def _bank(bank: Bank, version: str) -> BankOfAbout:
    return BankOfAbout(
        version=version,
        name=bank.manifest.name,
        content_hash=bank.content_hash,
        features=len(bank.features),
        domains={domain: sum(domain in feature.domains for feature in bank.features) for domain in bank.heads},
        layers=sorted({feature.layer for feature in bank.features}),
        concepts=sorted({concept for feature in bank.features for concept in feature.concepts}),
        ceiling=bank.pooling.ceiling,
    )


def _policy(policy: Policy, version: str, bank: Bank) -> PolicyOfAbout:
    return PolicyOfAbout(
        name=policy.name,
        version=version,
        on_error=policy.on_error,
        rules=[
            RuleOfAbout(
                name=rule.label,
                target=rule.target,
                action=rule.action,
                scope=list(rule.scope),
                thresholds=_thresholds(rule, bank),
                evidence_tokens=_evidence_tokens(rule, bank),
            )
            for rule in policy.rules
        ],
    )


def _thresholds(rule: Rule, bank: Bank) -> Thresholds:
    if rule.threshold is None:
        return Thresholds(text=None, stream=None)
    if rule.domain is None:
        return Thresholds(text=rule.threshold.activation, stream=rule.threshold.activation)
    head = bank.heads[rule.domain]
    return Thresholds(text=rule.threshold.resolve(head), stream=rule.threshold.resolve(head, streaming=True))


def _evidence_tokens(rule: Rule, bank: Bank) -> int:
    on_domain = any(signal.domain is not None for signal in rule.signals)
    return rule.evidence_tokens or (bank.pooling.evidence_tokens if on_domain else 1)
