"""Tensors are tiny here: a second thread only waits for the first. A bank that was trained once serves every test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.factories import make_tiny_model
from tests.training.workshop import OTHERS, POLITICS, SECRET, Trained, Workshop, rows, write_taxonomy


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Workshop:
    folder = tmp_path_factory.mktemp("workshop")
    write_taxonomy(folder / "taxonomy")
    labelled, general = folder / "labelled.jsonl", folder / "general.jsonl"
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    words = [*POLITICS, *OTHERS, SECRET]
    generator = np.random.default_rng(1)
    texts = [" ".join(generator.choice(words, 6)) for _ in range(50)]
    general.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Workshop(make_tiny_model(), tiny_tokenizer, folder, [labelled, general])


@pytest.fixture(scope="session")
def trained(workshop: Workshop) -> Trained:
    """A run that nothing interrupted."""
    out, work, reports = workshop.folder / "bank", workshop.folder / "work", []
    bank = workshop.train(out, work, lambda *report: reports.append(report))
    return Trained(bank, out, work, reports)
