"""The client's process: it refuses what cannot be judged, and shows what the guard found."""

from __future__ import annotations

from typing import Any

from guard.engines.vllm.adapter.params import own_args
from guard.engines.vllm.frontend import Frontend
from guard.engines.vllm.ledger import PAYLOAD
from guard.errors import GuardError


def watch_clients(frontend: Frontend) -> None:
    """Refuse requests that cannot be judged, and put what the guard found on the outputs of all others.

    Relies on: `InputProcessor.process_inputs` taking in every request and its error becoming the client's;
    `OutputProcessor.process_outputs` getting every output of the engine first; and `RequestState` making a
    `CompletionOutput` of each in `_new_completion_output`, knowing its request by `request_id`, `external_req_id`,
    `request_index` and `output_kind`.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine import FinishReason
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    process_inputs, process_outputs = (
        getattr(method, "sailguard", method)
        for method in (InputProcessor.process_inputs, OutputProcessor.process_outputs)
    )
    new_output = getattr(RequestState._new_completion_output, "sailguard", RequestState._new_completion_output)

    def checked(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(params, SamplingParams):
            raise VLLMValidationError("the guard judges requests that generate; this one does not")
        try:
            frontend.guard.options(own_args(params))
        except GuardError as e:
            raise VLLMValidationError(str(e), parameter="vllm_xargs") from None
        request = process_inputs(self, request_id, prompt, params, *args, **kwargs)
        if request.prompt_token_ids is None or request.prompt_embeds is not None or request.mm_features:
            raise VLLMValidationError(
                "the guard judges text: embeddings, images and sounds cannot be told what they say"
            )
        if request.resumable:
            raise VLLMValidationError("the guard does not follow requests whose prompt goes on while they are answered")
        return request

    def received(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        for output in engine_core_outputs:
            payload = (output.kv_transfer_params or {}).get(PAYLOAD)
            if payload is not None:
                frontend.arrived(output.request_id, payload)
                output.kv_transfer_params = None
            elif output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.REPETITION):
                raise GuardError("an answer has come without the guard's report: an engine runs unguarded")
        try:
            return process_outputs(self, engine_core_outputs, *args, **kwargs)
        finally:
            frontend.forget(o.request_id for o in engine_core_outputs if o.finish_reason is not None)

    def completed(self: Any, token_ids: Any, finish_reason: Any, stop_reason: Any) -> Any:
        output = new_output(self, token_ids, finish_reason, stop_reason)
        output.sailguard = None
        if finish_reason is not None:
            found = frontend.finished(self.request_id, self.external_req_id, self.request_index)
            output.sailguard = found.report
            if found.report.action == "block":
                output.finish_reason, output.stop_reason = "content_filter", None
                # what was shown already is the client's; an answer that is handed over whole is the refusal alone
                if self.output_kind == RequestOutputKind.DELTA:
                    output.text += found.refusal
                else:
                    output.text, output.token_ids, output.cumulative_logprob = found.refusal, [], None
                    output.logprobs = None if output.logprobs is None else output.logprobs[:0]
                    output.sampling_mask = output.routed_experts = None
        return output

    for owner, ours, original in (
        (InputProcessor, checked, process_inputs),
        (OutputProcessor, received, process_outputs),
        (RequestState, completed, new_output),
    ):
        setattr(ours, "sailguard", original)  # noqa: B010  # functions have no such attribute to mypy
        setattr(owner, original.__name__, ours)
    _refuse_beams()


def _refuse_beams() -> None:
    """Refuse beam search: its tokens are picked from the candidates of many requests of one token each, and would be
    read as prompts alone.

    Relies on: both mixins' `beam_search` being the one way to it.
    """
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.exceptions import VLLMValidationError

    def beam_search(*_: Any, **__: Any) -> Any:
        raise VLLMValidationError("the guard does not follow beam search; leave out use_beam_search")

    BeamSearchOfflineMixin.beam_search = BeamSearchOnlineMixin.beam_search = beam_search
