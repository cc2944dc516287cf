"""The benchmark of streaming: spans stand where it says, delays are counted from their first token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import ablation, decision_tables, streaming
from benchmarks.rows import Rows
from guard.monitor import Monitor
from guard.policy import Policy
from tests.factories import make_bank
from training.corpus import Document

HARMLESS = " ".join(["a small bird sings in the rain"] * 20)


def document(name: str, text: str, source: str, *domains: str) -> Document:
    return Document(
        id=name,
        text=text,
        role="response",
        domains=frozenset(domains),
        known=frozenset({"violence", "terror"}),
        source=source,
        licence="MIT",
        split="test",
    )


@pytest.fixture
def rows() -> Rows:
    evaluated = [document(f"b{i}", HARMLESS, "dolly") for i in range(4)]
    evaluated += [
        document("v", "he hit the wall", "catqa", "violence"),
        document("o", "a blow", "sailguard", "violence"),
    ]
    return Rows(fit=[], evaluated=evaluated, is_own=np.array([False] * 5 + [True]), records=[])


def test_a_span_begins_where_the_stream_says(rows: Rows, tiny_tokenizer: Any) -> None:
    streams = streaming.build_streams(rows, tiny_tokenizer, 0)
    spans = [s for s in streams if s.start is not None]
    assert [(s.domain, s.part) for s in spans] == [("violence", "dev"), ("violence", "own")]
    for stream, text in zip(spans, ("he hit the wall", "a blow"), strict=True):
        span = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
        assert stream.start is not None
        assert stream.ids[stream.start : stream.start + len(span)] == span
        assert stream.start >= streaming.BEFORE[0]
    assert streams == streaming.build_streams(rows, tiny_tokenizer, 0)
    assert streams != streaming.build_streams(rows, tiny_tokenizer, 1)
    assert sum(s.part == "harmless" for s in streams) == 4


def test_what_always_fires_is_an_early_alarm_and_is_found_in_harmless_text(
    rows: Rows, tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    bank = make_bank(tmp_path / "bank", tiny_model, tiny_tokenizer, fires={"violence": True, "terror": False})
    policy = Policy.model_validate(
        {"rules": [{"domain": d, "threshold": {"probability": 0.5}, "action": "flag"} for d in ("violence", "terror")]}
    )
    monitor = Monitor(bank, policy, torch.device("cpu"))
    streams = streaming.build_streams(rows, tiny_tokenizer, 0)
    flagged = list(streaming.flagged_at(monitor, tiny_model, streams, frozenset()))
    summary = streaming.summarise(streams, flagged)
    assert summary["violence"]["dev"] == {"spans": 1, "detected": 0, "early": 1, "in_time": 0, "tokens": None}
    assert summary["violence"]["harmless"] == {"streams": 4, "flagged": 4}
    assert summary["terror"]["harmless"]["flagged"] == 0
    figures = streaming.figures_of(summary)
    assert figures["dev_detected"].value == 0
    assert figures["harmless_violence"].value == 1


def test_delays_are_counted_from_the_spans_first_token() -> None:
    streams = [streaming.Stream("terror", "dev", [], [0] * 90, start) for start in (50, 50, 50, 50)]
    summary = streaming.summarise(streams, [{"terror": 50}, {"terror": 65}, {"terror": 66}, {"politics": 51}])
    about = summary["terror"]["dev"]
    assert (about["spans"], about["detected"], about["in_time"], about["early"]) == (4, 3, 2, 0)
    assert about["tokens"] == [8.5, 16.0, 16.5]


def test_short_spans_are_counted_by_themselves_and_among_all() -> None:
    streams = [streaming.Stream("terror", part, [], [0] * 90, 50, n) for part in ("dev", "own") for n in (8, 32, 33)]
    summary = streaming.summarise(streams, [{"terror": 52}] * 6)
    spans = {part: summary["terror"][part]["spans"] for part in streaming.PARTS}
    assert spans == {"dev": 3, "own": 3, "dev_short": 2, "own_short": 2}


def test_variants_change_one_thing_each(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> None:
    bank = make_bank(tmp_path / "bank", tiny_model, tiny_tokenizer, fires={"violence": None})
    found = list(ablation.variants(bank))
    assert len({(v.group, v.name) for v in found}) == len(found)
    for variant in found:
        changed = [variant.allowed is not None, variant.window is not None, variant.evidence_tokens is not None]
        assert sum(changed) == (variant.group != "bank")
    layers = [v.allowed for v in found if v.group == "layers"]
    assert layers[-1] == layers[0] | layers[1]  # type: ignore[operator]  # sets


def test_the_tables_of_a_result_without_a_domain_show_dashes() -> None:
    assert decision_tables._auroc({"terror": {"dev": 0.5}}, "violence", "dev") is None
    assert decision_tables._quartiles([1.0, 2.0, 3.0]) == "2 (1 to 3)"
