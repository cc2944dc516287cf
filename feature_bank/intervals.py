"""How far a share that was counted may be from the true one."""

from __future__ import annotations

__all__ = ["wilson"]

_Z = 1.96  # of 95 %


def wilson(count: int, n: int) -> tuple[float, float]:
    """The 95 % interval of the share `count / n`, n at least 1: Wilson's score interval (1927), good for small n."""
    p, z = count / n, _Z
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    margin = z * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5 / (1 + z * z / n)
    return max(0.0, centre - margin), min(1.0, centre + margin)
