"""Many chats at once: a guarded model under continuous batching, with answers handed out as they are judged.

One `ServingGuard` is a model with one bank and one policy. `replaced` makes another with a new bank or policy on the
same model: requests that the first one has taken go on under what they started with, side by side with the new one's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from feature_bank.identity import check_identity
from feature_bank.layout import Role, content_ids
from guard.canary import check_canary
from guard.engines.decoding import Sampler
from guard.engines.judging import Judging
from guard.engines.requests import Guarded, Keeper, Observer
from guard.errors import GuardError, UnsupportedGenerationError
from guard.events import TextScore, Trace
from guard.generation import Generation, GenerationOptions, Heard
from guard.judge import TOP_FEATURES
from guard.monitor import Monitor
from guard.session import AttachedGuard, Messages
from guard.steering_request import steering_rules
from guard.text_scoring import TextScorer

if TYPE_CHECKING:
    from guard.core import Guard

__all__ = ["Generation", "GenerationOptions", "ServingGuard"]

_PAGE = 64  # tokens of a page of the cache
_PASS_TOKENS = 512  # of one pass on a CPU: a long prompt is read in pieces, so that other answers go on meanwhile
_END_SECONDS = 10.0
_SHARE = 2048  # tokens of the cache for each request, unless the caller says


class ServingGuard:
    """A model that answers several chats side by side under one guard.

    `generate` and `cancel` may be called from any thread, everything else from one thread at a time: a tokenizer is not
    made for several, and `score`, `trace` and `replaced` use the model, for which the answers pause.

    max_concurrent: answers that are generated side by side; more wait for one to end. cache_tokens: tokens of prompts
    and answers that the cache holds in all.

    Raises what `Guard.attach` raises, and UnsupportedGenerationError for a policy that steers prompts.
    """

    def __init__(
        self, guard: Guard, model: Any, tokenizer: Any, *, max_concurrent: int = 8, cache_tokens: int | None = None
    ) -> None:
        _check_policy(guard)
        self._shared = _Shared(guard.attach(model, tokenizer), max_concurrent, cache_tokens)
        attached = self._shared.attached
        self.guard = guard
        self._take(attached.monitor, attached.engine.judging)
        self._shared.start()

    def _take(self, monitor: Monitor, judging: Judging) -> None:
        attached = self._shared.attached
        self.monitor = monitor
        self._judging = judging
        self._scorer = TextScorer(monitor, attached.model, attached.tokenizer, judging.metrics)

    def replaced(self, guard: Guard) -> ServingGuard:
        """The same model under another bank or policy; this one stays as it is, with the requests it has.

        Raises what `Guard.attach` raises; nothing has changed then.
        """
        _check_policy(guard)
        attached = self._shared.attached
        check_identity(attached.model, attached.tokenizer, guard.bank.manifest.model)
        monitor = Monitor(guard.bank, guard.policy, attached.monitor.device)
        with attached.engine.paused():
            check_canary(guard.bank, monitor.encoder, attached.model, attached.tokenizer)
        attached.engine.watch(monitor.encoder.hook_names)
        other = ServingGuard.__new__(ServingGuard)
        other._shared = self._shared
        other.guard = guard
        other._take(monitor, Judging(monitor, attached.tokenizer, guard.metrics))
        guard.publish()
        return other

    def close(self) -> None:
        """Stop the answers under way, which fail, and remove the hooks; for all that share the model."""
        self._shared.close()

    @property
    def context_length(self) -> int:
        """Most tokens of one prompt and answer together: what the model takes, or the cache holds if that is less."""
        return self._shared.context_length

    def prompt_ids(self, messages: Messages) -> list[int]:
        """The ids of a chat, ready for the answer, however long they are.

        Raises GuardError if the chat is empty or malformed.
        """
        return self._shared.attached.rendered(messages)

    def text_ids(self, text: str) -> list[int]:
        """The ids of plain text that is to be continued; its spelling of control tokens is ordinary text."""
        tokenizer = self._shared.attached.tokenizer
        sink = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return [*([] if sink is None else [sink]), *content_ids(tokenizer, text)]

    def check_steering(self, items: Sequence[str]) -> None:
        """Raise PolicyError for what cannot be steered by: see `GenerationOptions.steer`."""
        steering_rules(self.guard.bank, items)

    def generate(
        self,
        ids: Sequence[int],
        options: GenerationOptions,
        heard: Heard,
        observer: Observer | None = None,
        keeper: Keeper | None = None,
    ) -> Generation:
        """Begin one answer to a prompt. A token's text is handed out only after the token has been judged.

        When a rule blocks, the last event carries the refusal text alone and `finish_reason="content_filter"`.
        observer: told of the prompt's tokens and of those whose text is shown, just before the event that shows it.
        keeper: given what the guard saw of every judged token, whether its text is shown or not.
        Raises GuardError if the prompt leaves no room for an answer, or nothing takes it, PolicyError for steering that
        the bank does not hold.
        """
        room = self.context_length - len(ids)
        if room < 1 or not ids:
            raise GuardError(f"the prompt has {len(ids)} tokens; 1 to {self.context_length - 1} leave room to answer")
        sampler = None
        if options.temperature > 0.0:
            sampler = Sampler(temperature=options.temperature, top_p=options.top_p, seed=options.seed)
        generation = Generation(self._shared.attached.tokenizer, options, self.guard.policy.refusal, heard, observer)
        guarded = Guarded(
            judging=self._judging,
            sampler=sampler,
            listener=generation,
            steer=steering_rules(self.guard.bank, options.steer),
            observer=generation.tokens,
            keeper=keeper,
        )
        limit = max(1, min(options.max_new_tokens, room))
        self._shared.submit(generation.request_id, guarded, input_ids=list(ids), max_new_tokens=limit)
        return generation

    def cancel(self, generation: Generation) -> None:
        """End an answer now, in the middle; its place is free for another one."""
        self._shared.cancel(generation.request_id)

    def score(
        self, texts: Sequence[str], roles: Sequence[Role], *, keep: Sequence[bool] | None = None
    ) -> list[TextScore]:
        """Judge texts on their own, each in its role; answers under way wait meanwhile.

        keep: of which texts the results hold what was seen; with it, those of texts on which a rule fires do too.
        """
        with self._shared.attached.engine.paused():
            return self._scorer.score(texts, roles, keep=keep)

    def trace(self, text: str, role: Role = "prompt", *, top: int | None = TOP_FEATURES) -> Trace:
        """Judge one text and keep what every token showed: its `top` strongest features, or all that are active."""
        with self._shared.attached.engine.paused():
            return self._scorer.trace(text, role, top=top)


class _Shared:
    """What several guards of one model have in common: the hooks, and the manager whose thread runs the model."""

    def __init__(self, attached: AttachedGuard, max_concurrent: int, cache_tokens: int | None) -> None:
        self.attached = attached
        self._max_concurrent = max_concurrent
        own = attached.context_length
        tokens = max(_SHARE * max_concurrent, min(own, _SHARE * 4)) if cache_tokens is None else cache_tokens
        self._blocks = max(-(-tokens // _PAGE), 4)
        self.context_length = min(own, (self._blocks - 2) * _PAGE)
        self._lock = threading.Lock()
        self._closed = False
        self._manager: Any = None

    def start(self) -> None:
        """Start the manager."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        attached = self.attached
        on_cpu = attached.monitor.device.type == "cpu"
        config = ContinuousBatchingConfig(
            page_size=_PAGE,
            num_blocks=self._blocks,
            max_requests_per_batch=self._max_concurrent,
            max_batch_tokens=max(_PASS_TOKENS, self._max_concurrent) if on_cpu else None,
        )
        end = attached.engine.end_ids
        make: Any = GenerationConfig  # its constructor has no types
        generation = make(do_sample=False, eos_token_id=list(end), pad_token_id=end[0], max_new_tokens=1)
        try:
            manager = attached.model.init_continuous_batching(
                generation_config=generation, continuous_batching_config=config
            )
            manager.start()
        except BaseException:
            attached.close()
            raise
        self._manager = manager

    def submit(self, request_id: str, guarded: Guarded, **options: Any) -> None:
        """Add a request; a manager that an error has ended is started anew."""
        with self._lock:
            if self._closed:
                raise GuardError("the guard has been detached; attach it again")
            if not self._manager.is_running():
                self.start()
            try:
                self.attached.engine.continuous.submit(request_id, guarded, **options)
            except GuardError:
                self._wait_for_its_end()  # an error is ending it at this moment
                self.start()
                self.attached.engine.continuous.submit(request_id, guarded, **options)

    def _wait_for_its_end(self) -> None:
        deadline = time.monotonic() + _END_SECONDS
        while self._manager.is_running():
            if time.monotonic() > deadline:
                raise GuardError("the model's thread takes no requests, though it runs; restart the server")
            time.sleep(0.01)

    def cancel(self, request_id: str) -> None:
        self.attached.engine.continuous.cancel(request_id)

    def close(self) -> None:
        """Stop the manager and remove the hooks; calling twice is harmless."""
        with self._lock:
            self._closed = True
        self.attached.close()


def _check_policy(guard: Guard) -> None:
    rule = next((rule for rule in guard.policy.rules if rule.action == "steer" and rule.steer.prompt), None)
    if rule is not None:
        raise UnsupportedGenerationError(
            f"rule {rule.label!r} steers prompts, which a server reads but once; leave 'prompt' out of its 'steer'"
        )
