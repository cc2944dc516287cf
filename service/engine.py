"""What the routes need of a guarded model, and the real thing: a model with an attached guard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, Self

from service.errors import ApiError

if TYPE_CHECKING:
    from guard.events import SequenceReport, StreamEvent, TextScore
    from guard.metrics import Metrics
    from guard.session import AttachedGuard
    from service.settings import Settings

__all__ = ["Engine", "EngineFactory", "EngineSlot", "ServedEngine"]

Message = Mapping[str, str]
"""One chat message: `role` (system, user or assistant) and `content`."""


class ServedEngine(Protocol):
    """A guarded model as the routes see it. One thread uses it at a time; calls may block for seconds."""

    @property
    def model_id(self) -> str:
        """Name under which the model is served."""

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

    def count_prompt(self, messages: Sequence[Message]) -> int:
        """Tokens of `messages` under the chat template. Raises `ApiError` (400) if they do not fit it."""

    def stream(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int | None,
        stop: Sequence[str],
    ) -> Iterator[StreamEvent]:
        """Generate one answer; closing the iterator ends the generation after its current step."""

    def last_report(self) -> SequenceReport:
        """Report of the generation that ended last."""

    def score(self, texts: Sequence[str]) -> Sequence[TextScore]:
        """Judge `texts`, one result each, in order."""


EngineFactory = Callable[["Metrics"], ServedEngine]
"""Makes an engine that counts into the given metrics; it may take minutes and runs on the model thread."""


class EngineSlot:
    """Where the server keeps its engine: empty while it loads, or for good if loading failed."""

    def __init__(self, engine: ServedEngine | None = None) -> None:
        self.engine = engine
        self.reason = "The guard is still being attached: the model is loading or its canary is running."

    def fill(self, engine: ServedEngine) -> None:
        """Put a started engine in; from here on the server is ready."""
        self.engine = engine

    def fail(self, reason: str) -> None:
        """Say why there will be no engine, or why it is gone."""
        self.engine = None
        self.reason = reason


class Engine:
    """A model, its tokenizer and a guard attached to it."""

    def __init__(self, attached: AttachedGuard, model_id: str) -> None:
        self._attached = attached
        self._model_id = model_id

    @classmethod
    def start(cls, settings: Settings, metrics: Metrics | None = None) -> Self:
        """Load the model and the bank, attach the guard and run its canary.

        Raises a `SailguardError`: `ModelError`, `BankError`, `PolicyError` or `CanaryError`.
        """
        from guard.core import Guard
        from guard.models import load_model

        loaded = load_model(settings.model)
        guard = Guard.from_bank(settings.bank, policy=settings.policy, metrics=metrics)
        attached = guard.attach(loaded.model, loaded.tokenizer)
        return cls(attached, loaded.model_id)

    def close(self) -> None:
        """Remove the guard's hooks from the model."""
        self._attached.close()

    @property
    def model_id(self) -> str:
        """Id of the loaded model."""
        return self._model_id

    @property
    def bank_version(self) -> str:
        """Version of the attached bank."""
        return self._attached.guard.bank.version

    @property
    def policy_version(self) -> str:
        """Version of the policy."""
        return self._attached.guard.policy.version

    @property
    def context_length(self) -> int:
        """Most tokens the model takes, prompt and answer together."""
        return self._attached.context_length

    @property
    def metrics(self) -> Metrics:
        """Where the guard counts."""
        return self._attached.guard.metrics

    def count_prompt(self, messages: Sequence[Message]) -> int:
        """Tokens of `messages` under the chat template, with the start of the answer."""
        import jinja2

        from feature_bank.layout import chat_ids

        chat = [dict(message) for message in messages]
        try:
            ids, _ = chat_ids(self._attached.tokenizer, chat, add_generation_prompt=True)
        except (ValueError, jinja2.TemplateError) as error:
            message = "The model's chat template does not take these messages: check the roles' order."
            raise ApiError(400, message, param="messages", code="invalid_value") from error
        return len(ids)

    def stream(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int | None,
        stop: Sequence[str],
    ) -> Iterator[StreamEvent]:
        """Generate one answer under the guard."""
        chat = [dict(message) for message in messages]
        return self._attached.stream(
            chat,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=tuple(stop),
        )

    def last_report(self) -> SequenceReport:
        """Report of the generation that ended last."""
        return self._attached.reports[-1]

    def score(self, texts: Sequence[str]) -> Sequence[TextScore]:
        """Judge `texts`, one result each, in order."""
        return self._attached.score(list(texts))
