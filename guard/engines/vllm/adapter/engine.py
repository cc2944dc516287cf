"""The process that configures an engine: it puts the guard in."""

from __future__ import annotations

import os
from typing import Any

import torch

from feature_bank.identity import check_identity
from guard.engines.vllm import config as settings
from guard.engines.vllm.adapter.client import watch_clients
from guard.engines.vllm.adapter.identity import identity_of, model_of
from guard.engines.vllm.adapter.versions import check_version
from guard.engines.vllm.frontend import attach
from guard.errors import GuardError
from guard.monitor import Monitor

_WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": f"{__package__}.cpu_worker.GuardedCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": f"{__package__}.gpu_worker.GuardedGPUWorker",
}


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
    parallel.worker_cls = _WORKERS[parallel.worker_cls]
    scheduler.scheduler_cls = f"{__package__}.scheduler.GuardedScheduler"
    if not isinstance(vllm_config.additional_config, dict):
        raise GuardError("the guard does not follow vLLM with an additional_config that is not a dictionary")
    # every process compares this with what it has read itself; compiled graphs are kept by it too
    vllm_config.additional_config["sailguard"] = identity_of(guard)
    watch_clients(attach(guard))


class _Described:
    """A model of which only the configuration is known."""

    def __init__(self, config: Any) -> None:
        self.config = config
