"""vLLM's worker for a CPU, guarded. Can be imported where vLLM is installed for one."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from guard.engines.vllm.adapter.worker import GuardedWorker


class GuardedCPUWorker(GuardedWorker, CPUWorker):  # type: ignore[misc]
    """The worker that an engine's configuration names."""
