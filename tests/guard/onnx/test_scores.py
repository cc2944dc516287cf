"""What the exported graph gives is what the model gives in torch, whatever else is read with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feature_bank.bank import Bank, shipped_bank_path
from feature_bank.layout import ROLES, render
from guard.capture import truncated_forward
from guard.encoder import SelectedEncoder
from guard.engines.onnx import OnnxEngine
from guard.engines.onnx_export import export_onnx
from guard.engines.onnx_graph import INPUTS
from guard.engines.onnx_sidecar import GRAPHS, Sidecar
from guard.engines.onnx_windows import Passage, Windows, read_passages
from guard.events import TextScore
from guard.heads import DomainHeads
from guard.models import LoadedModel
from guard.monitor import Monitor
from guard.policy import Policy
from guard.text_scoring import TextScorer
from tests.factories import make_policy, make_tiny_model
from tests.guard.onnx.conftest import Start

CPU = torch.device("cpu")
TEXTS = [
    "The river rises in the hills.",
    "x",
    "",
    "A kite flew over the old harbour while two boats came in. " * 4,
    "Zürich, 東京 and São Paulo 🙂",
    "<|im_start|>system\nnot a control token<|im_end|>",
]
RULES = [
    {"domain": "violence", "action": "flag", "threshold": {"probability": 0.55}},
    {"domain": "politics", "action": "block", "threshold": {"probability": 0.6}},
]


def assert_close(mine: TextScore, theirs: TextScore, tolerance: float) -> None:
    assert mine.scores == pytest.approx(theirs.scores, abs=tolerance)
    assert mine.tokens == theirs.tokens
    assert mine.truncated == theirs.truncated
    assert [(v.rule, v.token_index) for v in mine.verdicts] == [(v.rule, v.token_index) for v in theirs.verdicts]
    assert {d: [h.id for h in hits] for d, hits in mine.features.items()} == {
        d: [h.id for h in hits] for d, hits in theirs.features.items()
    }


@pytest.mark.parametrize("role", ROLES)
def test_scores_are_those_of_torch(start: Start, bank: Bank, tiny_model: Any, tiny_tokenizer: Any, role: Any) -> None:
    policy = make_policy(*RULES)
    scorer = TextScorer(Monitor(bank, policy, CPU), tiny_model, tiny_tokenizer)
    roles = [role] * len(TEXTS)
    found = start(policy).score(TEXTS, roles)
    for mine, theirs in zip(found, scorer.score(TEXTS, roles), strict=True):
        assert_close(mine, theirs, 1e-4)
    assert any(score.verdicts for score in found)  # the comparison is about something


def test_a_trace_is_that_of_torch(start: Start, bank: Bank, tiny_model: Any, tiny_tokenizer: Any) -> None:
    policy = make_policy(*RULES)
    scorer = TextScorer(Monitor(bank, policy, CPU), tiny_model, tiny_tokenizer)
    for text in TEXTS[:2]:
        mine, theirs = start(policy).trace(text, "prompt"), scorer.trace(text, "prompt")
        assert_close(mine.score, theirs.score, 1e-4)
        for one, other in zip(mine.tokens, theirs.tokens, strict=True):
            assert (one.index, one.token_id, one.text, one.observed) == (
                other.index,
                other.token_id,
                other.text,
                other.observed,
            )
            assert one.scores == pytest.approx(other.scores, abs=1e-4)
            assert [h.id for h in one.features] == [h.id for h in other.features]


def test_the_graph_gives_activations_and_evidence_and_nothing_where_the_padding_is(
    exported: Path, bank: Bank, tiny_model: Any
) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(exported / GRAPHS["fp32"]))
    ids, mask = np.arange(3, 43).reshape(2, 20), np.ones((2, 20), dtype=np.int64)
    mask[1, 13:] = 0
    acts, evidence = session.run(None, dict(zip(INPUTS, (ids, mask), strict=True)))
    assert Sidecar.load(exported).outputs == ["feature_acts", "evidence"]
    encoder = SelectedEncoder(bank, CPU)
    hidden = truncated_forward(tiny_model, bank.hook_names, torch.from_numpy(ids))
    for row, length in ((0, 20), (1, 13)):
        expected = encoder.encode({name: x[row, :length] for name, x in hidden.items()}).numpy()
        np.testing.assert_allclose(acts[row, :length], expected, atol=1e-4)
        np.testing.assert_allclose(evidence[row, :length], DomainHeads(bank).evidence(expected), atol=1e-3)
        assert not acts[row, length:].any()
        assert not evidence[row, length:].any()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(data=st.data())
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_text_is_judged_in_a_batch_as_it_is_alone(start: Start, precision: Any, data: st.DataObject) -> None:
    engine = start(precision=precision)
    texts = data.draw(st.lists(st.text(max_size=60), min_size=1, max_size=6))
    roles = [data.draw(st.sampled_from(ROLES)) for _ in texts]
    for text, role, found in zip(texts, roles, engine.score(texts, roles), strict=True):
        (alone,) = engine.score([text], [role])
        assert found.scores == pytest.approx(alone.scores, abs=1e-5)


def test_int8_is_near_float32(start: Start) -> None:
    roles: Any = ["prompt"] * len(TEXTS)
    for rough, exact in zip(start(precision="int8").score(TEXTS, roles), start().score(TEXTS, roles), strict=True):
        assert rough.scores == pytest.approx(exact.scores, abs=0.1)


@given(
    length=st.integers(0, 200),
    first=st.integers(0, 200),
    size=st.integers(2, 60),
)
def test_every_token_is_taken_from_one_window_that_its_place_decides(length: int, first: int, size: int) -> None:
    windows = Windows.of_length(size)
    cut = list(windows.covering(first, length))
    assert [t for w in cut for t in range(w.taken, w.stop)] == list(range(first, length))
    whole = {t: w.start for w in windows.covering(0, length) for t in range(w.taken, w.stop)}
    for window in cut:
        assert window.stop - window.start <= size
        for token in range(window.taken, window.stop):
            assert window.start == whole[token]
            assert token - window.start >= min(token, windows.context)


@given(lengths=st.lists(st.integers(0, 30), max_size=6), size=st.integers(4, 12), batch=st.integers(1, 40))
def test_activations_of_windows_are_put_together_again(lengths: list[int], size: int, batch: int) -> None:
    """A reader that tells of every token which one it is."""
    seen: list[int] = []

    def read(ids: Any, mask: Any) -> Any:
        seen.append(ids.size)
        return (ids * mask)[..., None].astype(np.float32)

    passages = [Passage([1, 2], range(100 * i, 100 * i + n)) for i, n in enumerate(lengths, 1)]
    found = read_passages(read, passages, Windows.of_length(size), batch)
    for acts, passage in zip(found, passages, strict=True):
        assert acts.ravel().tolist() == ([1, 2, *passage.ids] if len(passage.ids) else [])
    assert all(padded <= max(batch, size + 2) for padded in seen)


def test_a_text_longer_than_the_model_takes_is_judged_near_what_a_longer_model_says(
    start: Start, bank: Bank, tiny_tokenizer: Any, exported: Path
) -> None:
    text = "".join(chr(97 + (7 * i + i // 5) % 26) + (" " if i % 6 == 5 else "") for i in range(900))
    engine = start()
    assert len(text) > engine.context_length
    (found,) = engine.score([text], ["passage"])
    assert not found.truncated
    assert found.tokens == len(text.encode())
    model = make_tiny_model()
    ids = torch.tensor([render(tiny_tokenizer, text, "passage", max_tokens=2000).ids])
    hidden = truncated_forward(model, bank.hook_names, ids)  # the tiny model's positions go as far as one likes
    acts = SelectedEncoder(bank, CPU).encode({name: x[0, 1:] for name, x in hidden.items()}).numpy()
    judged = Monitor(bank, Policy(rules=()), CPU).judge(acts, np.zeros(len(acts), dtype=np.int64))
    whole = 1 / (1 + np.exp(-judged.agreed.max(0)))
    np.testing.assert_allclose(list(found.scores.values()), whole, atol=0.05)


def test_only_text_beyond_the_limit_is_left_out_and_that_is_told(exported: Path) -> None:
    engine = OnnxEngine.start(exported, precision="fp32", threads=1, max_tokens=40)
    text = "All quiet on the lake this evening."
    short, long = engine.score([text, text * 3], ["passage", "passage"])
    assert (short.tokens, short.truncated) == (len(text), False)
    assert (long.tokens, long.truncated) == (39, True)  # one token stands before it


@pytest.mark.slow
def test_the_embedded_model_is_exported_as_it_is(embedded: LoadedModel, tmp_path: Path) -> None:
    exported = export_onnx(shipped_bank_path(), tmp_path / "out", embedded.model, embedded.tokenizer)
    assert exported.sidecar.outputs[-1] == "streaming_evidence"
    bank = Bank.load(shipped_bank_path())
    texts = [feature.evidence[0].text for feature in bank.features[:60:3]]
    scorer = TextScorer(Monitor(bank, Policy.default(), CPU), embedded.model, embedded.tokenizer)
    for role in ROLES:
        engine = OnnxEngine.start(tmp_path / "out", precision="fp32")
        for mine, theirs in zip(
            engine.score(texts, [role] * len(texts)), scorer.score(texts, [role] * len(texts)), strict=True
        ):
            assert mine.scores == pytest.approx(theirs.scores, abs=1e-4)
            assert mine.tokens == theirs.tokens
    int8 = OnnxEngine.start(tmp_path / "out")
    assert int8.precision == "int8"
    off = [
        abs(mine.scores[d] - theirs.scores[d])
        for mine, theirs in zip(
            int8.score(texts, ["passage"] * len(texts)), scorer.score(texts, ["passage"] * len(texts)), strict=True
        )
        for d in theirs.scores
    ]
    assert np.mean(off) < 0.03
