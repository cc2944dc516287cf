"""The guard on a Hugging Face model: hooks, the mapping of rows to sequences, and what a blocked row may
still emit.

The hooks do the work whoever calls the model: `model.generate`, the loop in `guard.session`, or a plain
forward pass. A forward pass with an empty cache begins a batch of sequences (their prompts); one token a row
with that cache continues it. The packed passes of continuous batching are handed to `guard.engines.continuous`.
Whatever else a pass may mean is refused.
"""

from __future__ import annotations

import copy
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from guard.capture import Capture, StopForwardError
from guard.engines.continuous import ContinuousBatching
from guard.engines.generate_options import bind_options, end_ids, refuse_unsupported
from guard.engines.judging import FORBIDDEN, Judging
from guard.errors import GuardError, UnsupportedGenerationError
from guard.events import SequenceReport, Verdict
from guard.hook_points import execution_order
from guard.metrics import Metrics
from guard.monitor import Monitor
from guard.reports import count_reports, make_reports
from guard.state import BatchState
from guard.steering import Steering

_REPLACED = ("generate", "generate_batch", "init_continuous_batching")
METRICS_EVERY = 32  # passes: a histogram's locks and buckets cost a decoding step more than their reading is worth


class TransformersEngine:
    """Hooks on one model. `close()` removes every trace of them."""

    def __init__(self, model: Any, tokenizer: Any, monitor: Monitor, metrics: Metrics) -> None:
        if "generate" in vars(model):
            raise GuardError("a guard is already attached to this model; detach it first")
        self.model = model
        self.tokenizer = tokenizer
        self.monitor = monitor
        self.metrics = metrics
        self.judging = Judging(monitor, tokenizer, metrics)
        self.errors = self.judging.errors
        self.state: BatchState | None = None
        self.reports: list[SequenceReport] = []
        self.pending_ids: tuple[str, ...] = ()
        self.end_ids = end_ids(model, tokenizer, {})
        self._special = self.judging.special
        self._expect_ends(self.end_ids)
        self._hooks = monitor.encoder.hook_names
        self._last_hook = max(self._hooks, key=execution_order)
        self._hidden: dict[str, Tensor] = {}
        self._input_ids: Tensor | None = None
        self._mask: Tensor | None = None
        self._begins = False
        self._judged = False
        self._prompt_width = 0
        self._cache: Any = None
        self._cached = 0  # tokens a row that the cache holds after the pass in work
        self._padded: Tensor | None = None  # the attention mask of the last pass
        self._paused = False
        self._stop_after_judging = False
        self._steering: Steering | None = None
        self._reading_again: Tensor | None = None  # where a prompt that is read once more is steered
        self._seconds = 0.0
        self._step_seconds: list[float] = []
        self._packed = False  # whether the pass in work is one of continuous batching
        self.continuous = ContinuousBatching(model, self.judging, self.end_ids[0])
        self._captures = {self._hooks: Capture(model, self._hooks, self._at_hook)}
        self._outer = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True),
        ]
        self._original_generate: Callable[..., Any] = model.generate
        self._original_open: Callable[..., Any] = model.init_continuous_batching
        self._original_batch: Callable[..., Any] = model.generate_batch
        for name, method in zip(_REPLACED, (self._generate, self._generate_batch, self._open_batching), strict=True):
            setattr(model, name, method)

    def close(self) -> None:
        """Remove the hooks and restore the model's methods. Continuous batching that is running is stopped first."""
        self.continuous.close()
        for capture in self._captures.values():
            capture.close()
        for handle in self._outer:
            handle.remove()
        for name in _REPLACED:
            vars(self.model).pop(name, None)
        self.drop()

    def watch(self, hook_names: Sequence[str]) -> None:
        """See further hook points too, for requests of continuous batching that another bank guards."""
        known = {name for names in self._captures for name in names}
        more = tuple(name for name in hook_names if name not in known)
        if more:
            with self.continuous.held():
                self._captures[more] = Capture(self.model, more, self._at_hook)

    # ---- forward passes ----------------------------------------------------------------------------------

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While this context is open, forward passes are not judged (the guard's own scoring passes); continuous
        batching waits."""
        with self.continuous.held():
            self._paused = True
            try:
                yield
            finally:
                self._paused = False

    def _before_forward(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        packed = self.continuous.owns(kwargs)
        if not packed and not self._paused:
            self.continuous.check_idle()
        self._packed = packed
        if packed:
            self.continuous.begin_pass(kwargs)
        elif not self._paused and self._reading_again is None:
            self._begin_pass(args, kwargs)

    def _begin_pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise UnsupportedGenerationError("the guard needs input_ids; inputs_embeds cannot be mapped to tokens")
        if kwargs.get("cu_seq_lens_q") is not None:
            raise UnsupportedGenerationError(
                "several sequences are packed into one row (cu_seq_lens_q), and not by a manager that was made while "
                "the guard was attached; the guard needs a row for each"
            )
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise UnsupportedGenerationError("the guard needs a 2-D attention_mask to tell padding from text")
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        self._begins = past == 0
        self._judged = False
        self._hidden.clear()
        self._seconds = 0.0
        if self._begins:
            self._begin(ids)
            self._cache = cache
        else:
            self._check_continues(ids, cache, past)
        self._cached = past + int(ids.shape[1])
        self._input_ids = ids
        self._padded = mask
        self._mask = mask[:, -ids.shape[1] :].bool() if self._begins and mask is not None else None

    def _begin(self, ids: Tensor) -> None:
        self._prompt_width = int(ids.shape[1])
        pending, self.pending_ids = self.pending_ids, ()
        if len(pending) != ids.shape[0]:
            pending = tuple(uuid.uuid4().hex for _ in range(ids.shape[0]))
        self.state = self.monitor.begin(pending)
        self._steering = None

    def _check_continues(self, ids: Tensor, cache: Any, past: int) -> None:
        """Raise unless the pass adds one token to each of the sequences whose prompts were judged."""
        state = self.state
        known = state is not None and cache is self._cache and past == self._cached
        if not known or state is None or len(state.request_ids) != ids.shape[0]:
            raise UnsupportedGenerationError(
                "this forward pass continues past_key_values whose tokens the guard has not seen, each once "
                "and in order; start from the whole prompt"
            )
        if ids.shape[1] != 1:
            raise UnsupportedGenerationError(
                f"{ids.shape[1]} tokens a row came in one pass after the prompt; the guard judges one at a time"
            )

    def _at_hook(self, name: str, hidden: Tensor) -> Tensor | None:
        if self._packed:
            return self.continuous.at_hook(name, hidden)
        if self._paused or self.state is None or name not in self._hooks:
            return None
        if self._reading_again is not None:
            assert self._steering is not None
            return self._steering.apply(name, hidden, self._reading_again)
        self._hidden[name] = hidden
        steered: Tensor | None = None
        try:
            if self._steering is not None and not self._begins:
                steered = self._steering.apply(name, hidden)
            if name == self._last_hook:
                started = time.perf_counter()
                self._judge(self.state)
                self._seconds += time.perf_counter() - started
        except Exception as e:  # noqa: BLE001  # whatever it is, the policy says what follows from it
            self._failed(e)
        if name == self._last_hook:
            self._judged = True  # or the failure to do so has been dealt with
            self._hidden.clear()
            self._step_seconds.append(self._seconds)
            if len(self._step_seconds) == METRICS_EVERY:
                self._publish_steps()
            if self._stop_after_judging:
                raise StopForwardError
        return steered

    def _publish_steps(self) -> None:
        for seconds in self._step_seconds:
            self.metrics.observe_step(seconds)
        self._step_seconds.clear()

    def _after_forward(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output, where it is another one than the model's."""
        if self._packed:
            self._packed = False
            self.continuous.after_pass(output)
            return None
        state = self.state
        if self._paused or state is None or self._reading_again is not None:
            return None
        if not self._judged:
            self._failed(GuardError(f"the hook at {self._last_hook} did not fire: a forward pass was not judged"))
        if self._cache is None:  # the model has made it in this pass
            self._cache = getattr(output, "past_key_values", None)
        if self._begins and self._steering is not None and self._steering.on_prompt:
            output = self._read_again(self._steering, args, kwargs)
        if any(state.blocked):
            rows = [row for row, blocked in enumerate(state.blocked) if blocked]
            logits = output.logits if hasattr(output, "logits") else output[0]
            logits[rows, -1, :] = FORBIDDEN
            logits[rows, -1, self._ends[0]] = 0.0
        return output

    def _read_again(self, steering: Steering, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The prompts' pass once more, those steered whose rules ask for it; the others come out as before."""
        assert self._input_ids is not None
        if kwargs.get("past_key_values") is not None:
            self._empty_cache()
        rows = torch.zeros(len(self._input_ids), dtype=torch.bool, device=self._input_ids.device)
        rows[list(steering.on_prompt)] = True
        valid = torch.ones_like(self._input_ids, dtype=torch.bool) if self._mask is None else self._mask
        self._reading_again = valid & rows[:, None]
        try:
            output = self.model(*args, **kwargs)
        finally:
            self._reading_again = None
        self._cache = getattr(output, "past_key_values", self._cache)
        return output

    def _empty_cache(self) -> None:
        with suppress(RuntimeError):  # a sliding window that has moved on
            self._cache.crop(-int(self._cache.get_seq_length()))
        if self._cache.get_seq_length():
            raise UnsupportedGenerationError(
                f"this {type(self._cache).__name__} cannot be emptied, so that the prompt could be read once more, "
                "steered; leave 'prompt' out of the rule's 'steer'"
            )

    # ---- judging -----------------------------------------------------------------------------------------

    def _judge(self, state: BatchState) -> None:
        if torch.is_grad_enabled():
            with torch.no_grad():
                self._judge(state)
            return
        assert self._input_ids is not None
        if len(self._hidden) != len(self._hooks):
            raise GuardError(f"hooks did not fire: {sorted(set(self._hooks) - set(self._hidden))}")
        if self._begins:
            self._judge_prompts(state)
            return
        live = self._live(state, [token for (token,) in self._input_ids.tolist()])
        fired = self.monitor.observe_hidden(state, self._hidden, live)
        self._act(fired)

    def _live(self, state: BatchState, ids: Sequence[int]) -> npt.NDArray[np.bool_] | None:
        """Which rows hold a token to judge (not padding after the end, not a special token); None if all do."""
        if self._unjudged.isdisjoint(ids) and True not in state.ended:
            return None
        for row, token in enumerate(ids):
            if token in self._ends:
                state.ended[row] = True
        live = [not ended and token not in self._special for ended, token in zip(state.ended, ids, strict=True)]
        return None if all(live) else np.array(live)

    def _expect_ends(self, ids: tuple[int, ...]) -> None:
        """The tokens that end a sequence of the generation in work."""
        self._ends = ids
        self._unjudged = self._special.union(ids)

    def _judge_prompts(self, state: BatchState) -> None:
        assert self._input_ids is not None
        for row in range(self._input_ids.shape[0]):
            ids = self._input_ids[row]
            valid = torch.ones_like(ids, dtype=torch.bool) if self._mask is None else self._mask[row]
            hidden = {name: x[row] for name, x in self._hidden.items()}
            where = valid.nonzero().flatten()
            verdicts = self.judging.judge_prompt(state, row, ids[valid].tolist(), hidden, where)
            self._act([(row, verdict) for verdict in verdicts])

    def _act(self, fired: Sequence[tuple[int, Verdict]]) -> None:
        """Let go of what was released, and put steering into force. A block needs nothing here: `_after_forward`
        leaves the row only its end."""
        assert self.state is not None
        if self.state.released:
            for row, label in self.state.released:
                if self._steering is not None:
                    self._steering.release(row, self.judging.bound[label])
            self.state.released.clear()
        for row, verdict in fired:
            self.metrics.count_verdict(verdict)
            if verdict.action == "steer":
                if self._steering is None:
                    batch = len(self.state.request_ids)
                    self._steering = Steering(self.monitor.bank, self.monitor.encoder, batch)
                self._steering.steer(row, self.judging.bound[verdict.rule])

    def _failed(self, error: Exception) -> None:
        """An internal error: counted, logged, and by default every sequence of the batch is stopped."""
        self.judging.fail(error, [] if self.state is None else [self.state])

    # ---- generate ----------------------------------------------------------------------------------------

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        from transformers import StoppingCriteriaList

        options = bind_options(self._original_generate, args, kwargs)
        refuse_unsupported(self.model, options)
        given = options.pop("stopping_criteria", None) or []
        criteria = StoppingCriteriaList([*given, self._stopping_criterion()])
        self.start()
        self._expect_ends(end_ids(self.model, self.tokenizer, options))
        try:
            output = self._original_generate(**options, stopping_criteria=criteria)
            if isinstance(output, Tensor):
                self.finish(output[:, self._prompt_width :])
            else:  # its cache is the caller's: the last token is read into a copy
                if self._cache is not None:
                    self._cache = copy.deepcopy(self._cache)
                self.finish(output.sequences[:, self._prompt_width :])
            return output
        finally:
            self._expect_ends(self.end_ids)
            self.drop()

    def _open_batching(self, *args: Any, **kwargs: Any) -> Any:
        if self._paused:
            return self._original_open(*args, **kwargs)
        manager = self.continuous.open(self._original_open, args, kwargs)
        self.start()
        self.reports = self.continuous.reports
        return manager

    def _generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        results = self._original_batch(*args, **kwargs)
        if (
            self.continuous.fatal is not None and not self._paused
        ):  # it has been logged and turned into failed requests on the way
            raise self.continuous.fatal
        return results

    def _stopping_criterion(self) -> Any:
        from transformers import StoppingCriteria

        engine = self

        class Blocked(StoppingCriteria):
            def __call__(self, input_ids: Tensor, *_: Any, **_kwargs: Any) -> Tensor:
                blocked = engine.state.blocked if engine.state is not None else [False] * input_ids.shape[0]
                return torch.tensor(blocked, device=input_ids.device)

        return Blocked()

    def start(self, request_ids: tuple[str, ...] = ()) -> None:
        """Forget the last generation's reports and errors; the next prompts get the given ids.

        Raises GuardError while continuous batching is running.
        """
        self.continuous.check_idle()
        self.drop()
        self.errors.clear()
        self.reports = []
        self.pending_ids = request_ids

    @torch.inference_mode()
    def finish(self, generated: Tensor) -> None:
        """Judge the last tokens, which no forward pass has read, prove coverage, and write the reports.

        generated: (B, n) the generated ids, finished rows padded after their end token.
        """
        state = self.state
        if state is None:
            raise GuardError("no forward pass of this generation came through the model's hooks")
        for row, ids in enumerate(generated.tolist()):
            ended = next((i for i, token in enumerate(ids) if token in self._ends), len(ids))
            state.generated[row] = sum(token not in self._special for token in ids[:ended])
        if any(g > o for g, o in zip(state.generated, state.observed, strict=True)) and not any(state.failed):
            self._read_last(generated[:, -1:].to(self.monitor.device))
        for row, verdict in self.monitor.finish(state):
            self._act([(row, verdict)])
        for generated_here, observed in zip(state.generated, state.observed, strict=True):
            if generated_here != observed and not any(state.failed):
                self._failed(GuardError(f"{generated_here} tokens were generated but {observed} were observed"))
        self.reports = make_reports(self.monitor, state)
        count_reports(self.metrics, self.reports, failed=any(state.failed))

    def _read_last(self, last: Tensor) -> None:
        """Run the model over the last token of each row, up to the last hook point."""
        extra: dict[str, Any] = {}
        if self._padded is not None:
            mask = torch.cat([self._padded, self._padded.new_ones(last.shape[0], 1)], dim=1)
            extra = {"attention_mask": mask, "position_ids": mask.long().cumsum(1)[:, -1:] - 1}
        self._stop_after_judging = True
        try:
            with suppress(StopForwardError):
                self.model(input_ids=last, past_key_values=self._cache, use_cache=True, **extra)
        finally:
            self._stop_after_judging = False

    def drop(self) -> None:
        """Forget the sequences."""
        self._publish_steps()
        self.state = None
        self._steering = None
        self._hidden.clear()
        self._input_ids = self._mask = self._padded = self._cache = None
