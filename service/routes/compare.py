"""`/v1/compare`: texts judged by two banks or policies, without changing anything of what is in use."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from feature_bank.errors import SailguardError
from service.attending import Deadline, attended
from service.auth import require_privileged
from service.comparison import Choosable, Comparisons, choosable_banks, choosable_policies
from service.errors import ApiError, AsciiJSONResponse
from service.middleware import JsonRoute
from service.schemas_compare import (
    Choice,
    Choices,
    ComparedSide,
    ComparedText,
    Comparison,
    ComparisonRequest,
    ComparisonSummary,
    SideVersions,
)
from service.schemas_errors import ERRORS
from service.services import Services

if TYPE_CHECKING:
    from guard.events import TextScore

__all__ = ["router"]

router = APIRouter(
    prefix="/v1/compare",
    route_class=JsonRoute,
    tags=["judgements"],
    responses=ERRORS,
    dependencies=[Depends(require_privileged)],
)


@router.get("", summary="List what can be compared", response_model=Choices)
async def list_choices(request: Request) -> Response:
    """The banks and policies that a side of a comparison may name. Needs an admin key where there are keys."""
    services = Services.of(request)
    engine = services.engine()
    try:
        banks = await asyncio.to_thread(choosable_banks, engine, services.reloader.files.bank)
        policies = await asyncio.to_thread(choosable_policies, engine)
    except (SailguardError, OSError) as error:
        raise ApiError(409, f"{type(error).__name__}: {error}.", code="refused") from error
    choices = Choices(banks=_choices(banks), policies=_choices(policies))
    return AsciiJSONResponse(choices.model_dump(mode="json"))


@router.post("", summary="Compare two banks or policies", response_model=Comparison)
async def create_comparison(body: ComparisonRequest, request: Request) -> Response:
    """Judge the same texts by two sides. Nothing is changed, audited or counted as a verdict. Needs an admin key where
    there are keys."""
    services = Services.of(request)
    engine = services.engine()
    deadline = Deadline(services.settings.request_timeout, services.metrics)
    async with attended(request), deadline.kept():
        asked = {"left": body.left, "right": body.right}
        judged = await Comparisons.of(request, services).judge(engine, asked, body.texts, body.role)
    return await asyncio.to_thread(_response, judged)


def _choices(found: Mapping[str, Choosable]) -> list[Choice]:
    return [Choice(id=one, label=choice.label, current=choice.place is None) for one, choice in found.items()]


def _response(judged: Mapping[str, tuple[tuple[str, str], Sequence[TextScore]]]) -> Response:
    (left_versions, left), (right_versions, right) = judged["left"], judged["right"]
    pairs = list(zip(left, right, strict=True))
    comparison = Comparison(
        left=SideVersions(bank=left_versions[0], policy=left_versions[1]),
        right=SideVersions(bank=right_versions[0], policy=right_versions[1]),
        results=[
            ComparedText(index=index, left=_side(one), right=_side(other), changed=_changed(one, other))
            for index, (one, other) in enumerate(pairs)
        ],
        summary=ComparisonSummary(
            changed=sum(_changed(one, other) for one, other in pairs),
            newly_blocked=sum(one.action != "block" and other.action == "block" for one, other in pairs),
            newly_allowed=sum(one.action != "allow" and other.action == "allow" for one, other in pairs),
            mean_score_change={
                domain: sum(other.scores[domain] - one.scores[domain] for one, other in pairs) / len(pairs)
                for domain in left[0].scores
                if domain in right[0].scores
            },
        ),
    )
    return AsciiJSONResponse(comparison.model_dump(mode="json"))


def _side(score: TextScore) -> ComparedSide:
    return ComparedSide.model_validate(
        {name: value for name, value in score.to_dict().items() if name in ComparedSide.model_fields}
    )


def _changed(left: TextScore, right: TextScore) -> bool:
    return left.action != right.action or _flagged(left) != _flagged(right)


def _flagged(score: TextScore) -> set[str]:
    return {domain for domain, flagged in score.flagged.items() if flagged}
