"""Two combinations of bank and policy side by side on the running model: what can be chosen, and their engines.

An engine is made for a side as it is for a reload that is tried out, and is gone when the comparison is; a side that
means what is in use is judged by the running engine itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from feature_bank.bank import Bank, shipped_bank_path
from feature_bank.errors import BankError, SailguardError
from feature_bank.versions import VERSIONS
from guard.errors import PolicyError, UnsupportedGenerationError
from guard.policy import Policy
from guard.policy_file import SHIPPED, shipped_policies
from service.bank_versions import store_at
from service.errors import ApiError
from service.policies import sent
from service.slots import Slots

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.requests import Request

    from feature_bank.layout import Role
    from guard.events import TextScore
    from service.engine import ServedEngine
    from service.schemas_compare import SideRequest
    from service.services import Services

__all__ = ["Choosable", "Comparisons", "Side", "choosable_banks", "choosable_policies"]

_WAITING = 8  # comparisons; each holds up to two banks in memory while it runs, so that one runs at a time
_MAX_ID = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Choosable:
    """A bank or a policy that a side may name by its id."""

    label: str
    place: Path | None
    """The bank's folder or the policy's file; none for what is in use."""


def choosable_banks(engine: ServedEngine, place: Path) -> dict[str, Choosable]:
    """The bank in use, the other versions of its store, and the shipped one if it was made for the model, by version.

    place: where the server's bank lies. Reads the disk. Raises BankError for a store that is not whole.
    """
    found = {engine.bank_version: Choosable(label=engine.bank_version, place=None)}
    store = store_at(place)
    for version in () if store is None else store.listed():
        assert store is not None
        folder = store.folder / VERSIONS / version.version
        found.setdefault(version.version, Choosable(label=version.version, place=folder))
    if place == shipped_bank_path():
        return found
    try:
        shipped = Bank.load(shipped_bank_path())
    except (BankError, OSError):
        return found
    if shipped.manifest.model == engine.bank.manifest.model:
        label = f"{shipped.version} (shipped)"
        found.setdefault(shipped.version, Choosable(label=label, place=shipped_bank_path()))
    return found


def choosable_policies(engine: ServedEngine) -> dict[str, Choosable]:
    """The policy in use by its version, unless it is a shipped one, and the shipped ones by their names."""
    files = {name: SHIPPED / f"{name}.yaml" for name in shipped_policies()}
    versions = {name: Policy.load(file).version for name, file in files.items()}
    found: dict[str, Choosable] = {}
    if engine.policy_version not in versions.values():
        found[engine.policy_version] = Choosable(label=engine.policy.name, place=None)
    for name, file in files.items():
        in_use = versions[name] == engine.policy_version
        found[name] = Choosable(label=name, place=None if in_use else file)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One side of a comparison, found on the disk or in the request. What is None is what is in use."""

    versions: tuple[str, str]
    """Of bank and policy, as far as they are known before an engine is made."""
    bank: Path | None
    policy: Path | None
    text: bytes | None = None
    """Of a policy that was sent."""

    @classmethod
    def find(cls, asked: SideRequest, name: str, engine: ServedEngine, services: Services) -> Side:
        """The side that is asked for. name: `left` or `right`, for messages.

        Reads the disk. Raises ApiError: 404 for an unknown id, 409 for what cannot be used.
        """
        files = services.reloader.files
        try:
            bank = _named(asked.bank, engine.bank_version, lambda: choosable_banks(engine, files.bank), f"{name}.bank")
            policy = _named(asked.policy, engine.policy_version, lambda: choosable_policies(engine), f"{name}.policy")
            text = None if asked.yaml is None else asked.yaml.encode()
            version = engine.policy_version
            if text is not None:
                with sent(text, files.policy) as draft:
                    version = draft.use(Policy.load).version
                text = None if version == engine.policy_version else text
            elif policy is not None:
                version = Policy.load(policy).version
        except (SailguardError, OSError, ValueError, RecursionError) as error:
            raise _refused(name, asked, error) from error
        bank_version = engine.bank_version if bank is None or asked.bank is None else asked.bank
        return cls(versions=(bank_version, version), bank=bank, policy=policy, text=text)

    @property
    def in_use(self) -> bool:
        """Whether it is what is in use."""
        return self.bank is None and self.policy is None and self.text is None

    def build(self, engine: ServedEngine, beside: Path | None) -> ServedEngine:
        """The engine of this side. beside: the server's own policy. Runs on the model thread."""
        if self.text is None:
            return engine.reloaded(self.bank, self.policy)
        with sent(self.text, beside) as draft:
            return draft.use(lambda file: engine.reloaded(self.bank, file))


class Comparisons:
    """Judges texts by two sides, one comparison at a time. Nothing that the server uses or shows changes."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._places = Slots(max_running=1, max_waiting=_WAITING, metrics=services.metrics)

    @classmethod
    def of(cls, request: Request, services: Services) -> Comparisons:
        """The comparisons of the application that serves `request`."""
        state = request.app.state
        if not hasattr(state, "comparisons"):
            state.comparisons = cls(services)
        comparisons = state.comparisons
        assert isinstance(comparisons, cls)
        return comparisons

    async def judge(
        self, engine: ServedEngine, asked: Mapping[str, SideRequest], texts: Sequence[str], role: Role
    ) -> dict[str, tuple[tuple[str, str], list[TextScore]]]:
        """By the name of each side, the versions of bank and policy that judged, and a score for each text.

        Raises ApiError for a side that cannot be used, and what the engines raise.
        """
        services = self._services
        made: dict[tuple[str, str], tuple[tuple[str, str], list[TextScore]]] = {}
        async with self._places.take():
            sides = {
                name: await asyncio.to_thread(Side.find, side, name, engine, services) for name, side in asked.items()
            }
            for name, side in sides.items():
                if side.versions not in made:
                    judging = await self._engine(engine, name, asked[name], side)
                    versions = judging.bank_version, judging.policy_version
                    # In batches, among those of other requests.
                    made[side.versions] = versions, await services.runner.judge(judging, texts, [role] * len(texts))
        return {name: made[side.versions] for name, side in sides.items()}

    async def _engine(self, engine: ServedEngine, name: str, asked: SideRequest, side: Side) -> ServedEngine:
        if side.in_use:
            return engine
        policy = self._services.reloader.files.policy
        try:
            # Of the engine that the request began with, even if another one has come into use meanwhile.
            return await self._services.reloader.try_out(lambda _: side.build(engine, policy))
        except (SailguardError, OSError, ValueError, RecursionError) as error:
            raise _refused(name, asked, error) from error


def _named(asked: str | None, in_use: str, choices: Callable[[], Mapping[str, Choosable]], param: str) -> Path | None:
    """Where the bank or policy lies that is asked for; none for what is in use. Raises ApiError (404)."""
    if asked is None or asked == in_use:
        return None
    found = choices().get(asked)
    if found is None:
        message = f"There is no {asked[:_MAX_ID]!r} to compare with here; GET /v1/compare lists what there is."
        raise ApiError(404, message, param=param, code="choice_not_found")
    return found.place


def _refused(name: str, asked: SideRequest, error: Exception) -> ApiError:
    """409 for a side that cannot be used."""
    part = "policy" if asked.yaml is None else "yaml"
    if asked.bank is not None and not isinstance(error, PolicyError | UnsupportedGenerationError):
        part = "bank"
    message = f"The {name} side cannot be used: {type(error).__name__}: {error}."
    return ApiError(409, message, param=f"{name}.{part}", code="refused")
