"""vLLM's own server with the guard inside, our routes beside its own, and verdicts on its responses.

vLLM serves `/v1/chat/completions`, `/v1/completions`, `/v1/models` and `/metrics`. What is added here goes through what
it offers for that: an endpoint plugin brings routes, and a middleware writes the `sailguard` block into the responses.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from argparse import Namespace
from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import JSONResponse, Response

from service.errors import ApiError, error_response
from service.schemas import ACTION_HEADER, MODEL_ALIAS, ModerationRequest, guard_block, moderation_result, strongest

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from guard.engines.vllm.frontend import Found
    from service.settings import Settings

__all__ = ["Routes", "Verdicts", "command_line", "serve_vllm"]

_JUDGED = ("/v1/chat/completions", "/v1/completions")
_DONE = b"data: [DONE]"
_SCORED_TOKENS = 1  # the least that an engine generates; the prompt is what is judged


def serve_vllm(settings: Settings, more: Sequence[str] = ()) -> None:
    """Run vLLM's server in this process until it ends. more: arguments for `vllm serve` beside ours.

    Raises GuardError if vLLM is not installed, or not in a version that the guard follows.
    """
    from guard.engines.vllm.adapter import check_version
    from guard.engines.vllm.config import BANK, POLICY, SHIPPED
    from guard.models import embedded_folder

    check_version()
    os.environ[BANK] = str(settings.bank or os.environ.get(BANK) or SHIPPED)
    if settings.policy is not None:
        os.environ[POLICY] = str(settings.policy)
    plugins = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*plugins, "sailguard"]))
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    model = settings.model or str(embedded_folder())
    name = settings.model or embedded_folder().name
    from vllm.entrypoints.cli.main import main

    sys.argv = ["vllm", *command_line(settings, model, name, more)]  # the keys in it are not in the process's own
    main()


def command_line(settings: Settings, model: str, name: str, more: Sequence[str]) -> list[str]:
    """The arguments of `vllm serve` for these settings."""
    keys = settings.keys()
    return [
        *("serve", model, "--host", settings.host, "--port", str(settings.port)),
        *("--served-model-name", name, MODEL_ALIAS),
        *("--worker-extension-cls", "guard.engines.vllm.required.Guarded"),
        *("--middleware", f"{__name__}.Verdicts"),
        *(("--api-key", *keys) if keys else ()),
        *more,
    ]


# ---- routes ----------------------------------------------------------------------------------------------------

router = APIRouter()


class Routes:
    """The endpoint plugin: moderation and readiness beside vLLM's routes."""

    name = "sailguard"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Remember the engine."""
        from guard.engines.vllm.adapter import model_of

        state.sailguard_engine = engine_client
        state.sailguard_tokenizer = model_of(engine_client.vllm_config.model_config)[1]
        state.sailguard_model = (args.served_model_name or [args.model])[0]


@router.get("/healthz")
async def get_health() -> dict[str, str]:
    """Say that the process answers."""
    return {"status": "ok"}


@router.get("/readyz")
async def get_readiness(request: Request) -> dict[str, Any]:
    """Say what guards the engine; it is up, for it does not come up otherwise."""
    from guard.engines.vllm.frontend import current

    guard, state = current().guard, request.app.state
    await state.sailguard_engine.check_health()
    return {
        "status": "ready",
        "model": state.sailguard_model,
        "bank": guard.bank.version,
        "policy": guard.tenants[""].policy.version,
        "tenants": {name: tenant.policy.version for name, tenant in guard.tenants.items() if name},
    }


@router.post("/v1/moderations")
async def create_moderation(body: ModerationRequest, request: Request) -> Response:
    """Judge one text or several, each as a user's prompt that the engine reads."""
    import asyncio

    from guard.engines.vllm.frontend import current

    if body.role != "prompt":
        message = f"role: vLLM's server judges prompts only, not {body.role!r}; the sidecar judges all roles."
        return error_response(ApiError(400, message, param="role", code="invalid_value"))
    state, guard = request.app.state, current().guard
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_judge(state, text)) for text in body.input]
    results = [task.result() for task in tasks]
    return JSONResponse(
        {
            "id": f"modr-{uuid.uuid4().hex}",
            "model": state.sailguard_model,
            "results": [moderation_result(score) for score in results],
            "sailguard": {"bank": guard.bank.version, "policy": guard.tenants[""].policy.version},
        },
        headers={ACTION_HEADER: strongest([score.action for score in results])},
    )


