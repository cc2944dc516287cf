"""The compiled form of a decoding step (guard/native.c), where it was built and the processor has what it takes."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from feature_bank.schema import Pooling
from guard.state import BatchState

FloatArray = npt.NDArray[np.float32]
MAX_BATCH = 16  # sequences; from there on one matrix product for all of them is as fast
_REACHED, _NOT_FINITE, _FULL = 1, 2, 3


class _Hook(ctypes.Structure):
    """`sailguard_hook` of native.c: one hook point's rows."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("threshold", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("d_in", ctypes.c_int32),
        ("n", ctypes.c_int32),
    )


class _Plan(ctypes.Structure):
    """`sailguard_plan` of native.c: a bank's rows and heads, and from where on rules count."""

    _fields_ = (
        ("hooks", ctypes.POINTER(_Hook)),
        ("heads", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("lowest", ctypes.c_void_p),
        ("n_hooks", ctypes.c_int32),
        ("n_features", ctypes.c_int32),
        ("n_domains", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("min_tokens", ctypes.c_int32),
        ("level", ctypes.c_int32),
        ("ceiling", ctypes.c_float),
    )


class _Sequences(ctypes.Structure):
    """`sailguard_sequences` of native.c: where the state of a batch lies."""

    _fields_ = (
        ("recent", ctypes.c_void_p),
        ("evidence", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("count", ctypes.c_void_p),
        ("room", ctypes.c_int64),
    )


@cache
def library() -> Any | None:
    """The compiled library with its functions declared; None if it was not built here (no C compiler at the
    installation), the processor is of another kind, or SAILGUARD_NATIVE=0."""
    if os.environ.get("SAILGUARD_NATIVE") == "0":
        return None
    found = find_spec("guard._native")
    if found is None or found.origin is None:
        return None
    loaded = ctypes.CDLL(found.origin)
    loaded.sailguard_level.restype = ctypes.c_int
    loaded.sailguard_step.argtypes = [
        ctypes.POINTER(_Plan),
        ctypes.POINTER(_Sequences),
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_void_p,
    ]
    loaded.sailguard_step.restype = ctypes.c_int
    return loaded if loaded.sailguard_level() else None


class HookRows(NamedTuple):
    """The selected features of one hook point, as the SAE has them: not divided by their scale."""

    W_enc: Float[FloatArray, "d_in n"]
    b_enc: Float[FloatArray, " n"]
    threshold: Float[FloatArray, " n"]
    scale: Float[FloatArray, " n"]


class CompiledStep:
    """The compiled call for the rows and heads of one bank.

    It keeps nothing of what it has seen: threads may share it. Raises ValueError if W_enc is finer than float16, in
    which it is read, RuntimeError if there is no compiled library, or its `level` of instructions is too high.
    """

    def __init__(
        self,
        hooks: Sequence[HookRows],
        heads: Float[FloatArray, "F D"],
        bias: Float[FloatArray, " D"],
        lowest: Float[npt.NDArray[np.float64], " D"],
        *,
        pooling: Pooling,
        level: int | None = None,
    ) -> None:
        found = library()
        best = 0 if found is None else found.sailguard_level()
        level = best if level is None else level
        if found is None or not 0 < level <= best:
            raise RuntimeError(f"no compiled step of level {level} here; the highest is {best}")
        if not all(is_half(rows.W_enc) for rows in hooks):
            raise ValueError("W_enc has values that float16 does not have")
        n_features, n_domains = heads.shape
        self._call = found.sailguard_step
        self._arrays: list[npt.NDArray[Any]] = []  # what the plan points into
        self._hooks = (_Hook * len(hooks))()
        for hook, rows in zip(self._hooks, hooks, strict=True):
            hook.weight = self._address(rows.W_enc.T, np.float16)
            hook.bias = self._address(rows.b_enc, np.float32)
            hook.threshold = self._address(rows.threshold, np.float32)
            hook.scale = self._address(rows.scale, np.float32)
            hook.d_in, hook.n = rows.W_enc.shape
        self._widths = [rows.W_enc.shape[0] for rows in hooks]
        if n_features != sum(hook.n for hook in self._hooks):
            raise ValueError(f"heads over {n_features} features do not fit rows of {[h.n for h in self._hooks]}")
        self._plan = _Plan(
            hooks=self._hooks,
            heads=self._address(heads.T, np.float32),
            bias=self._address(bias, np.float32),
            lowest=self._address(lowest, np.float64),
            n_hooks=len(hooks),
            n_features=n_features,
            n_domains=n_domains,
            window=pooling.window,
            min_tokens=pooling.min_tokens,
            level=level,
            ceiling=pooling.ceiling,
        )
        self._plan_reference = ctypes.byref(self._plan)

    def _address(self, array: npt.NDArray[Any], dtype: type[np.floating[Any]]) -> int:
        self._arrays.append(np.ascontiguousarray(array, dtype=dtype))
        return self._arrays[-1].ctypes.data

    def __call__(
        self,
        state: BatchState,
        sae_ins: Sequence[Float[Tensor, "B 1 d_in"]],
        rows: npt.NDArray[np.int32] | None = None,
    ) -> bool:
        """Take one token of every sequence (of those in `rows`, if given) into the state, up to the logits.

        Returns whether any of them is one that a rule counts. sae_ins: of each hook point, on the CPU, of any floating
        dtype. Raises ValueError for another shape or too many rows, ArithmeticError if a logit is NaN.
        """
        bound = state.compiled
        if not isinstance(bound, _Bound) or bound.evidence is not state.evidence:
            bound = state.compiled = _Bound(state, len(self._hooks), self._plan.n_domains)
        batch, pointers = bound.batch, bound.pointers
        kept = []  # copies must outlive the call
        for i, (x, d_in) in enumerate(zip(sae_ins, self._widths, strict=True)):
            if x.numel() != batch * d_in:
                raise ValueError(f"activations of shape {tuple(x.shape)} where ({batch}, 1, {d_in}) was expected")
            if x.dtype is not torch.float32 or not x.is_contiguous():
                x = x.float().contiguous()
                kept.append(x)
            pointers[i] = x.data_ptr()
        chosen, n_rows = (bound.rows, batch) if rows is None else (rows.ctypes.data, len(rows))
        found = self._call(self._plan_reference, bound.reference, bound.x, chosen, n_rows, bound.scratch)
        if found == _FULL:
            state.make_room()
            return self(state, sae_ins, rows)
        if found == _NOT_FINITE:
            raise ArithmeticError("a logit is NaN")
        return bool(found == _REACHED)


class _Bound:
    """Addresses in the state of one batch, and the arrays that a call needs for it."""

    def __init__(self, state: BatchState, hooks: int, domains: int) -> None:
        self.batch = len(state.request_ids)
        if self.batch > MAX_BATCH:
            raise ValueError(f"a batch of {self.batch} sequences; the compiled step takes {MAX_BATCH} at most")
        self.evidence = state.evidence  # another one after make_room
        sequences = _Sequences(
            recent=state.recent.data_ptr(),
            evidence=state.evidence.ctypes.data,
            logits=state.logits.ctypes.data,
            count=state.count.ctypes.data,
            room=state.logits.shape[1],
        )
        self.reference = ctypes.byref(sequences)
        self.pointers = (ctypes.c_void_p * hooks)()
        self.x = ctypes.addressof(self.pointers)
        self._arrays = np.arange(self.batch, dtype=np.int32), np.empty(self.batch * domains, dtype=np.float32)
        self.rows, self.scratch = (array.ctypes.data for array in self._arrays)


def is_half(array: FloatArray) -> bool:
    """Whether float16 has every value of the array."""
    with np.errstate(over="ignore"):  # what is too large for it becomes infinity, and unequal
        return bool(np.array_equal(array.astype(np.float16), array))
