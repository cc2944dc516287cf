"""A refresh with new features: what may be trained on is, and both banks are compared on the same texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feature_bank.bank import Bank
from feature_bank.errors import DataError
from feature_bank.spool import Acts, Spool
from tests.training.marked_texts import add_marked, item_of
from tests.training.workshop import OTHERS, POLITICS, Trained, Workshop
from training.corpus import read_documents
from training.pipeline import load_preset
from training.refresh import refresh_bank
from training.refresh_retrain import TRAFFIC, Retraining
from training.refresh_traffic import held_out, write_traffic

WORD = "Trillian"  # stands in the traffic alone


def spool_of(path: Path, bank: Bank, *, texts: bool, marked: int = 24, unmarked: int = 6) -> Path:
    """A spool of items of which half were flagged; people say the opposite of the guard about each."""
    generator = np.random.default_rng(7)
    with Spool.open_for_writing(path) as spool:
        for number in range(marked + unmarked):
            positive = number % 2 == 0
            words = " ".join([*generator.choice(POLITICS if positive else OTHERS, 5), WORD])
            acts = Acts(np.zeros(6, np.int64), generator.uniform(0, 1, (6, len(bank.features))).astype(np.float32))
            item = item_of(bank, number, acts, flagged=not positive, text=words if texts else None)
            if number < marked:
                add_marked(spool, item, "miss" if positive else "false_positive")
            else:
                spool.add([item])
    return path


def refresh(workshop: Workshop, trained: Trained, spool: Path, out: Path, **options: Any) -> Any:
    retrain = Retraining(
        model=workshop.model,
        tokenizer=workshop.tokenizer,
        preset=load_preset(str(workshop.write_preset(seed=3))),
        data=workshop.data,
    )
    return refresh_bank(
        trained.out,
        spool=spool,
        model=workshop.model,
        tokenizer=workshop.tokenizer,
        out=out,
        report=lambda *_: None,
        data=workshop.data,
        own=[],
        margin=1.0,
        **{"retrain": retrain, **options},
    )


def test_rows_are_what_people_said_but_for_what_is_held_out(trained: Trained, tmp_path: Path) -> None:
    spool = spool_of(tmp_path / "spool.db", trained.bank, texts=True)
    count = write_traffic(spool, tmp_path / "traffic.jsonl", {"politics"})
    rows = [json.loads(line) for line in (tmp_path / "traffic.jsonl").read_text().splitlines()]
    assert len(rows) == count
    assert (tmp_path / "traffic.jsonl").stat().st_mode & 0o777 == 0o600
    with Spool.open_for_reading(spool) as opened:
        kept = {f"traffic-{item.id}": labels for item, labels in opened.marked() if not held_out(item)}
    labelled = {row["id"]: {name: name in row["domains"] for name in row["known"]} for row in rows if row["known"]}
    assert labelled == kept
    assert 0 < len(kept) < 24
    assert sum(not row["known"] for row in rows) == 6


def test_new_features_are_compared_with_the_old_ones_on_the_same_texts(
    workshop: Workshop, trained: Trained, tmp_path: Path
) -> None:
    spool = spool_of(tmp_path / "spool.db", trained.bank, texts=True)
    found = refresh(workshop, trained, spool, tmp_path / "out")
    before, after = trained.bank, found.bank
    assert after.manifest.parent == before.version
    assert after.manifest.name == before.manifest.name
    assert after.manifest.hook_points != before.manifest.hook_points  # other SAEs
    assert TRAFFIC in {record.name for record in after.manifest.corpus}
    assert found.report["retrained"] is True
    whole = found.report["fixed"]["the test split"]["politics"]["whole"]["auroc"]
    assert whole["before"]["value"] == whole["after"]["value"] == 1.0  # each by its own features
    marks = found.report["fresh"]["politics"]["marks"]
    marked = [side["marked"] for name in marks.values() for side in name.values()]
    assert sum(marked) == 24
    assert min(marked) > 0
    # What users said is trained on, and is shown nowhere
    assert not [path for path in (tmp_path / "out" / "bank").iterdir() if WORD.encode() in path.read_bytes()]


def test_a_second_run_trains_nothing_again(
    workshop: Workshop, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = spool_of(tmp_path / "spool.db", trained.bank, texts=True)
    first = refresh(workshop, trained, spool, tmp_path / "out")
    monkeypatch.setattr("training.run_state.RunState.advance", lambda *_: pytest.fail("trained again"))
    assert refresh(workshop, trained, spool, tmp_path / "out").bank.heads == first.bank.heads
    spool_of(spool, trained.bank, texts=True, marked=1, unmarked=1)  # the server goes on
    again = refresh(workshop, trained, spool, tmp_path / "out")
    assert again.report["spool"]["marked"] == first.report["spool"]["marked"] + 1


def test_what_comes_into_the_spool_meanwhile_is_for_the_next_time(
    workshop: Workshop, trained: Trained, tmp_path: Path
) -> None:
    spool = spool_of(tmp_path / "spool.db", trained.bank, texts=True)

    def retrain(bank: Bank, *_: Any) -> Bank:
        spool_of(spool, bank, texts=True, marked=2, unmarked=2)
        return Bank.load(trained.out)

    found = refresh(workshop, trained, spool, tmp_path / "out", retrain=retrain)
    assert (found.report["spool"]["marked"], found.report["spool"]["unmarked"]) == (24, 6)


def test_nothing_is_trained_on_texts_that_are_only_measured_on(
    workshop: Workshop, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = spool_of(tmp_path / "spool.db", trained.bank, texts=True)
    documents, _ = read_documents(workshop.data)
    measured = set(sorted(d.text for d in documents if d.known and d.split != "test")[:4])
    with Spool.open_for_reading(spool) as opened:
        measured.add(next(item.text for item, _ in opened.marked() if item.text and not held_out(item)))
    dev = tmp_path / "dev.jsonl"
    dev.write_text("".join(json.dumps({"text": text, "known": ["politics"]}) + "\n" for text in sorted(measured)))
    read: list[set[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "training.pipeline._budget", lambda documents, *_: read.append({d.text for d in documents}) or 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            refresh(workshop, trained, spool, tmp_path / "out", dev=[dev])
    assert len(measured) == 5
    assert read[0]
    assert not read[0] & measured


def test_drifted_traffic_that_nobody_marked_can_be_trained_on(
    workshop: Workshop, trained: Trained, tmp_path: Path
) -> None:
    spool = spool_of(tmp_path / "spool.db", trained.bank, texts=True, marked=0)
    found = refresh(workshop, trained, spool, tmp_path / "out", retrain=lambda *_: Bank.load(trained.out))
    assert found.report["spool"]["marked"] == 0
    assert found.report["retrained"] is True


def test_without_texts_the_error_says_that_the_server_must_keep_them(
    workshop: Workshop, trained: Trained, tmp_path: Path
) -> None:
    spool = spool_of(tmp_path / "spool.db", trained.bank, texts=False)
    with pytest.raises(DataError, match="--spool-text"):
        refresh(workshop, trained, spool, tmp_path / "out")


def test_a_marked_text_that_is_measured_on_is_not_fitted_on(
    workshop: Workshop, trained: Trained, tmp_path: Path
) -> None:
    spool = spool_of(tmp_path / "spool.db", trained.bank, texts=True)
    with Spool.open_for_reading(spool) as opened:
        texts = [item.text for item, _ in opened.marked()][:3]
    dev = tmp_path / "dev.jsonl"
    dev.write_text("".join(json.dumps({"text": text, "known": ["politics"]}) + "\n" for text in texts))
    found = refresh(workshop, trained, spool, tmp_path / "out", dev=[dev], retrain=None)
    assert found.report["spool"]["marked"] == 24 - len(set(texts))
    assert found.report["spool"]["skipped"] == {"whose text is measured on": len(set(texts))}
