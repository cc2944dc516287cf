"""What rank 0 of a worker makes of the activations: which token of which request they are of, judged exactly once.

The scheduler cuts sequences into passes as it likes: prompts in chunks, prompts whose beginning lies in the cache,
requests that were preempted and are read again from the start. A token is judged when it is read for the first time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from guard.engines.judging import Judging
from guard.engines.vllm.programs import Batch, RuleKey
from guard.errors import GuardError
from guard.events import Verdict
from guard.native import MAX_BATCH
from guard.reports import make_report
from guard.state import BatchState

logger = logging.getLogger(__name__)
_FIRST_ROWS = 8


class Lane:
    """The requests under one policy: they share a state, a row each."""

    def __init__(self, judging: Judging) -> None:
        self.judging = judging
        self.monitor = judging.monitor
        self.state: BatchState = self.monitor.begin([""] * _FIRST_ROWS)
        self._free = list(range(_FIRST_ROWS))
        self.hold = self.monitor.hold_tokens
        self._inputs: dict[str, Tensor] = {}  # of the compiled call; filled through NumPy, which asks less of so little

    def join(self, request_id: str) -> int:
        """A row for a request, as new."""
        if not self._free:
            rows = len(self.state.request_ids)
            self.state.add_rows(self.monitor.begin([""] * rows))
            self._free = list(range(rows, 2 * rows))
        row = self._free.pop()
        self.state.renew(row, request_id)
        return row

    def leave(self, row: int) -> None:
        """Take the row back."""
        self._free.append(row)

    @property
    def compiled(self) -> bool:
        """Whether a decoding step of its requests is one compiled call."""
        return self.monitor.compiled and len(self.state.request_ids) <= MAX_BATCH

    def step(
        self, rows: Sequence[int], seen: Mapping[str, Float[Tensor, "n d_in"]]
    ) -> tuple[list[tuple[int, Verdict]], Float[Tensor, "n F"]]:
        """Judge one token of the answers in `rows` by the compiled call. Returns what fired, and the activations."""
        batch = len(self.state.request_ids)
        live = np.zeros(batch, dtype=np.bool_)
        live[rows] = True
        for name, x in seen.items():
            if name not in self._inputs or len(self._inputs[name]) != batch:
                self._inputs[name] = torch.zeros(batch, 1, x.shape[1])
            self._inputs[name].numpy()[rows, 0] = x.float().numpy()
        fired = self.monitor.observe_hidden(self.state, self._inputs, live)
        slots = (self.state.count[rows] - 1) % self.monitor.streaming_heads.pooling.window
        return fired, torch.from_numpy(self.state.recent.numpy()[rows, slots])


@dataclass(kw_only=True)
class Sampling:
    """What ends a request's answer."""

    ends: frozenset[int]
    limit: int
    """Tokens sampled, among them the one that is read by nobody, after which it ends."""


class _Request:
    """One request: what of it has been read, and what is in force."""

    def __init__(self, request_id: str, lane: Lane, tenant: str, prompt: Sequence[int], sampling: Sampling) -> None:
        self.request_id = request_id
        self.lane = lane
        self.tenant = tenant
        self.prompt = list(prompt)
        self.sampling = sampling
        self.row = lane.join(request_id)
        self.read = 0
        """Positions that forward passes have read, from the first of the prompt on."""
        self.sampled: list[int] = []
        self.chunks: list[Tensor] = []
        self.in_force: set[str] = set()
        self.report: dict[str, Any] | None = None

    @property
    def judged(self) -> int:
        """Tokens of the answer that have been judged, special ones passed over."""
        return self.read - len(self.prompt)

    @property
    def blocked(self) -> bool:
        return self.lane.state.blocked[self.row]


@dataclass
class News:
    """What a step brought, for the scheduler. Plain values: it crosses processes."""

    release: dict[str, int] = field(default_factory=dict)
    """Of requests in the step, how many tokens of the answer may leave."""
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of requests that have ended, or are to end because a rule blocks, their final reports."""
    verdicts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Of requests that rules fired on in this step, all their verdicts so far."""
    blocked: list[str] = field(default_factory=list)
    unjudged_blocks: list[int] = field(default_factory=list)
    """Blocks of the engine's cache whose tokens were computed but not judged."""
    unknown: list[str] = field(default_factory=list)
    """Requests that ended before any pass read them: no report comes of them."""
    steer: dict[str, tuple[int, list[RuleKey]]] = field(default_factory=dict)
    """Of requests whose steering changes: from which position on, and which rules are in force from there."""
    errors: dict[str, int] = field(default_factory=dict)
    """Internal errors, by what the policy made of them."""
    seconds: float = 0.0
    """What the guard spent on the step on this rank, the taps in the graph left out."""


