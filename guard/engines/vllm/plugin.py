"""What vLLM loads: the entry point of its general plugins.

vLLM logs a plugin that cannot be loaded and goes on without it; `guard.engines.vllm.required` is what makes sure of it.
"""

from __future__ import annotations

from guard.engines.vllm.config import wanted

installed = False
"""Whether vLLM has called `register` in this process, with a guard asked for."""


def register() -> None:
    """Called by vLLM in each of its processes. Does nothing unless the environment asks for a guard."""
    global installed
    if wanted():
        from guard.engines.vllm.adapter import install

        install()
        installed = True
