"""What the tests of guarded generation share: rules, and how the rows of a batch are read and compared."""

from __future__ import annotations

import pytest
from torch import Tensor

from feature_bank import DOMAINS
from guard.events import SequenceReport

FLAG_ALL = [{"domain": domain, "action": "flag", "evidence_tokens": 2} for domain in DOMAINS]
BLOCK = {"domain": "violence", "action": "block"}
END = 2

Batch = dict[str, Tensor]


def answers(output: Tensor, batch: Batch) -> list[list[int]]:
    """The generated ids of each row, up to its end."""
    rows = output[:, batch["input_ids"].shape[1] :].tolist()
    return [row[: row.index(END)] if END in row else row for row in rows]


def row_alone(batch: Batch, row: int) -> Batch:
    keep = batch["attention_mask"][row].bool()
    return {
        "input_ids": batch["input_ids"][row : row + 1, keep],
        "attention_mask": batch["attention_mask"][row, keep][None],
    }


def assert_same_report(a: SequenceReport, b: SequenceReport) -> None:
    assert (a.action, a.tokens_generated, a.tokens_observed) == (b.action, b.tokens_generated, b.tokens_observed)
    for mine, other in ((a.prompt_scores, b.prompt_scores), (a.response_scores, b.response_scores)):
        assert mine == pytest.approx(other, abs=1e-3)
    keys = [[(v.rule, v.phase, v.token_index) for v in report.verdicts] for report in (a, b)]
    assert keys[0] == keys[1]
