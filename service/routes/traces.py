"""`POST /v1/traces`: token by token, which features a text activates and how the domains' scores go."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from service.attending import Deadline, attended
from service.errors import AsciiJSONResponse, audit_failed
from service.middleware import JsonRoute, Record
from service.schemas import ACTION_HEADER
from service.schemas_errors import ERRORS
from service.services import Services

if TYPE_CHECKING:
    from guard.events import Trace
    from service.engine import ServedEngine

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute, tags=["judgements"], responses=ERRORS)


class TraceRequest(BaseModel):
    """Body of `POST /v1/traces`."""

    model_config = ConfigDict(extra="forbid")

    input: str = Field(description="The text.")
    role: Literal["prompt", "response", "passage"] = Field(
        default="prompt", description="What the text is: a user's message, an answer, or text on its own."
    )


class Hit(BaseModel):
    """A feature that is active."""

    id: str
    layer: int
    explanation: str
    activation: float = Field(description="In units of the feature's 99.9th percentile.")
    contribution: float = Field(description="What it adds to the domain's logit.")


class TokenTrace(BaseModel):
    """What one token showed."""

    index: int
    token_id: int
    text: str
    observed: bool = Field(description="Whether the guard judges it.")
    scores: dict[str, float]
    features: list[Hit]


class RuleVerdict(BaseModel):
    """A rule of the policy that fired."""

    request_id: str
    phase: Literal["prompt", "response"]
    token_index: int
    domain: str
    score: float
    threshold: float
    action: Literal["allow", "flag", "steer", "block"]
    rule: str
    features: list[Hit]
    bank_version: str
    policy_version: str


class TextJudgement(BaseModel):
    """The judgement on the whole text."""

    scores: dict[str, float]
    flagged: dict[str, bool]
    action: Literal["allow", "flag", "steer", "block"]
    verdicts: list[RuleVerdict]
    features: dict[str, list[Hit]]
    tokens: int
    truncated: bool


class TraceVersions(BaseModel):
    """What the text was judged by."""

    bank: str
    policy: str


class TraceResponse(BaseModel):
    """A trace. Of a text that is too long the beginning is traced, and `truncated` says so."""

    object: Literal["trace"]
    model: str
    role: Literal["prompt", "response", "passage"]
    truncated: bool
    tokens: list[TokenTrace]
    score: TextJudgement
    sailguard: TraceVersions


@router.post("/v1/traces", summary="Trace a text token by token", response_model=TraceResponse)
async def create_trace(body: TraceRequest, request: Request) -> Response:
    """Judge one text and show what every token of it activates."""
    services = Services.of(request)
    engine = services.engine()
    deadline = Deadline(services.settings.request_timeout, services.metrics)
    async with attended(request), deadline.kept(), services.slots.take():
        trace = await services.runner.call(lambda: engine.trace(body.input, body.role))
    recorder = services.recorder(request, "traces")
    recorder.spool.text(engine, trace.score, body.role, choice=0, text=body.input)
    if not await recorder.record(engine, trace.score.verdicts, text=body.input):
        raise audit_failed()
    Record.of(request).action = trace.score.action
    # A long trace takes a while to write down, and the event loop has others to serve.
    return await asyncio.to_thread(_response, engine, body.role, trace, services.settings.max_input_tokens)


def _response(engine: ServedEngine, role: str, trace: Trace, most: int) -> Response:
    content: dict[str, Any] = {
        "object": "trace",
        "model": engine.model_id,
        "role": role,
        "truncated": trace.score.truncated or len(trace.tokens) > most,
        "tokens": [token.to_dict() for token in trace.tokens[:most]],
        "score": trace.score.to_dict(),
        "sailguard": {"bank": engine.bank_version, "policy": engine.policy_version},
    }
    return AsciiJSONResponse(content, headers={ACTION_HEADER: trace.score.action})