async def _judge(state: Any, text: str) -> Any:
    from vllm import SamplingParams

    from feature_bank.layout import render
    from guard.engines.vllm.frontend import current
    from guard.events import SEVERITY, TextScore

    engine = state.sailguard_engine
    room = engine.vllm_config.model_config.max_model_len - _SCORED_TOKENS
    rendered = render(state.sailguard_tokenizer, text, "prompt", max_tokens=room)
    params = SamplingParams(temperature=0.0, max_tokens=_SCORED_TOKENS, detokenize=True)
    request_id = f"modr-{uuid.uuid4().hex}"
    async for output in engine.generate({"prompt_token_ids": rendered.ids}, params, request_id):
        last = output
    current().fetch(request_id)
    report = last.outputs[0].sailguard
    verdicts = tuple(verdict for verdict in report.verdicts if verdict.phase == "prompt")
    scores = report.prompt_scores
    return TextScore(
        scores=scores,
        flagged={domain: any(verdict.domain == domain for verdict in verdicts) for domain in scores},
        action=max((verdict.action for verdict in verdicts), key=SEVERITY.__getitem__, default="allow"),
        verdicts=verdicts,
        features={verdict.domain: verdict.features for verdict in verdicts},
        tokens=len(rendered.ids) - rendered.start,
        truncated=rendered.truncated,
    )


# ---- verdicts on vLLM's responses --------------------------------------------------------------------------------


class Verdicts:
    """ASGI middleware: the `sailguard` block in vLLM's completions, as our own server writes it.

    A response that comes whole gets the block and the header X-Sailguard-Action; a stream gets it as one chunk more,
    without choices, before its end.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and rewrite the response if it is a completion."""
        if scope["type"] == "http" and scope["path"] in _JUDGED:
            send = _Rewriter(send)
            scope = {**scope, "headers": [_own_id(name, value) for name, value in scope.get("headers", ())]}
        await self._app(scope, receive, send)


def _own_id(name: bytes, value: bytes) -> tuple[bytes, bytes]:
    """A header as it is; a request id that a client chose is made one that no other client can choose."""
    return (name, value + b"-" + uuid.uuid4().hex[:12].encode()) if name.lower() == b"x-request-id" else (name, value)


class _Rewriter:
    """One response on its way out."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: MutableMapping[str, Any] | None = None
        self._body = b""
        self._head: dict[str, Any] | None = None  # of a stream's first chunk

    async def __call__(self, message: Message) -> None:
        """Take one ASGI message."""
        if message["type"] == "http.response.start":
            kind = next((value for name, value in message["headers"] if name.lower() == b"content-type"), b"")
            if kind.startswith(b"application/json"):
                self._start = message  # until the whole body is there
            else:
                await self._send(message)
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._start is None:
            await self._send({**message, "body": self._with_chunk(message.get("body", b""))})
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._send_whole(self._start)

    async def _send_whole(self, start: MutableMapping[str, Any]) -> None:
        body, headers = self._body, list(start["headers"])
        found = _found(answer := _parsed(body))
        if found and answer is not None:
            block = _block(found)
            body = json.dumps({**answer, "sailguard": block}).encode()
            headers = [(name, value) for name, value in headers if name.lower() != b"content-length"]
            headers += [(b"content-length", str(len(body)).encode())]
            headers += [(ACTION_HEADER.lower().encode(), block["action"].encode())]
        await self._send({**start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    def _with_chunk(self, body: bytes) -> bytes:
        if self._head is None and body.startswith(b"data: {"):
            self._head = _parsed(body.split(b"\n", 1)[0].removeprefix(b"data: "))
        at = 0 if body.startswith(_DONE) else body.find(b"\n" + _DONE) + 1
        if not body[at:].startswith(_DONE) or self._head is None:
            return body
        found = _found(self._head)
        if not found:
            return body
        kept = {name: self._head[name] for name in ("id", "object", "created", "model") if name in self._head}
        chunk = json.dumps({**kept, "choices": [], "sailguard": _block(found)}).encode()
        return body[:at] + b"data: " + chunk + b"\n\n" + body[at:]


def _parsed(body: bytes) -> dict[str, Any] | None:
    try:
        answer = json.loads(body)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def _found(answer: Mapping[str, Any] | None) -> Mapping[int, Found]:
    from guard.engines.vllm.frontend import current

    return current().fetch(str(answer["id"])) if answer is not None and "id" in answer else {}


def _block(found: Mapping[int, Found]) -> dict[str, Any]:
    from guard.engines.vllm.frontend import current

    policies = dict.fromkeys(one.policy for one in found.values())
    reports = {index: one.report for index, one in found.items()}
    return guard_block(reports, current().guard.bank.version, ", ".join(policies))
