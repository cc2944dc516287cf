"""What the guard does in the scheduler's process. Can be imported where vLLM is installed."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import RequestStatus

from guard.engines.vllm.adapter.identity import model_of, same_guard
from guard.engines.vllm.adapter.params import end_tokens, own_args
from guard.engines.vllm.ledger import Ledger, Shapes
from guard.engines.vllm.programs import RuleKey
from guard.engines.vllm.watch import News
from guard.errors import GuardError

logger = logging.getLogger(__name__)


class GuardedScheduler(Scheduler):  # type: ignore[misc]
    """Holds outputs back until they are judged, ends what is blocked, and carries steering to all ranks.

    Relies on: `schedule`, `update_from_output`, `add_request` and `finish_requests` as in SchedulerInterface;
    beyond it on `Scheduler.requests`, `Request.max_tokens` and `Request.skip_reading_prefix_cache`, and on
    `evict_blocks`, and `delay_cache_blocks` of `allocate_slots`, of the cache manager. And on `EngineCoreOutput` being
    a msgspec structure whose `kv_transfer_params` is a dictionary that reaches the client's process as it is; no
    connector uses it here.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._guard = same_guard(self.vllm_config)
        self._special = frozenset(model_of(self.vllm_config.model_config)[1].all_special_ids)
        self._ledger = Ledger(Shapes(_final, _note, _blocked, _gone))
        self._orders: dict[str, tuple[int, list[RuleKey]]] = {}
        self._steered: set[str] = set()
        self._allocate = self.kv_cache_manager.allocate_slots
        self.kv_cache_manager.allocate_slots = self._allocate_slots

    def _allocate_slots(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """What is computed under steering is nobody else's: it does not enter the prefix cache."""
        if request.request_id in self._steered:
            kwargs["delay_cache_blocks"] = True
        return self._allocate(request, *args, **kwargs)

    def add_request(self, request: Any) -> None:
        """From here on its outputs are held back until they are judged."""
        params = request.sampling_params
        if request.request_id not in self.requests and params is not None:
            request.max_tokens += 1  # so that a pass reads the last token that was asked for
            # a word that a client has named as an end is text like any other
            silent = end_tokens(params) & (self._special | {params.eos_token_id})
            self._ledger.add(request.request_id, request.client_index, silent)
            try:
                steered = bool(self._guard.options(own_args(params)).steer)
            except GuardError:  # it has come past the checks of the client's process
                logger.exception("request %s runs under the default policy", request.request_id)
                params.extra_args = {k: v for k, v in params.extra_args.items() if k not in own_args(params)}
                steered = False
            if steered:
                self._keep_apart(request)
        super().add_request(request)

    def _keep_apart(self, request: Any) -> None:
        self._steered.add(request.request_id)
        request.skip_reading_prefix_cache = True

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """The step that comes next, with what it steers."""
        output = super().schedule(*args, **kwargs)
        self._steered -= output.finished_req_ids
        output.sailguard, self._orders = self._orders, {}
        return output

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        """Requests that their clients have given up are reported too."""
        finished = super().finish_requests(request_ids, finished_status)
        for request in finished:
            if finished_status == RequestStatus.FINISHED_ABORTED:
                self._ledger.gone(request.request_id)
        return finished

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """What of the step is judged goes to the clients, and what is blocked ends.

        Raises GuardError for a step of a worker that is not guarded.
        """
        news = getattr(model_runner_output, "sailguard", None)
        if news is None:
            if scheduler_output.total_num_scheduled_tokens:
                raise GuardError("a step came back without the guard's news: the worker is not guarded")
            news = News()
        result = super().update_from_output(scheduler_output, model_runner_output)
        for request_id, order in news.steer.items():
            if request_id in self.requests:
                self._orders[request_id] = order
                self._keep_apart(self.requests[request_id])
        if news.unjudged_blocks:  # what was cached while the guard failed could never be judged
            self.kv_cache_manager.evict_blocks(set(news.unjudged_blocks))
        if news.blocked:
            super().finish_requests(news.blocked, RequestStatus.FINISHED_STOPPED)
        settled = self._ledger.settle({client: eco.outputs for client, eco in result.items()}, news)
        for client, eco in result.items():
            eco.outputs = settled.pop(client, [])
        for client, outputs in settled.items():
            result[client] = EngineCoreOutputs(outputs=outputs)
        return result


def _final(last: Any, unread: bool, payload: Any) -> Any:
    more: dict[str, Any] = {"kv_transfer_params": dict(payload)}
    if unread:
        more |= {"new_token_ids": last.new_token_ids[:-1], "new_logprobs": None, "new_sampling_mask": None}
        more |= {"stop_reason": None}
    return msgspec.structs.replace(last, **more)


def _blocked(request_id: str, first: Any, payload: Any) -> Any:
    if first is None:
        first = EngineCoreOutput(request_id=request_id, new_token_ids=[])
    return msgspec.structs.replace(
        first,
        new_token_ids=[],
        new_logprobs=None,
        new_sampling_mask=None,
        finish_reason=FinishReason.STOP,
        stop_reason="content_filter",
        kv_transfer_params=dict(payload),
    )


def _gone(request_id: str, payload: Any) -> Any:
    return EngineCoreOutput(
        request_id=request_id,
        new_token_ids=[],
        finish_reason=FinishReason.ABORT,
        kv_transfer_params=dict(payload),
    )


def _note(output: Any, payload: Any) -> Any:
    return msgspec.structs.replace(output, kv_transfer_params=dict(payload))
