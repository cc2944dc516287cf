"""Many independent parts of one piece of work: done here one after the other, or by whoever else is given them.

A part is the same wherever it is done, so that a result does not depend on who did it. What is finished can be kept in
a folder, from which work that was interrupted goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from scipy import sparse

from feature_bank.atomic import atomic_file

P = TypeVar("P")
R = TypeVar("R")
FLOATS = ConfigDict(ser_json_inf_nan="constants")
"""With which an adapter writes NaN and infinity as such, and not as null."""


class Work(ABC, Generic[P, R]):
    """What is done to each part, with what all parts share. It can be pickled, and a copy gives the same results."""

    results: ClassVar[TypeAdapter[Any]]
    """A result as JSON and back, without loss; floats want the configuration `FLOATS`."""
    device: str = "cpu"
    """The type of device that it computes on."""
    threads: int = 1
    """With which a part is to be done, if its results depend on them."""

    @abstractmethod
    def do(self, part: P) -> R:
        """The result of a part. Raises SailguardError for what would go wrong anywhere."""

    def do_alike(self, part: P) -> R:
        """The result of a part, the same to the bit on a machine with more processors."""
        from threadpoolctl import threadpool_limits

        # Sums are added in another order by more threads; small products are as fast with one
        with threadpool_limits(1, user_api="blas") if self.threads == 1 else nullcontext():
            return self.do(part)

    def on(self, device: str) -> Self:  # noqa: ARG002  # most compute on CPUs alone
        """The same work on a type of device."""
        return self

    def marks(self) -> Iterable[Any]:
        """What results depend on beside the part, for `fingerprint`."""
        return [getattr(self, field.name) for field in dataclasses.fields(self)]  # type: ignore[arg-type]


class Spread(Protocol):
    """Does parts, in whatever order, and gives the number and the result of each."""

    def __call__(self, work: Work[P, R], parts: Iterable[tuple[int, P]]) -> Iterator[tuple[int, R]]:
        """Do all of `parts`, numbered."""
        ...


def here(work: Work[P, R], parts: Iterable[tuple[int, P]]) -> Iterator[tuple[int, R]]:
    """In this process, one after the other."""
    for number, part in parts:
        yield number, work.do_alike(part)


def work_off(
    work: Work[P, R],
    count: int,
    make: Callable[[int], P],
    *,
    spread: Spread = here,
    kept: Path | None = None,
    on_part: Callable[[int], None] | None = None,
) -> list[R]:
    """The results of all parts, in their order.

    count, make: how many parts there are, and what makes one, called once for each. kept: the folder where the result
    of each part is written as soon as it is there, and found by the next call with the same work and part; None keeps
    none. on_part: is told the number of each part whose result is there.
    """
    found: dict[int, R] = {}
    paths: dict[int, Path] = {}

    def have(number: int, result: R) -> None:
        found[number] = result
        if on_part is not None:
            on_part(number)

    def missing() -> Iterator[tuple[int, P]]:
        shared = fingerprint(type(work).__name__, *work.marks()) if kept is not None else ""
        for number in range(count):
            part = make(number)
            if kept is not None:
                paths[number] = kept / f"{fingerprint(shared, part)}.json"
                result = _load(paths[number], work)
                if result is not None:
                    have(number, result)
                    continue
            yield number, part

    for number, result in spread(work, missing()):
        if kept is not None:
            with atomic_file(paths[number]) as file:
                file.write_bytes(work.results.dump_json(result))
        have(number, result)
    return [found[number] for number in range(count)]


def fingerprint(*values: Any) -> str:
    """SHA-256 of arrays, texts, numbers and what is made of them: sequences, mappings, dataclasses and models."""
    digest = hashlib.sha256()
    for value in values:
        _feed(digest.update, value)
    return digest.hexdigest()


def _feed(update: Callable[[Any], None], value: Any) -> None:
    update(f"<{type(value).__name__}>".encode())
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        _feed(update, value.view(torch.uint8).numpy() if value.dtype == torch.bfloat16 else value.numpy())
    elif isinstance(value, np.ndarray):
        update(f"{value.dtype} {value.shape}".encode())
        update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    elif sparse.issparse(value):
        _feed(update, [value.shape, value.data, value.indices, value.indptr])
    elif isinstance(value, BaseModel):
        _feed(update, value.model_dump_json())
    elif dataclasses.is_dataclass(value):
        _feed(update, [getattr(value, field.name) for field in dataclasses.fields(value)])
    elif isinstance(value, Mapping):
        _feed(update, list(value.items()))
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        update(str(len(value)).encode())
        for item in value:
            _feed(update, item)
    elif isinstance(value, str | bytes | int | float | None):
        text = repr(value)
        update(f"{len(text)}:{text}".encode("utf-8", "backslashreplace"))
    else:
        raise TypeError(f"a fingerprint of {type(value).__name__} is not known")


def _load(path: Path, work: Work[Any, R]) -> R | None:
    """What is kept in a file, or None if there is none, or a damaged one: then it is made again."""
    try:
        result: R = work.results.validate_json(path.read_bytes())
    except (OSError, ValidationError, ValueError):
        return None
    return result
