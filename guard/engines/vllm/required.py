"""`--worker-extension-cls guard.engines.vllm.required.Guarded`: the engine does not come up without the guard.

vLLM logs a plugin that cannot be loaded and goes on without it. This module it loads in every worker, where an error is
fatal, and after the plugins.
"""

from __future__ import annotations

from typing import Any

from guard.engines.vllm import plugin
from guard.engines.vllm.config import BANK, POLICY, TENANTS, wanted
from guard.errors import GuardError


class Guarded:
    """Mixed into the worker."""

    def sailguard(self) -> dict[str, Any]:
        """What guards this worker, for `collective_rpc`."""
        worker: Any = self
        return dict(worker.describe_guard())


if not wanted():
    raise GuardError(f"the engine is to be guarded, but none of {BANK}, {POLICY} and {TENANTS} is set")
if not plugin.installed:
    raise GuardError(
        "the engine is to be guarded, but vLLM has not loaded the plugin 'sailguard': if VLLM_PLUGINS is set, name it "
        "there; else see vLLM's log of why it could not be loaded"
    )
