"""What the guard does on each worker: taps, the mapping of rows to requests, and news for the scheduler."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from guard.canary import check_acts
from guard.engines.judging import Judging
from guard.engines.vllm import config as settings
from guard.engines.vllm.adapter.canary_step import canary_step
from guard.engines.vllm.adapter.identity import model_of, same_guard
from guard.engines.vllm.adapter.params import end_tokens, own_args
from guard.engines.vllm.programs import Batch, Programs, RuleKey
from guard.engines.vllm.taps import place_taps
from guard.engines.vllm.watch import ActsCache, Sampling, Slots, Watch
from guard.errors import CanaryError, GuardError, PolicyError
from guard.metrics import Metrics
from guard.monitor import Monitor


class GuardedWorker:
    """What both workers do beyond vLLM's own: taps, the mapping of rows to requests, and news for the scheduler.

    Relies on: `load_model` coming before anything is compiled; `execute_model` and `sample_tokens` being called in turn
    with every step, on every rank; `compile_or_warm_up_model` being the last call before the engine is ready; and
    attributes that are added to `SchedulerOutput` and `ModelRunnerOutput` travelling with them between processes.
    """

    model_runner: Any
    vllm_config: Any

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Place the taps as soon as there is a model. Raises GuardError for what the guard cannot follow."""
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        from vllm.distributed.parallel_state import get_tp_group

        runner = self.model_runner
        if type(runner).__module__ not in ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.cpu_model_runner"):
            raise GuardError(f"the guard does not follow the model runner {type(runner).__module__}")
        guard = same_guard(self.vllm_config)
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
        """Begin to watch, with the canary. Raises CanaryError if it fails: the engine does not come up."""
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
        """Refused with a GuardError."""
        raise GuardError("the bank was made for the weights that are loaded; restart the engine to change them")

    update_weights = start_weight_update = reload_weights

    def execute_model(self, scheduler_output: Any) -> Any:
        """A step, up to the logits; with the guard's news where nothing is left to sample."""
        self._take_orders(scheduler_output)
        output = super().execute_model(scheduler_output)  # type: ignore[misc]
        return output if output is None else self._with_news(output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """The step's tokens; the pass that led to them is observed."""
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
