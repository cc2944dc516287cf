"""The guard under continuous batching: requests that join and leave while a model generates.

A manager runs the model in a thread of its own over packed passes, rows of several requests side by side. Each request
has a state of its own, so that none can touch another's. What leaves the manager has been judged: a token that no pass
has read yet is held back, and a request is given one token more than was asked for, so that the last one is read too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from guard.engines.batch_manager import Share, Tap, cached_manager, cut, end_next, open_manager, read_shares
from guard.engines.judging import FORBIDDEN, Judging
from guard.engines.observing import keep_prompt, keep_token, show_prompt, show_token
from guard.engines.parts import Part, steer_parts
from guard.engines.requests import Guarded, Request
from guard.errors import GuardError, UnsupportedGenerationError
from guard.events import Verdict
from guard.reports import OrderedReports, count_reports, make_reports

OWN = "own-"
"""How the ids of requests begin that `submit` adds with a listener: nothing of them enters the manager's queue."""


class ContinuousBatching:
    """Guards the one manager that is open on a model.

    The manager's thread calls the three methods of a pass; any thread may add and cancel requests.
    """

    def __init__(self, model: Any, judging: Judging, end: int) -> None:
        self._model = model
        self._judging = judging
        self._end = end
        self._own: dict[str, Guarded] = {}
        self._tap: Tap | None = None
        self._lock = threading.RLock()
        self._clear()

    def _clear(self) -> None:
        self.reports = OrderedReports()
        self.fatal: Exception | None = None
        """Why requests could not be taken or followed; the manager itself does not raise in its caller's thread."""
        self._added = 0
        self._requests: dict[str, Request] = {}
        self._cancelled: set[str] = set()
        self._pass: list[Part] = []
        self._judgings: tuple[Judging, ...] = ()
        """Those of the pass in work: requests may be guarded by different banks and policies."""
        self._hidden: dict[str, Tensor] = {}
        self._judged: list[Judging] = []
        self._to_show: list[Callable[[], None]] = []
        """What the observers of the requests just judged are to be shown."""
        self._seconds = self._started = 0.0

    # ---- the manager -------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether a manager's thread is at work on the model."""
        return self._tap is not None and self._tap.running

    def check_idle(self) -> None:
        """Raise GuardError while a manager is at work: another generation would meet its passes in the hooks."""
        if self.running:
            raise GuardError("continuous batching is running on this model; stop its manager before anything else runs")

    def open(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The guarded manager that `init_continuous_batching(*args, **kwargs)` gives; reports begin anew.

        Raises UnsupportedGenerationError for what cannot be followed, GuardError while a manager is running.
        """
        self.check_idle()
        rules = self._judging.monitor.policy.rules
        on_prompt = next((rule for rule in rules if rule.action == "steer" and rule.steer.prompt), None)
        if on_prompt is not None:
            raise UnsupportedGenerationError(
                f"rule {on_prompt.label!r} steers prompts, which continuous batching reads but once; leave 'prompt' "
                "out of its 'steer'"
            )
        cached = cached_manager(self._model)
        if cached is not None and (self._tap is None or cached is not self._tap.manager):
            raise UnsupportedGenerationError(
                "a persistent continuous batching manager was left on the model before the guard was attached; call "
                "model.destroy_cached_continuous_batching_manager() first"
            )
        manager = open_manager(self._model, original, args, kwargs)
        if self._tap is None or self._tap.manager is not manager:
            self._untap()
            self._tap = Tap(manager, self)
        self._clear()
        return manager

    def close(self) -> None:
        """Stop a manager that is running, so that nothing goes on unguarded, and give it its own methods back."""
        if self._tap is None:
            return
        manager = self._tap.manager
        if self._tap.running:
            manager.stop(hard_stop=True)
        if cached_manager(self._model) is manager:
            self._model.destroy_cached_continuous_batching_manager()
        self._untap()
        with self._lock:  # those that the manager had not come to know
            for request in [request for request in self._requests.values() if request.listener is not None]:
                self._finish(request, error="the guard has been detached")

    def _untap(self) -> None:
        if self._tap is not None:
            self._tap.restore()
            self._tap = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """While this context is open no pass of a manager runs, so that the model can be used otherwise."""
        with ExitStack() as stack:
            if self._tap is not None and self._tap.running:
                try:
                    stack.enter_context(self._tap.manager.pause())
                except RuntimeError:  # it has come to its end meanwhile
                    self.check_idle()
            yield

    # ---- requests that come and go -----------------------------------------------------------------------

    def submit(self, request_id: str, guarded: Guarded, **options: Any) -> None:
        """Add a request that is guarded in its own way to the open manager; options: those of its `add_request`.

        Raises GuardError if no manager takes it.
        """
        if self._tap is None or not self._tap.running:
            raise GuardError("continuous batching is not running on this model")
        with self._lock:
            self._own[request_id] = guarded
        try:
            taken = self._tap.manager.add_request(request_id=request_id, streaming=True, **options)
        finally:
            with self._lock:
                self._own.pop(request_id, None)
        if taken is None:
            raise GuardError("continuous batching takes no more requests: it is stopping")

    def cancel(self, request_id: str) -> None:
        """Call a request off; one that is unknown, or at its end, is let be."""
        with self._lock:
            if self._tap is not None and request_id in self._requests:
                self._tap.manager.cancel_request(request_id)

    def added(self, options: dict[str, Any]) -> dict[str, Any]:
        """Take note of a request. It may generate one token more, so that a pass reads the last that was asked for."""
        with self._lock:
            prompt = [int(token) for token in options["input_ids"]]
            request_id = options.get("request_id")
            if request_id is None:
                request_id = f"request_{self._added}"
            if not prompt or request_id in self._requests:
                reason = "has no tokens; give it a prompt" if not prompt else "is in flight already; give another id"
                self.fatal = GuardError(f"request {request_id!r} {reason}")
                raise self.fatal
            limit, given = options["max_new_tokens"], options["eos_token_id"]
            ends = [given] if isinstance(given, int) else list(given or ())
            ends = [token for token in ends if token >= 0]  # -1 stands for none
            end = ends[0] if ends else self._end
            guarded = self._own.pop(request_id, None) or Guarded(judging=self._judging)
            self._requests[request_id] = Request(
                request_id, guarded, number=self._added, prompt=prompt, limit=limit, ends=ends, end=end
            )
            self._added += 1
            self._cancelled.discard(request_id)
            more = None if limit is None else limit + 1
            return {**options, "input_ids": prompt, "request_id": request_id, "max_new_tokens": more}

    def denied(self, request_id: str) -> None:
        """The manager did not take the request."""
        with self._lock:
            self._requests.pop(request_id, None)

    def cancelled(self, request_id: str) -> None:
        """Report on a request that its owner has called off; what the manager still does with it is let go."""
        with self._lock:
            request = self._requests.get(request_id)
            if request is not None:
                self._cancelled.add(request_id)
                self._finish(request)

    def leaving(self, output: Any) -> bool:
        """Cut an output to the tokens that have been judged. Returns whether it is to leave at all.

        Of a request that was stopped nothing after the deciding token leaves, and no end token either.
        """
        with self._lock:
            request = self._requests.get(output.request_id)
            if request is None:  # called off
                cut(output, 0)
                return bool(output.is_finished()) and not output.request_id.startswith(OWN)
            if output.is_finished():
                cut(output, self._finish(request, output.generated_tokens, output.error))
                return request.listener is None
            n = len(request.answer)
            may_show = n >= request.judging.monitor.hold_tokens and not request.blocked
            news = n > request.shown and may_show
            if request.listener is not None:
                if request.listener.advance(request.answer, request.begin().verdicts[0], may_show):
                    self.cancel(request.request_id)
                return False
            cut(output, n)
            request.shown = n if news else request.shown
            return news

    def _finish(self, request: Request, tokens: Sequence[int] | None = None, error: str | None = None) -> int:
        """Report on a request and forget it. Returns how many of its tokens may leave.

        tokens: its whole answer, as the manager has it; error: why that could not go on with it.
        """
        answer, state, judging = request.answer, request.begin(), request.judging
        tokens = answer if tokens is None else tokens
        kept = min(len(answer), len(tokens))
        ended = len(tokens) == kept + 1 and tokens[kept] in request.ends and not request.blocked
        try:
            if list(tokens[:kept]) != answer[:kept]:
                raise GuardError(f"request {request.request_id}: the tokens handed out are not those that were judged")
            state.generated[0] = sum(token not in judging.special for token in answer)
            for _, verdict in judging.monitor.finish(state):
                judging.metrics.count_verdict(verdict)
            if state.generated != state.observed and not state.failed[0]:
                raise GuardError(f"{state.generated[0]} tokens were generated but {state.observed[0]} were observed")
        except Exception as e:  # noqa: BLE001  # whatever it is, the policy says what follows from it
            self._fail(e, [request])
            kept, ended = (0, False) if request.blocked else (kept, ended)
        del self._requests[request.request_id]
        (report,) = reports = make_reports(judging.monitor, state)
        if len(request.ids) >= len(request.prompt) or state.failed[0]:  # else it left before anything was judged
            count_reports(judging.metrics, reports, failed=state.failed[0])
        if request.listener is None:
            self.reports.put(request.number, report)
        else:
            request.listener.end(answer[:kept], ended, report, error)
        within = request.limit is None or kept < request.limit
        return kept + 1 if ended and within else kept

    # ---- a pass ------------------------------------------------------------------------------------------

    def owns(self, kwargs: dict[str, Any]) -> bool:
        """Whether a packed pass is one of the open manager's."""
        return self._tap is not None and self._tap.owns(kwargs)

    def begin_pass(self, kwargs: dict[str, Any]) -> None:
        """Map the rows of a packed pass to their requests.

        Raises UnsupportedGenerationError if they cannot be mapped, or if tokens before them were never read; that ends
        the manager, and every request fails.
        """
        assert self._tap is not None
        self._hidden.clear()
        self._judged, self._to_show, self._seconds, self._pass, self._judgings = [], [], 0.0, [], ()
        self._started = time.perf_counter()
        with self._lock:
            try:
                shares = read_shares(self._tap.manager, kwargs)
                self._cancelled &= {share.request_id for share in shares}
                for share in shares:
                    request = self._requests.get(share.request_id)
                    if request is not None:
                        request.begin()
                        self._pass.append(Part(request, share, request.unread(share.position, share.ids)))
                    elif share.request_id not in self._cancelled:
                        raise UnsupportedGenerationError(
                            f"request {share.request_id} was not added through the manager's add_request"
                        )
                self._judgings = tuple(dict.fromkeys(part.request.judging for part in self._pass))
            except Exception as e:
                self.fatal = e
                self._fail(e, self._begun())
                raise

    def at_hook(self, name: str, hidden: Float[Tensor, "1 T d_in"]) -> Tensor | None:
        """Steer the requests that are to be steered, and judge each at the last hook point of its bank."""
        started = time.perf_counter()
        self._hidden[name] = hidden
        steered: Tensor | None = None
        with self._lock:
            for judging in self._judgings:
                parts = [part for part in self._pass if part.request.judging is judging]
                try:
                    steered = steer_parts(name, hidden, parts, steered)
                    if name == judging.last_hook:
                        self._judge(judging, parts)
                except Exception as e:  # noqa: BLE001  # whatever it is, the policy says what follows from it
                    self._fail(e, [part.request for part in parts])
                if name == judging.last_hook:
                    self._judged.append(judging)  # or the failure to do so has been dealt with
            self._seconds += time.perf_counter() - started
            for show in self._to_show:  # not part of what the guard costs
                show()
            self._to_show.clear()
        return steered

    def after_pass(self, output: Any) -> None:
        """Choose the tokens of requests that have a sampler, and leave those that are to be stopped only their end."""
        with self._lock:
            for judging in self._judgings:
                if judging not in self._judged:
                    error = GuardError(f"the hook at {judging.last_hook} did not fire: a forward pass was not judged")
                    self._fail(error, [part.request for part in self._pass if part.request.judging is judging])
            for request, share, again in self._pass:
                request.ids += share.ids[again:]
                if share.logits_row is not None:
                    self._choose(request, share, output.logits[0, share.logits_row])
            self._pass, self._judgings = [], ()
        self._hidden.clear()
        self._judging.metrics.observe_step(self._seconds)
        self._judging.metrics.observe_pass(time.perf_counter() - self._started)

    def _choose(self, request: Request, share: Share, logits: Float[Tensor, " vocab"]) -> None:
        """Leave a request the one token that its sampler chooses, or its end if it is to be stopped."""
        token: int | None = None
        if request.sampler is not None and not request.blocked:
            try:
                token = request.sampler.next_token(logits)
            except Exception as e:  # noqa: BLE001  # logits that are no numbers, say
                self._fail(e, [request])
        if request.blocked:
            token = request.end
            end_next(share.record)
        if token is not None:
            logits.fill_(FORBIDDEN)
            logits[token] = 0.0

    def _judge(self, judging: Judging, parts: Sequence[Part]) -> None:
        seen = {name: self._hidden[name] for name in judging.hook_names if name in self._hidden}
        if len(seen) != len(judging.hook_names):
            raise GuardError(f"hooks did not fire: {sorted(set(judging.hook_names) - set(seen))}")
        answering: list[tuple[Request, int, int]] = []
        for request, share, again in parts:
            first, stop = share.start + again, share.start + len(share.ids)
            if first == stop:
                continue
            if len(request.ids) >= len(request.prompt):
                if share.ids[again] not in judging.special:
                    answering.append((request, first, share.ids[again]))
                elif request.observer is not None:
                    self._to_show.append(partial(show_token, request, share.ids[again], observed=False))
                continue
            whole = request.prompt_part({name: hidden[0, first:stop] for name, hidden in seen.items()})
            if whole is not None:
                self._act(request, judging.judge_prompt(request.begin(), 0, request.prompt, whole))
                if request.observer is not None:
                    self._to_show.append(partial(show_prompt, request, whole))
                if request.keeper is not None:
                    self._to_show.append(partial(keep_prompt, request, whole))
        if answering:
            monitor = judging.monitor
            rows = torch.tensor([row for _, row, _ in answering], device=monitor.device)
            states = [request.begin() for request, _, _ in answering]
            found = monitor.observe_each(states, {name: x[0, rows] for name, x in seen.items()})
            for (request, _, token), verdicts in zip(answering, found, strict=True):
                self._act(request, verdicts)
                if request.observer is not None:
                    self._to_show.append(partial(show_token, request, token, observed=True))
                if request.keeper is not None:
                    self._to_show.append(partial(keep_token, request))

    def _act(self, request: Request, verdicts: Sequence[Verdict]) -> None:
        for verdict in verdicts:
            request.judging.metrics.count_verdict(verdict)
        after = max(len(request.ids) + 1, len(request.prompt))  # the position after the token that was judged
        request.act(verdicts, after)

    def _begun(self) -> list[Request]:
        return [request for request in self._requests.values() if request.state is not None]

    def _fail(self, error: Exception, requests: Sequence[Request]) -> None:
        """An internal error while `requests` were read: by default every request in flight is stopped with them."""
        if any(request.judging.monitor.policy.on_error == "block" for request in requests):
            requests = [*requests, *(request for request in self._begun() if request not in requests)]
        for judging in dict.fromkeys(request.judging for request in requests) or [self._judging]:
            judging.fail(error, [request.begin() for request in requests if request.judging is judging])
