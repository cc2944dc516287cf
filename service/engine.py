"""What the routes need of an engine: what judges texts, and for some of them also generates answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from service.errors import ApiError

if TYPE_CHECKING:
    from feature_bank.bank import Bank
    from feature_bank.layout import Role
    from guard.engines.requests import Keeper
    from guard.errors import GuardError
    from guard.events import SequenceReport, StreamEvent, TextScore, Trace, TraceToken
    from guard.metrics import Metrics
    from guard.policy import Policy
    from guard.serving import GenerationOptions, ServingGuard
    from service.settings import Settings

__all__ = [
    "AnsweringEngine",
    "EngineFactory",
    "EngineSlot",
    "Generation",
    "Observer",
    "ServedEngine",
    "TransformersEngine",
]

Message = Mapping[str, str]
"""One chat message: `role` (system, user or assistant) and `content`."""

Heard = Callable[["StreamEvent | GuardError"], None]
TOP_FEATURES = 5
"""Of a token of a trace, unless more are asked for."""


class Observer(Protocol):
    """Who is told what the guard saw of the tokens of one chat, on the thread of its events."""

    def prompt(self, tokens: Sequence[TraceToken]) -> None:
        """All tokens of the prompt; those of the template are not observed."""

    def token(self, token: TraceToken) -> None:
        """One more token of the answer, just before the event that shows its text."""


class Generation(Protocol):
    """One answer under way."""

    @property
    def report(self) -> SequenceReport | None:
        """What the guard has to say of it, once it has ended."""


class ServedEngine(Protocol):
    """One combination of a model, a bank and a policy; another bank or policy makes another engine.

    `score`, `trace` and `reloaded` may take their time and are called on the model thread, one at a time.
    """

    @property
    def model_id(self) -> str:
        """Name under which the model is served."""

    @property
    def bank(self) -> Bank:
        """The feature bank."""

    @property
    def policy(self) -> Policy:
        """The policy."""

    @property
    def bank_version(self) -> str:
        """Version of the feature bank, as it stands in verdicts."""

    @property
    def policy_version(self) -> str:
        """Version of the policy, as it stands in verdicts."""

    @property
    def context_length(self) -> int:
        """Most tokens, prompt and answer together, that the model takes."""

    @property
    def metrics(self) -> Metrics:
        """Where the guard counts; `/metrics` shows it."""

    @property
    def generates(self) -> bool:
        """Whether it answers chats, too: then it is an `AnsweringEngine`."""

    def score(
        self, texts: Sequence[str], roles: Sequence[Role], *, keep: Sequence[bool] | None = None
    ) -> Sequence[TextScore]:
        """Judge `texts`, each in its role; one result each, in order.

        keep: of which texts the results hold what was seen; with it, those of texts on which a rule fires do too.
        """

    def trace(self, text: str, role: Role, *, top: int | None = TOP_FEATURES) -> Trace:
        """Judge one text and keep what every token showed: its `top` strongest features, or all that are active."""

    def reloaded(self, bank: Path | None, policy: Path | None) -> ServedEngine:
        """The same model under another bank, another policy or both; None keeps what there is.

        This engine stays as it is, with the requests that it has; it is not closed, for both share the model.
        Raises a `SailguardError` if the bank or the policy cannot be used.
        """

    def close(self) -> None:
        """Let go of what this engine alone holds."""


class AnsweringEngine(ServedEngine, Protocol):
    """An engine with a model that answers.

    `prompt_ids` and `text_ids` are called on the model thread; `generate` and `cancel` return at once and may be called
    from any thread.
    """

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a chat. Raises `ApiError` (400) if the chat template does not take it."""

    def text_ids(self, text: str) -> list[int]:
        """The ids of a text that is to be continued."""

    def check_steering(self, items: Sequence[str]) -> None:
        """Raise `ApiError` (400) for items of `GenerationOptions.steer` that this engine cannot steer by."""

    def generate(
        self,
        ids: Sequence[int],
        options: GenerationOptions,
        heard: Heard,
        observer: Observer | None = None,
        keeper: Keeper | None = None,
    ) -> Generation:
        """Begin one answer; `heard` is told of its events on another thread, `observer` of the tokens they show.

        keeper: given what the guard saw of every judged token.
        """

    def cancel(self, generation: Generation) -> None:
        """End an answer; its place is free at once."""


EngineFactory = Callable[["Metrics"], ServedEngine]
"""Makes an engine that counts into the given metrics; it may take minutes and runs on the model thread."""


