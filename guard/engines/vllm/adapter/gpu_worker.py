"""vLLM's worker for a GPU, guarded. Can be imported where vLLM is installed for one."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from guard.engines.vllm.adapter.worker import GuardedWorker


class GuardedGPUWorker(GuardedWorker, Worker):  # type: ignore[misc]
    """The worker that an engine's configuration names."""
