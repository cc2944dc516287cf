"""`/admin/bank` and `/admin/policy`: what is in use, reloading it, and switching between versions.

No file can be named from here: a bank comes into the store on the command line, and a policy is sent as text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from feature_bank.bank import shipped_bank_path
from feature_bank.errors import SailguardError
from feature_bank.versions import VERSIONS
from guard.policy import Policy
from guard.policy_file import shipped_policies
from service.auth import require_admin
from service.bank_versions import store_at
from service.errors import ApiError, AsciiJSONResponse
from service.middleware import JsonRoute, Record
from service.policies import Draft, PolicyEvent, PolicyStore, drafted, sent
from service.schemas_admin import (
    BankPlace,
    BankStatus,
    PolicyCheck,
    PolicyRequest,
    PolicyStatus,
    PromoteBankRequest,
    ReloadReport,
    RollbackRequest,
)
from service.schemas_errors import ERRORS
from service.services import Services

if TYPE_CHECKING:
    from service.engine import ServedEngine
    from service.reload import ReloadResult
    from service.watched import Part

__all__ = ["router"]

router = APIRouter(
    prefix="/admin", route_class=JsonRoute, tags=["admin"], responses=ERRORS, dependencies=[Depends(require_admin)]
)

_SHOWN_EVENTS = 100


# ---- bank ------------------------------------------------------------------------------------------------------


@router.get("/bank", summary="Show the bank in use", response_model=BankStatus)
async def get_bank(request: Request) -> Response:
    """The bank's manifest and hashes, where it comes from, and the versions that it can be switched to."""
    services = Services.of(request)
    bank = services.engine().bank
    place = services.reloader.files.bank
    store = store_at(place)
    versions, history = None, []
    if store is not None:
        versions, history = await _answered(lambda: (store.listed(), store.history()))
    kind: Literal["shipped", "folder", "store"] = "folder"
    if store is not None:
        kind = "store"
    elif place == shipped_bank_path():
        kind = "shipped"
    domains = {domain: sum(domain in feature.domains for feature in bank.features) for domain in bank.heads}
    status = BankStatus(
        version=bank.version,
        content_hash=bank.content_hash,
        features=len(bank.features),
        domains=domains,
        manifest=bank.manifest,
        place=BankPlace(kind=kind, path=str(place)),
        versions=versions,
        history=history[-_SHOWN_EVENTS:],
        last_reload=_last_reload(services, "bank"),
    )
    return AsciiJSONResponse(status.model_dump(mode="json"))


@router.post("/bank/reload", summary="Take the bank that lies there now into use", response_model=ReloadReport)
async def reload_bank(request: Request) -> Response:
    """Nothing changes if it is the one in use already, or if it is refused (409)."""
    services = Services.of(request)
    services.engine()
    _log(request, services, "bank reload")
    return _report(await services.reloader.reload("bank", reason="admin"))


@router.post("/bank/promote", summary="Switch to a version in the store", response_model=ReloadReport)
async def promote_bank(body: PromoteBankRequest, request: Request) -> Response:
    """The version is tried on the running model first, and becomes the current one only if it can be used."""
    return await _switch_bank(request, body.version, "bank promote")


@router.post("/bank/rollback", summary="Switch back to an earlier version", response_model=ReloadReport)
async def roll_bank_back(request: Request, body: RollbackRequest | None = None) -> Response:
    """Without `to`, to the version that was current before this one."""
    return await _switch_bank(request, None if body is None else body.to, "bank rollback")


async def _switch_bank(request: Request, to: str | None, action: str) -> Response:
    services = Services.of(request)
    services.engine()
    store = store_at(services.reloader.files.bank)
    if store is None:
        raise _conflict(
            "The server's bank is no folder of versions: put it into one with `sailguard bank promote --store DIR` and "
            "start the server with that folder.",
            "no_bank_store",
        )
    name = await _answered(lambda: store.chosen(to), missing=to is not None)
    _log(request, services, action, version=name)
    folder = store.folder / VERSIONS / name
    result = await services.reloader.exchange(
        "bank", lambda engine: engine.reloaded(folder, None), lambda: store.rollback(name), reason=action
    )
    return _report(result)


# ---- policy ----------------------------------------------------------------------------------------------------


@router.get("/policy", summary="Show the policy in use", response_model=PolicyStatus)
async def get_policy(request: Request) -> Response:
    """The policy in use, its file, and what the file held before."""
    services = Services.of(request)
    policy = services.engine().policy
    file = services.reloader.files.policy
    source, in_use, history = await _answered(lambda: _source(file, policy.version))
    status = PolicyStatus(
        name=policy.name,
        version=policy.version,
        on_error=policy.on_error,
        yaml=policy.to_yaml(),
        file=None if file is None else str(file),
        source=source,
        source_in_use=in_use,
        history=history[-_SHOWN_EVENTS:],
        last_reload=_last_reload(services, "policy"),
    )
    return AsciiJSONResponse(status.model_dump(mode="json"))