class _Answer(NamedTuple):
    request: _Request
    row: int


class Watch:
    """Judges the requests of an engine. `cache` keeps the activations of what the engine's prefix cache keeps."""

    def __init__(self, lanes: Mapping[str, Judging], cache: ActsCache | None = None) -> None:
        self.caches = cache is not None
        self._lanes = {tenant: Lane(judging) for tenant, judging in lanes.items()}
        self._requests: dict[str, _Request] = {}
        self._encoder = next(iter(lanes.values())).monitor.encoder
        self._cache = cache
        self._news = News()
        self._kept = False  # whether the cache has what the pass in work showed
        self.read_tokens = 0
        """Rows of forward passes that belonged to a request."""

    def take_news(self) -> News:
        """What has happened since the last call."""
        news, self._news = self._news, News()
        return news

    # ---- requests that come and go -----------------------------------------------------------------------

    def join(self, request_id: str, tenant: str, prompt: Sequence[int], sampling: Sampling) -> None:
        """A request has been scheduled for the first time."""
        self._requests[request_id] = _Request(request_id, self._lanes[tenant], tenant, prompt, sampling)

    def sampled(self, request_ids: Sequence[str], tokens: Sequence[Sequence[int]]) -> None:
        """The tokens that this step chose; requests that end with them get their reports."""
        started = time.perf_counter()
        for request_id, new in zip(request_ids, tokens, strict=True):
            request = self._requests.get(request_id)
            if request is None or not new:
                continue
            request.sampled += new
            ended = new[-1] in request.sampling.ends or len(request.sampled) >= request.sampling.limit
            if ended and request.report is None:
                self._finish(request)
        self._news.seconds += time.perf_counter() - started

    def leave(self, request_ids: Iterable[str]) -> None:
        """The scheduler has ended these requests, or they were called off."""
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is None:
                self._news.unknown.append(request_id)
                continue
            if request.report is None:
                self._finish(request)
            request.lane.leave(request.row)
            del self._requests[request_id]

    def fail(self, error: Exception, request_ids: Iterable[str]) -> None:
        """An internal error while these requests were read: each one's policy says what follows."""
        counted = set()
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is None:
                continue
            on_error = request.lane.monitor.policy.on_error
            counted.add(on_error)
            request.lane.state.failed[request.row] = True
            if on_error == "block":
                self._block(request)
        for on_error in counted:
            self._news.errors[on_error] = self._news.errors.get(on_error, 0) + 1
        logger.error("guard failed (%s: %s), on_error=%s", type(error).__name__, error, sorted(counted), exc_info=error)

    # ---- a pass ------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def observe(self, batch: Batch, seen: Mapping[str, Float[Tensor, "T d_in"]], slots: Slots | None = None) -> None:
        """Judge what a forward pass has read for the first time.

        slots: where the cache keeps the tokens of the requests in the pass, if there is one.
        """
        started = time.perf_counter()
        try:
            self._observe(batch, seen, slots)
        except Exception as e:  # noqa: BLE001  # whatever it is, the policies say what follows from it
            self.missed(e, batch, slots if not self._kept else None)
        for request_id in batch.request_ids:
            request = self._requests.get(request_id)
            if request is not None:
                held = request.lane.state.count[request.row] < request.lane.hold  # special tokens are no evidence
                self._news.release[request_id] = 0 if held else max(request.judged, 0)
        self._news.seconds += time.perf_counter() - started

    def missed(self, error: Exception, batch: Batch, slots: Slots | None) -> None:
        """A pass was not judged. slots: of its tokens, if what they showed has not been kept either."""
        if self._cache is not None and slots is not None:
            self._cache.forget(slots.rows)
            self._news.unjudged_blocks += np.unique(slots.rows // slots.block_size).tolist()
        self.fail(error, batch.request_ids)

    def _observe(self, batch: Batch, seen: Mapping[str, Float[Tensor, "T d_in"]], slots: Slots | None) -> None:
        self._kept = False
        if self._decode(batch, seen, slots):
            return
        acts = self._encoder.encode(seen)
        if self._cache is not None and slots is not None:
            self._cache.write(slots.rows, acts)
            self._kept = True
        fresh: list[tuple[slice, bool] | None] = []
        for i, request_id in enumerate(batch.request_ids):
            request = self._requests.get(request_id)
            if request is None:
                raise GuardError(f"request {request_id} is in a forward pass but was never scheduled")
            try:
                fresh.append(self._advance(request, i, batch, slots))
            except GuardError as e:  # the others of the pass are judged as ever
                self.fail(e, [request_id])
                request.read = max(request.read, int(batch.first[i] + batch.edges[i + 1] - batch.edges[i]))
                fresh.append(None)
        answers: dict[int, list[_Answer]] = {}
        for i, new in enumerate(fresh):
            request = self._requests[batch.request_ids[i]]
            if new is None or request.blocked:
                continue
            if request.report is not None:
                raise GuardError(f"request {request.request_id} goes on after the token that was to end it")
            rows, in_prompt = new
            if in_prompt:
                try:
                    self._take_prompt(request, acts[rows])
                except GuardError as e:
                    self.fail(e, [request.request_id])
            elif int(batch.ids[rows.start]) not in request.lane.judging.special:
                answers.setdefault(id(request.lane), []).append(_Answer(request, rows.start))
        for group in answers.values():
            self._judge_answers(group, acts)

    def _decode(self, batch: Batch, seen: Mapping[str, Float[Tensor, "T d_in"]], slots: Slots | None) -> bool:
        """The usual pass, in which every request reads the last token of its answer: one compiled call, where there is
        one. Returns whether it was such a pass."""
        requests = [self._requests[name] for name in batch.request_ids if name in self._requests]
        lane = requests[0].lane if len(requests) == len(batch.request_ids) == len(batch.ids) else None
        if lane is None or not lane.compiled:
            return False
        for request, first, token in zip(requests, batch.first.tolist(), batch.ids.tolist(), strict=True):
            usual = request.lane is lane and request.read == first >= len(request.prompt) and request.report is None
            if not usual or token in lane.judging.special:
                return False
        for request in requests:
            request.read += 1
        self.read_tokens += len(requests)
        fired, acts = lane.step([request.row for request in requests], seen)
        if self._cache is not None and slots is not None:
            self._cache.write(slots.rows, acts)
            self._kept = True
        self._act_on(lane, requests, fired)
        return True

    def _advance(self, request: _Request, i: int, batch: Batch, slots: Slots | None) -> tuple[slice, bool] | None:
        """Take note of what a pass reads of one request. Returns the rows that are read for the first time and whether
        they are of its prompt; None if there are none."""
        start, stop, first = int(batch.edges[i]), int(batch.edges[i + 1]), int(batch.first[i])
        self.read_tokens += stop - start
        width = len(request.prompt)
        if first > request.read:
            if self._cache is None or slots is None or first >= width:
                raise GuardError(
                    f"request {request.request_id}: the tokens from {request.read} to {first - 1} came from a cache "
                    "and were not computed, so they cannot be judged"
                )
            request.chunks.append(self._cache.read(slots.of(i, request.read, first)).to(self._encoder.scale.device))
            request.read = first
        fresh = start + request.read - first
        if fresh >= stop:
            return None
        in_prompt = request.read < width
        request.read = first + stop - start
        if request.read > width if in_prompt else stop - fresh > 1:
            raise GuardError(
                f"request {request.request_id}: several tokens of the answer came in one pass; the guard judges one at "
                "a time"
            )
        return slice(fresh, stop), in_prompt

    def _take_prompt(self, request: _Request, acts: Float[Tensor, "n F"]) -> None:
        request.chunks.append(acts)
        if request.read < len(request.prompt):
            request.chunks[-1] = acts.clone()  # the pass's own tensor is dropped
            return
        whole, request.chunks = torch.cat(request.chunks), []
        if len(whole) != len(request.prompt):
            raise GuardError(f"request {request.request_id}: a part of its prompt was not seen, so it cannot be judged")
        lane = request.lane
        self._act(request, lane.judging.judge_prompt_acts(lane.state, request.row, request.prompt, whole))

    def _judge_answers(self, group: Sequence[_Answer], acts: Float[Tensor, "T F"]) -> None:
        lane = group[0].request.lane
        rows = np.array([answer.request.row for answer in group])
        at = [answer.row for answer in group]
        chosen = acts if at == list(range(len(acts))) else acts[torch.tensor(at, device=acts.device)]
        fired = lane.monitor.observe_rows(lane.state, rows, chosen)
        self._act_on(lane, [answer.request for answer in group], fired)

    def _act_on(self, lane: Lane, requests: Sequence[_Request], fired: Sequence[tuple[int, Verdict]]) -> None:
        if fired or lane.state.released:
            for request in requests:
                self._act(request, [verdict for row, verdict in fired if row == request.row])
            lane.state.released.clear()

    def _act(self, request: _Request, verdicts: Sequence[Verdict]) -> None:
        """Put into force, and let go, what the last token decided."""
        released = {label for row, label in request.lane.state.released if row == request.row}
        in_force = request.in_force - released | {v.rule for v in verdicts if v.action == "steer"}
        if verdicts:
            told = [verdict.to_dict() for verdict in request.lane.state.verdicts[request.row]]
            self._news.verdicts[request.request_id] = told
        if in_force != request.in_force:
            request.in_force = in_force
            keys = [(request.tenant, label) for label in sorted(in_force)]
            self._news.steer[request.request_id] = (max(request.read, len(request.prompt)), keys)
        if request.blocked:
            self._block(request)

    def _block(self, request: _Request) -> None:
        request.lane.state.blocked[request.row] = True
        if request.report is None or request.report["action"] != "block":
            self._finish(request)

    def _finish(self, request: _Request) -> None:
        """Write the final report: of an answer of which all tokens but the last have been read, or that is stopped."""
        lane, row = request.lane, request.row
        state = lane.state
        stopped = state.blocked[row]
        answer = request.sampled[: max(request.judged, 0)] if stopped else request.sampled[:-1]
        state.generated[row] = sum(token not in lane.judging.special for token in answer)
        request.report = {"action": "block"}  # so that a failure below ends here
        try:
            if not stopped:
                lane.monitor.finish(state, [row])
            if state.generated[row] != state.observed[row] and not state.failed[row]:
                raise GuardError(f"{state.generated[row]} tokens were generated but {state.observed[row]} observed")
        except Exception as e:  # noqa: BLE001  # whatever it is, the policy says what follows from it
            self.fail(e, [request.request_id])
        request.report = {
            "action": (report := make_report(lane.monitor, state, row)).action,
            "report": report.to_dict(),
            "failed": state.failed[row],
            "refusal": lane.monitor.policy.refusal if state.blocked[row] else "",
            "policy": lane.monitor.policy.version,
        }
        self._news.reports[request.request_id] = request.report
        if state.blocked[row]:
            self._news.blocked.append(request.request_id)


class Slots(NamedTuple):
    """Where the engine's cache keeps tokens: a token's slot is its block's number times the block's size and its place
    in the block."""

    rows: npt.NDArray[np.int64]
    """(T,): the slot of every row of a pass."""
    tables: Any
    """(n, most blocks): of each request in the pass, its blocks in order."""
    block_size: int

    def of(self, i: int, first: int, stop: int) -> npt.NDArray[np.int64]:
        """The slots of the positions from `first` to `stop` - 1 of the pass's i-th request."""
        positions = np.arange(first, stop)
        blocks = np.asarray(self.tables[i])[positions // self.block_size].astype(np.int64)
        found: npt.NDArray[np.int64] = blocks * self.block_size + positions % self.block_size
        return found


class ActsCache:
    """The feature activations of every token in the engine's key-value cache, slot for slot.

    A prompt whose beginning another request has cached is not computed again; what was read there is judged again, to
    the bit. Whatever overwrites a slot of the one overwrites it in the other. Lies in host memory, whose pages are
    taken as they are first used.
    """

    def __init__(self, slots: int, features: int) -> None:
        self._acts = np.empty((slots, features), dtype=np.float32)
        self._known = np.zeros(slots, dtype=np.bool_)

    def write(self, slots: npt.NDArray[np.int64], acts: Float[Tensor, "n F"]) -> None:
        """Keep the activations of the tokens in these slots."""
        self._acts[slots] = acts.cpu().numpy()
        self._known[slots] = True

    def forget(self, slots: npt.NDArray[np.int64]) -> None:
        """What the tokens in these slots showed is not known."""
        self._known[slots] = False

    def read(self, slots: npt.NDArray[np.int64]) -> Float[Tensor, "n F"]:
        """The activations of the tokens in these slots. Raises GuardError if those of one are not known."""
        if not self._known[slots].all():
            raise GuardError("a part of the prompt came from a cache and was not judged when it was computed")
        return torch.from_numpy(self._acts[slots])