class EngineSlot:
    """Where the server keeps its engine: empty while it loads, or for good if loading failed."""

    def __init__(self, engine: ServedEngine | None = None) -> None:
        self.engine = engine
        self.reason = "The guard is still being attached: the model is loading or its canary is running."
        self._decided = asyncio.Event()

    async def decided(self) -> None:
        """Return once an engine has been put in, or it is known that there will be none."""
        if self.engine is None:
            await self._decided.wait()

    def fill(self, engine: ServedEngine) -> None:
        """Put a started engine in; from here on the server is ready."""
        self.engine = engine
        self._decided.set()

    def fail(self, reason: str) -> None:
        """Say why there will be no engine, or why it is gone."""
        self.engine = None
        self.reason = reason
        self._decided.set()


class TransformersEngine:
    """A language model in this process, under continuous batching, with a guard attached to it."""

    generates = True

    def __init__(self, serving: ServingGuard, model_id: str) -> None:
        self._serving = serving
        self.model_id = model_id

    @classmethod
    def start(cls, settings: Settings, metrics: Metrics | None = None) -> Self:
        """Load the model and the bank, attach the guard and run its canary.

        Raises a `SailguardError`: `ModelError`, `BankError`, `PolicyError` or `CanaryError`.
        """
        from guard.core import Guard
        from guard.models import load_model
        from guard.serving import ServingGuard

        guard = Guard.from_bank(settings.bank, policy=settings.policy, metrics=metrics)
        loaded = load_model(settings.model)
        serving = ServingGuard(guard, loaded.model, loaded.tokenizer, max_concurrent=settings.max_concurrent)
        return cls(serving, loaded.model_id)

    def reloaded(self, bank: Path | None, policy: Path | None) -> Self:
        """The same model under another bank, another policy or both; None keeps what there is."""
        from feature_bank.bank import Bank
        from guard.core import Guard
        from guard.policy import Policy

        guard = Guard(
            self.bank if bank is None else Bank.load(bank),
            self.policy if policy is None else Policy.load(policy),
            self.metrics,
        )
        return type(self)(self._serving.replaced(guard), self.model_id)

    def close(self) -> None:
        """End the answers of this engine and of those it was reloaded from, and remove the guard from the model."""
        self._serving.close()

    @property
    def bank(self) -> Bank:
        """The attached bank."""
        return self._serving.guard.bank

    @property
    def policy(self) -> Policy:
        """The policy."""
        return self._serving.guard.policy

    @property
    def bank_version(self) -> str:
        """Version of the attached bank."""
        return self.bank.version

    @property
    def policy_version(self) -> str:
        """Version of the policy."""
        return self.policy.version

    @property
    def context_length(self) -> int:
        """Most tokens the model takes, prompt and answer together."""
        return self._serving.context_length

    @property
    def metrics(self) -> Metrics:
        """Where the guard counts."""
        return self._serving.guard.metrics

    def score(
        self, texts: Sequence[str], roles: Sequence[Role], *, keep: Sequence[bool] | None = None
    ) -> Sequence[TextScore]:
        """Judge `texts`, each in its role."""
        return self._serving.score(texts, roles, keep=keep)

    def trace(self, text: str, role: Role, *, top: int | None = TOP_FEATURES) -> Trace:
        """Judge one text and keep what every token showed: its `top` strongest features, or all that are active."""
        return self._serving.trace(text, role, top=top)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a chat under the model's template."""
        from guard.errors import GuardError

        try:
            return self._serving.prompt_ids([dict(message) for message in messages])
        except GuardError as error:
            raise ApiError(400, f"{error}.", param="messages", code="invalid_value") from error

    def text_ids(self, text: str) -> list[int]:
        """The ids of a text that is to be continued."""
        return self._serving.text_ids(text)

    def check_steering(self, items: Sequence[str]) -> None:
        """Raise `ApiError` (400) for what the bank does not hold, or cannot be steered by."""
        from guard.errors import PolicyError

        try:
            self._serving.check_steering(items)
        except PolicyError as error:
            raise ApiError(400, f"{error}.", param="steer", code="invalid_value") from error

    def generate(
        self,
        ids: Sequence[int],
        options: GenerationOptions,
        heard: Heard,
        observer: Observer | None = None,
        keeper: Keeper | None = None,
    ) -> Generation:
        """Begin one answer."""
        return self._serving.generate(ids, options, heard, observer, keeper)

    def cancel(self, generation: Generation) -> None:
        """End an answer."""
        self._serving.cancel(generation)  # type: ignore[arg-type]  # it is one of those that `generate` gave