@router.post("/policy/validate", summary="Check a policy against the bank in use", response_model=PolicyCheck)
async def validate_policy(body: PolicyRequest, request: Request) -> Response:
    """Nothing changes, whatever the answer."""
    services = Services.of(request)
    engine = services.engine()
    problem, version = None, None
    with ExitStack() as stack:
        try:
            opened = sent(body.yaml.encode(), services.reloader.files.policy)
            draft = await asyncio.to_thread(stack.enter_context, opened)
            version = (await services.reloader.try_out(_with_policy(draft))).policy_version
        except (SailguardError, OSError, ValueError, RecursionError) as error:
            problem = f"{type(error).__name__}: {error}"
    check = PolicyCheck(valid=problem is None, policy=version, bank=engine.bank_version, problem=problem)
    return AsciiJSONResponse(check.model_dump(mode="json"))


@router.post("/policy/promote", summary="Put a policy into the file's place", response_model=ReloadReport)
async def promote_policy(body: PolicyRequest, request: Request) -> Response:
    """The policy is checked against the bank in use; then the file is replaced, and what it held is kept beside it."""
    services = Services.of(request)
    services.engine()
    store = await _policy_store(services)
    text = body.yaml.encode()
    with ExitStack() as stack:
        draft = await _answered(lambda: stack.enter_context(sent(text, store.file)))
        return await _put_policy(request, store, "promote", text, _with_policy(draft))


@router.post("/policy/rollback", summary="Put an earlier policy back", response_model=ReloadReport)
async def roll_policy_back(request: Request, body: RollbackRequest | None = None) -> Response:
    """Without `to`, the one that was in place before this one. The file is what it was then, byte for byte."""
    services = Services.of(request)
    services.engine()
    store = await _policy_store(services)
    to = None if body is None else body.to
    _, text = await _answered(lambda: store.find(to), missing=to is not None)
    with ExitStack() as stack:
        place = await _answered(lambda: stack.enter_context(drafted(text, store.file)))
        draft = Draft(file=place, name=store.file.name)
        return await _put_policy(request, store, "rollback", text, _with_policy(draft))


@router.post("/policy/reload", summary="Take the policy file into use as it is now", response_model=ReloadReport)
async def reload_policy(request: Request) -> Response:
    """Nothing changes if it is the one in use already, or if it is refused (409)."""
    services = Services.of(request)
    services.engine()
    if services.reloader.files.policy is None:
        raise _no_policy_file()
    _log(request, services, "policy reload")
    return _report(await services.reloader.reload("policy", reason="admin"))


async def _put_policy(
    request: Request,
    store: PolicyStore,
    action: Literal["promote", "rollback"],
    text: bytes,
    build: Callable[[ServedEngine], ServedEngine],
) -> Response:
    services, key = Services.of(request), _key(request)
    versions: list[str] = []

    def made(engine: ServedEngine) -> ServedEngine:
        new = build(engine)
        versions.append(new.policy_version)
        return new

    _log(request, services, f"policy {action}")
    result = await services.reloader.exchange(
        "policy", made, lambda: store.put(action, text, versions[0], key), reason=f"policy {action}"
    )
    return _report(result)


def _with_policy(draft: Draft) -> Callable[[ServedEngine], ServedEngine]:
    """What makes an engine with that policy."""
    return lambda engine: draft.use(lambda file: engine.reloaded(None, file))


async def _policy_store(services: Services) -> PolicyStore:
    file = services.reloader.files.policy
    if file is None or (not file.exists() and str(file) in shipped_policies()):
        raise _no_policy_file()
    store = PolicyStore(file)
    await _answered(store.check_changeable)
    return store


def _source(file: Path | None, version: str) -> tuple[str | None, bool | None, list[PolicyEvent]]:
    """What a policy file holds, whether that is the given version, and what it held before."""
    if file is None:
        return None, None, []
    try:
        in_use: bool | None = Policy.load(file).version == version
    except SailguardError:
        in_use = False
    source = file.read_bytes().decode(errors="replace") if file.is_file() else None
    return source, in_use, PolicyStore(file).history()


# ---- what both share -------------------------------------------------------------------------------------------


async def _answered(work: Callable[[], Any], *, missing: bool = False) -> Any:
    """What `work` returns, done in a thread; its errors are answered with 409, or 404 if it looks for something."""
    try:
        return await asyncio.to_thread(work)
    except (SailguardError, OSError) as error:
        if missing:
            raise ApiError(404, f"{error}.", param="to", code="version_not_found") from error
        raise _conflict(f"{type(error).__name__}: {error}", "refused") from error


def _report(result: ReloadResult) -> Response:
    if result.result == "refused":
        raise _conflict(f"The new version was refused, and the old one keeps serving: {result.problem}", "refused")
    return AsciiJSONResponse(result.to_dict())


def _last_reload(services: Services, part: Part) -> ReloadReport | None:
    last = services.reloader.last.get(part)
    return None if last is None else ReloadReport(**last.to_dict())


def _conflict(message: str, code: str) -> ApiError:
    return ApiError(409, message, code=code)


def _no_policy_file() -> ApiError:
    message = "The server runs on a shipped policy: start it with --policy FILE, and the file can be changed from here."
    return _conflict(message, "no_policy_file")


def _key(request: Request) -> str | None:
    """Id of the key that the request was sent with."""
    key: str | None = getattr(request.scope.get("sailguard.principal"), "key_id", None)
    return key


def _log(request: Request, services: Services, action: str, **fields: str) -> None:
    request_id = Record.of(request).request_id
    services.reloader.logger.info("admin", action=action, key_id=_key(request), request_id=request_id, **fields)
