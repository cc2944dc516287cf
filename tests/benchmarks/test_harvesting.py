"""The harvest is timed against the bare model on the same batches, and held-out rows are of other documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from benchmarks import harvesting
from feature_bank.errors import DataError
from training.corpus import Document, split_of


def document(number: int) -> Document:
    name = f"row-{number}"
    return Document(
        id=name,
        text=f"text {number}",
        role="passage",
        domains=frozenset(),
        known=frozenset(),
        source="t",
        licence="t",
        split=split_of(name),
    )


def test_held_out_rows_are_of_other_documents_and_budgets_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from training.corpus import TokenSequence

    def tokenise(documents: list[Document], tokenizer: Any, *, max_tokens: int) -> list[TokenSequence]:
        return [
            TokenSequence(document=index, ids=[int(d.id.split("-")[1])] * 10, positions=np.arange(10))
            for index, d in enumerate(documents)
        ]

    monkeypatch.setattr(harvesting, "tokenise", tokenise)
    documents = [document(number) for number in range(1000)]
    train, held_out = harvesting.sequences_of(documents, None, 5000)
    assert sum(len(s.positions) for s in train) == 5000
    assert sum(len(s.positions) for s in held_out) == 500
    splits = {int(d.id.split("-")[1]): d.split for d in documents}
    assert {splits[s.ids[0]] == "test" for s in train} == {False}
    assert {splits[s.ids[0]] == "test" for s in held_out} == {True}
    assert len({s.document for s in train}) == len(train)


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="jsonl"):
        harvesting.read_text(tmp_path)


class Toy(nn.Module):
    """A base model of four layers."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.Identity() for _ in range(4))
        self.model.norm = nn.LayerNorm(2)

    def forward(self, **batch: Any) -> None:
        pass


def test_a_truncated_model_is_whole_again_afterwards() -> None:
    model = Toy()
    layers, norm = model.model.layers, model.model.norm

    def cut() -> None:
        with harvesting.truncated(model, layers=2) as base:
            assert len(base.layers) == 2  # type: ignore[arg-type]
            assert base.layers[1] is layers[1]  # type: ignore[index]
            raise KeyError

    with pytest.raises(KeyError):
        cut()
    assert model.model.layers is layers
    assert model.model.norm is norm


def test_the_bare_model_runs_over_the_batches_of_the_harvest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = Toy()
    seen: list[dict[str, Any]] = []

    def harvest(model: nn.Module, sequences: Any, hooks: Any, folder: Path, **_: Any) -> None:
        folder.mkdir()
        for batch in ({"input_ids": 1}, {"input_ids": 2}):
            model(**batch)

    monkeypatch.setattr(harvesting, "harvest", harvest)
    bench = harvesting.HarvestBench(model, [], tmp_path / "timed")
    arms = bench.arms()
    assert bench.batches == [{"input_ids": 1}, {"input_ids": 2}]
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    arms["full_with_head"]()
    assert seen == bench.batches
    arms["harvest"]()
    assert len(bench.batches) == 2  # only the first pass was recorded
    assert not (tmp_path / "timed").exists()
