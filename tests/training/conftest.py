"""Tensors are tiny here: a second thread only waits for the first. A bank that was trained once serves every test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.workshop import OTHERS, POLITICS, SECRET, Trained, Workshop, rows, write_taxonomy


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Workshop:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=260,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=2,
            )
        )
    folder = tmp_path_factory.mktemp("workshop")
    write_taxonomy(folder / "taxonomy")
    labelled, general = folder / "labelled.jsonl", folder / "general.jsonl"
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    words = [*POLITICS, *OTHERS, SECRET]
    generator = np.random.default_rng(1)
    texts = [" ".join(generator.choice(words, 6)) for _ in range(50)]
    general.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Workshop(model.eval().requires_grad_(False), tiny_tokenizer, folder, [labelled, general])


@pytest.fixture(scope="session")
def trained(workshop: Workshop) -> Trained:
    """A run that nothing interrupted."""
    out, work, reports = workshop.folder / "bank", workshop.folder / "work", []
    bank = workshop.train(out, work, lambda *report: reports.append(report))
    return Trained(bank, out, work, reports)
