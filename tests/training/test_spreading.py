"""Parts have the same results whoever does them, and one that is kept is found for the same work and part alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from scipy import sparse

from feature_bank.errors import DataError
from feature_bank.schema import Predicate, PredicateTerm
from training.columns import TOGETHER, Columns, Parted
from training.spreading import FLOATS, Work, fingerprint, work_off


@dataclass(frozen=True, kw_only=True)
class Adding(Work[Columns, list[float]]):
    """Adds a number to the largest activation of each feature."""

    results = TypeAdapter(list[float])
    number: float
    bad: int = -1

    def do(self, part: Columns) -> list[float]:
        if part.first == self.bad:
            raise DataError(f"the features from {part.first} on cannot be done")
        return [float(value) + self.number for value in part.acts.max(0)]


class Backwards:
    """Does the last part first, and remembers which it was given."""

    def __init__(self) -> None:
        self.given: list[int] = []

    def __call__(self, work: Work[Any, Any], parts: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        for number, part in reversed(list(parts)):
            self.given.append(number)
            yield number, work.do(part)


def features(n: int) -> Parted:
    acts = np.random.default_rng(0).random((50, n)).astype(np.float16)
    return Parted(acts, [("blocks.0.hook_resid_post", i) for i in range(n)])


def test_results_stand_in_order_and_an_interrupted_work_goes_on(tmp_path: Path) -> None:
    parts = features(3 * TOGETHER + 1)
    assert len(parts) == 4
    told: list[tuple[str, int, int, str]] = []
    work = Adding(number=0.1)
    expected = work_off(work, 4, parts.__getitem__, on_part=parts.counted(lambda *r: told.append(r), "add"))
    assert [len(part) for part in expected] == [TOGETHER, TOGETHER, TOGETHER, 1]
    assert told[-1] == ("add", 49, 49, "L0/48")

    with pytest.raises(DataError, match="from 32 on"):
        work_off(Adding(number=0.1, bad=2 * TOGETHER), 4, parts.__getitem__, kept=tmp_path / "other")
    with pytest.raises(ZeroDivisionError):
        work_off(work, 4, parts.__getitem__, kept=tmp_path, on_part=lambda number: 1 // (1 - number))
    backwards = Backwards()
    assert work_off(work, 4, parts.__getitem__, kept=tmp_path, spread=backwards) == expected
    assert backwards.given == [3, 2]
    damaged = min(tmp_path.glob("*.json"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    backwards = Backwards()
    assert work_off(work, 4, parts.__getitem__, kept=tmp_path, spread=backwards) == expected
    assert len(backwards.given) == 1
    assert not [path for path in tmp_path.iterdir() if path.is_file() and path.suffix != ".json"]


def test_what_is_kept_of_another_work_or_other_features_is_not_taken(tmp_path: Path) -> None:
    parts = features(2 * TOGETHER)
    work_off(Adding(number=0.1), 2, parts.__getitem__, kept=tmp_path)
    changed = Parted(parts.acts.copy(), parts.keys)
    changed.acts[7, 3] = 9.0
    for work, given, expected in (
        (Adding(number=0.1), parts, []),
        (Adding(number=0.2), parts, [1, 0]),
        (Adding(number=0.1), changed, [0]),
    ):
        backwards = Backwards()
        work_off(work, 2, given.__getitem__, kept=tmp_path, spread=backwards)
        assert backwards.given == expected


def test_a_fingerprint_tells_values_apart_and_not_where_they_lie() -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    predicate = Predicate(terms=[PredicateTerm(kind="token", text="a", weight=1.0)], bias=0.5)
    values: list[Any] = [
        matrix,
        matrix.reshape(3, 2),
        matrix.astype(np.float16),
        np.zeros((0, 3)),
        np.zeros((3, 0)),
        sparse.csr_matrix(matrix),
        torch.ones(3, dtype=torch.bfloat16),
        torch.ones(3),
        predicate,
        predicate.model_copy(update={"bias": 0.25}),
        ["ab", "c"],
        ["a", "bc"],
        {"a": 1, "b": 2},
        "1",
        1,
        1.0,
        None,
        "\ud800",
    ]
    assert len({fingerprint(value) for value in values}) == len(values)
    assert fingerprint(matrix) == fingerprint(np.asfortranarray(matrix)) == fingerprint(matrix.copy())
    assert fingerprint("a", "b") != fingerprint("ab")
    with pytest.raises(TypeError, match="set"):
        fingerprint({1, 2})


@dataclass(frozen=True, kw_only=True)
class Dividing(Work[int, list[list[float]]]):
    """Gives what is no number."""

    results = TypeAdapter(list[list[float]], config=FLOATS)

    def do(self, part: int) -> list[list[float]]:
        return [[float("nan"), float("inf"), -part / 3]]


def test_what_is_not_finite_is_kept_as_it_is(tmp_path: Path) -> None:
    first = work_off(Dividing(), 1, int, kept=tmp_path)
    again = work_off(Dividing(), 1, int, kept=tmp_path, spread=nobody)
    assert repr(again) == repr(first)


def nobody(work: Work[Any, Any], parts: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    assert list(parts) == []
    yield from ()
