"""Taps in a model's graph: what hooks cannot be where the model is compiled, or replayed from a captured graph.

A tap is one operation at a hook point. It writes the activation to a buffer that lies in one place for good, and adds
what steers the rows that are to be steered. Python is not asked again which rows these are: it writes them to tensors
before the pass. Without branches, host reads or shapes that depend on data, a graph replays it as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from guard.engines.vllm.programs import Programs
from guard.hook_points import parse_hook_name, resolve

_TAPS: list[Tap] = []  # the operation names a tap by its number, for a graph holds no Python object
_LIBRARY = torch.library.Library("sailguard", "DEF")  # type: ignore[no-untyped-call]


class Tap:
    """One hook point: the buffer that shows its last activations, and what steers them."""

    def __init__(self, name: str, capacity: int, d_in: int, like: Tensor, programs: Programs | None) -> None:
        self.name = name
        self.seen: Float[Tensor, "capacity d_in"] = torch.zeros(capacity, d_in, dtype=like.dtype, device=like.device)
        """The residual stream's true sum, or the module's output, before steering. Rows beyond those of the last pass
        hold what earlier passes left; rows beyond its real tokens hold what padding gave."""
        self.passes = torch.zeros((), dtype=torch.int64, device=like.device)
        """Forward passes that have come through, counted in the graph."""
        self._programs = programs
        self.number = len(_TAPS)
        _TAPS.append(self)

    def __call__(self, hidden: Float[Tensor, "n d_in"], residual: Float[Tensor, "n d_in"] | None) -> None:
        """Show the activation, and steer it by changing `hidden`."""
        seen = self.seen[: hidden.shape[0]]
        if residual is None:
            seen.copy_(hidden)
        else:
            torch.add(hidden, residual, out=seen)
        self.passes += 1
        if self._programs is not None:
            self._programs.steer(self.name, hidden, seen)


def _tap(hidden: Tensor, residual: Tensor | None, number: int) -> None:
    _TAPS[number](hidden, residual)


_LIBRARY.define("tap(Tensor(a!) hidden, Tensor? residual, int number) -> ()")  # type: ignore[no-untyped-call]
_LIBRARY.impl("tap", _tap, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("sailguard::tap", lambda *_: None, lib=_LIBRARY)


def place_taps(model: nn.Module, hook_names: Sequence[str], capacity: int, programs: Programs | None) -> dict[str, Tap]:
    """Put a tap at every hook point of a model whose layers carry `(hidden, residual)` apart, before it is compiled.

    capacity: the most rows of a forward pass, padding included. The layers get a class of their own, so that other
    models of the process stay as they are. Raises GuardError for an architecture or layer that is not known.
    """
    weight = next(model.parameters())
    taps: dict[str, Tap] = {}
    for name in hook_names:
        target = resolve(model, name)
        d_in = int(model.config.hidden_size)  # type: ignore[union-attr,arg-type]
        tap = taps[name] = Tap(name, capacity, d_in, weight, programs)
        site = parse_hook_name(name).site
        target.module.__class__ = _tapped(type(target.module), tap.number, site)
    return taps


def _tapped(base: type[nn.Module], number: int, site: str) -> type[nn.Module]:
    """`base` with a tap before or after its forward pass."""

    def before(
        self: Any, positions: Tensor, hidden_states: Tensor, residual: Tensor | None, *more: Any, **kw: Any
    ) -> Any:
        torch.ops.sailguard.tap(hidden_states, residual, number)
        return base.forward(self, positions, hidden_states, residual, *more, **kw)

    def after(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = base.forward(self, *args, **kwargs)
        hidden, residual = (output, None) if isinstance(output, Tensor) else output
        torch.ops.sailguard.tap(hidden, residual, number)
        return output

    forward = before if site == "resid_pre" else after
    return type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})
