"""vLLM as far as the guard leans on it. All that it relies on, and all of vLLM's own names, stand in this package.

Public options carry the guard into vLLM's processes: `worker_cls` and `scheduler_cls` name the classes in `cpu_worker`,
`gpu_worker` and `scheduler`, and `additional_config` keeps compiled graphs with the guard apart from those without. Not
public, and so bound to the versions in SUPPORTED, is what stands under "relies on" at each place.
"""

from guard.engines.vllm.adapter.engine import install
from guard.engines.vllm.adapter.identity import model_of
from guard.engines.vllm.adapter.versions import SUPPORTED, check_version

__all__ = ["SUPPORTED", "check_version", "install", "model_of"]
