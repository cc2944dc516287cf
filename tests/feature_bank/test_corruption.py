"""A thousand single-byte corruptions of a bank: none is accepted, none is a crash, and each error names its file."""

from __future__ import annotations

import io
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import structlog
from fastapi.testclient import TestClient

from feature_bank.bank import FEATURES, HASHED, HEADS, MANIFEST, REVIEWS, WEIGHTS, Bank
from feature_bank.errors import BankError
from feature_bank.review import append_reviews, load_reviews
from feature_bank.verdicts import Draft
from guard.metrics import Metrics
from service.app import create_app
from service.settings import Settings
from tests.factories import make_bank
from tests.service.file_engine import FileEngine

FILES = (MANIFEST, *HASHED)
CORRUPTIONS = 1000


class Corruption(NamedTuple):
    """One byte of one file is another one, is gone, or has come in; or the file ends there."""

    file: str
    kind: str
    place: int
    value: int

    def of(self, whole: bytes) -> bytes:
        """The file's bytes with the damage done."""
        before, after = whole[: self.place], whole[self.place + 1 :]
        if self.kind == "changed":
            return before + bytes([whole[self.place] ^ self.value]) + after
        if self.kind == "inserted":
            return before + bytes([self.value]) + whole[self.place :]
        return before + after if self.kind == "removed" else before


def corruptions(wholes: dict[str, bytes], count: int, seed: int = 0) -> list[Corruption]:
    """Different ones, the same in every run: of every file the two ends, and places anywhere in between."""
    chance = random.Random(seed)
    found: dict[tuple[str, bytes], Corruption] = {}  # by what they leave, for some come to the same

    def add(damage: Corruption) -> None:
        found.setdefault((damage.file, damage.of(wholes[damage.file])), damage)

    for file, whole in wholes.items():
        for place in (0, 1, len(whole) - 2, len(whole) - 1):
            add(Corruption(file, "changed", place, 1))
            add(Corruption(file, "removed", place, 0))
            add(Corruption(file, "ended", place, 0))
        add(Corruption(file, "inserted", len(whole), ord("\n")))
        add(Corruption(file, "inserted", len(whole), 0))
    files = sorted(wholes)
    while len(found) < count:
        file = files[len(found) % len(files)]
        kind = chance.choice(("changed", "changed", "changed", "removed", "inserted", "ended"))
        value = {"changed": chance.randint(1, 255), "inserted": chance.choice((*b' \n\t0"}],\0', 0xFF))}.get(kind, 0)
        add(Corruption(file, kind, chance.randrange(len(wholes[file])), value))
    return list(found.values())


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    bank = make_bank(tmp_path / "bank", tiny_model, tiny_tokenizer)
    drafts = [Draft(feature=bank.features[0].id, verdict="accept", reviewer="a reader", reason="it is right")]
    append_reviews(tmp_path / "bank", drafts, bank=bank)
    return tmp_path / "bank"


@pytest.fixture
def wholes(folder: Path) -> dict[str, bytes]:
    assert {path.name for path in folder.iterdir()} >= {*FILES, REVIEWS}
    return {name: (folder / name).read_bytes() for name in FILES}


def test_none_of_a_thousand_single_byte_corruptions_is_accepted(folder: Path, wholes: dict[str, bytes]) -> None:
    whole = Bank.load(folder)
    done: Counter[tuple[str, str]] = Counter()
    for damage in corruptions(wholes, CORRUPTIONS):
        path = folder / damage.file
        damaged = damage.of(wholes[damage.file])
        assert damaged != wholes[damage.file]
        path.write_bytes(damaged)
        try:
            with pytest.raises(BankError) as error:
                Bank.load(folder)
        finally:
            path.write_bytes(wholes[damage.file])
        named = str(error.value.file)
        # A manifest that is altered may speak of another file first; a file that is altered is named itself.
        assert named == damage.file or (damage.file == MANIFEST and named.partition(":")[0] in FILES), damage
        assert named in str(error.value)
        done[damage.file, damage.kind] += 1
    assert done.total() == CORRUPTIONS
    assert {file for file, _ in done} == {MANIFEST, FEATURES, HEADS, WEIGHTS}
    assert min(done.values()) >= 20, "every kind of damage was done to every file"
    assert Bank.load(folder).content_hash == whole.content_hash


def test_corrupted_reviews_are_read_or_refused_and_the_bank_is_the_same(folder: Path) -> None:
    """The reviews grow, so they lie outside the hashes; what is no review is refused by their own reader."""
    whole = (folder / REVIEWS).read_bytes()
    before, refused = Bank.load(folder).content_hash, list[str]()
    for damage in corruptions({REVIEWS: whole}, 200):
        (folder / REVIEWS).write_bytes(damage.of(whole))
        try:
            log = load_reviews(folder)
            assert len(log.reviews) <= 1
        except BankError as error:
            refused.append(str(error))
        assert Bank.load(folder).content_hash == before
    assert len(refused) > 50
    assert all(REVIEWS in error for error in refused)


class Served:
    """A bank behind the service."""

    def __init__(self, folder: Path) -> None:
        metrics = Metrics()
        self.engine = FileEngine.start(folder, None, metrics)
        self.metrics = metrics
        settings = Settings(port=0, bank=folder, admin_keys="admin-key-for-tests", watch_seconds=0.0)
        logger = structlog.wrap_logger(structlog.PrintLogger(io.StringIO()))
        self.app = create_app(self.engine, settings, generates=False, logger=logger)
        self.client = TestClient(self.app, headers={"Authorization": "Bearer admin-key-for-tests"})

    def judged_by(self) -> str:
        response = self.client.post("/v1/moderations", json={"input": "a small bird"})
        assert response.status_code == 200
        return str(response.json()["sailguard"]["bank"])

    def reload(self) -> tuple[int, str]:
        response = self.client.post("/admin/bank/reload")
        body = response.json()
        return response.status_code, body["error"]["message"] if "error" in body else body["result"]

    def count(self, result: str) -> float | None:
        labels = {"what": "bank", "result": result}
        return self.metrics.registry.get_sample_value("sailguard_reloads_total", labels)


@pytest.fixture
def served(folder: Path) -> Iterator[Served]:
    served = Served(folder)
    with served.client:
        yield served


def test_corrupted_bank_in_the_served_ones_place_is_refused_and_the_service_answers_on(
    served: Served, folder: Path, wholes: dict[str, bytes], tmp_path: Path
) -> None:
    version = served.judged_by()
    chosen = corruptions(wholes, CORRUPTIONS)[::50]
    assert len(chosen) == 20
    for number, damage in enumerate(chosen, 1):
        (folder / damage.file).write_bytes(damage.of(wholes[damage.file]))
        status, message = served.reload()
        assert status == 409, damage
        assert damage.file in message or damage.file == MANIFEST
        assert served.judged_by() == version
        assert served.client.get("/readyz").status_code == 200
        assert served.client.get("/v1/features").json()["bank"] == version
        assert served.count("refused") == number
        (folder / damage.file).write_bytes(wholes[damage.file])
    shutil.rmtree(folder)
    assert served.reload()[0] == 409
    assert served.judged_by() == version
    assert served.count("ok") == 0
