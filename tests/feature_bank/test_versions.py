"""A store's current version is the old one or the new one, whatever happens in between, and no review is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from feature_bank.bank import FEATURES, REVIEWS, Bank, bank_folder
from feature_bank.errors import BankError
from feature_bank.journal import hold
from feature_bank.review import Draft, append_reviews, load_reviews, rejected_ids
from feature_bank.versions import VersionStore
from guard.core import Guard
from tests.factories import make_bank
from tests.feature_bank.variants import write_variant

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def banks(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> list[Path]:
    """Three versions of a bank."""
    first = make_bank(tmp_path / "one", tiny_model, tiny_tokenizer)
    write_variant(first, tmp_path / "two", version="2", parent=first.version)
    write_variant(first, tmp_path / "three", version="3")
    return [tmp_path / name for name in ("one", "two", "three")]


@pytest.fixture
def store(tmp_path: Path) -> VersionStore:
    return VersionStore(tmp_path / "store")


def reject(path: Path, feature: str = "L1/3") -> None:
    append_reviews(path, [Draft(feature=feature, verdict="reject", reviewer="ann", reason="x")])


def state(store: VersionStore) -> dict[str, Any]:
    """What a reader of the store can see of it."""
    return {
        "current": store.current,
        "loaded": Bank.load(store.folder).version if store.current else None,
        "versions": sorted(stored.version for stored in store.versions()) if store.current else [],
        "problems": [stored.problem for stored in store.versions() if stored.problem] if store.current else [],
        "reviews": load_reviews(store.folder).reviews if store.current else (),
        "left": [path.name for path in store.folder.rglob(".*") if path.name != ".lock"],
    }


def test_a_promoted_bank_is_current_and_loads_by_every_path(store: VersionStore, banks: list[Path]) -> None:
    switch = store.promote(banks[0])
    bank = Bank.load(banks[0])
    assert (switch.version, switch.previous, switch.changed) == (bank.version, None, True)
    for path in (store.folder, store.folder / "current", store.folder / "versions" / bank.version):
        assert Bank.load(path).content_hash == bank.content_hash
    assert Guard.from_bank(store.folder / "current").bank.version == bank.version
    assert Guard.from_bank(store.folder).bank.version == bank.version
    store.promote(banks[1])
    assert Guard.from_bank(store.folder / "current").bank.version == Bank.load(banks[1]).version
    assert not Path(os.readlink(store.folder / "current")).is_absolute()  # the store can be moved
    moved = store.folder.rename(store.folder.with_name("moved"))
    assert Bank.load(moved).version == Bank.load(banks[1]).version


def test_the_history_tells_every_step_and_rollback_goes_back_through_it(store: VersionStore, banks: list[Path]) -> None:
    names = [store.promote(bank).version for bank in banks]
    assert store.rollback().version == names[1]
    assert store.rollback().version == names[0]
    with pytest.raises(BankError, match="no version was current before"):
        store.rollback()
    assert store.rollback("3").version == names[2]
    assert store.rollback().version == names[0]
    assert [(event.action, event.version) for event in store.history()] == [
        *(("promote", name) for name in names),
        *(("rollback", names[i]) for i in (1, 0, 2, 0)),
    ]
    assert [event.previous for event in store.history()][:3] == [None, *names[:2]]
    assert [stored.version for stored in store.versions()] == names
    assert [stored.current for stored in store.versions()] == [True, False, False]


def test_promoting_the_current_version_again_changes_nothing(store: VersionStore, banks: list[Path]) -> None:
    store.promote(banks[0])
    before = state(store)
    for source in (banks[0], store.folder, store.folder / "current"):
        assert not store.promote(source).changed
    assert state(store) == before
    assert len(store.history()) == 1


@pytest.mark.parametrize(
    ("wanted", "found"), [("2", 1), ("tiny@2", 1), ("{name}", 0), ("tiny@1+", 0)], ids=["version", "begin", "all", "+"]
)
def test_a_version_is_named_by_any_part_that_means_one(
    store: VersionStore, banks: list[Path], wanted: str, found: int
) -> None:
    names = [store.promote(bank).version for bank in banks]
    assert store.rollback(wanted.format(name=names[0])).version == names[found]
    for wrong in ("tiny", "9", ""):
        with pytest.raises(BankError, match=r"could be|is none of"):
            store.rollback(wrong)


def test_reviews_survive_promotion_and_rollback(store: VersionStore, banks: list[Path]) -> None:
    store.promote(banks[0])
    reject(store.folder)
    reject(banks[1], "L1/10")
    assert store.promote(banks[1]).carried == 1
    assert rejected_ids(store.folder) == {"L1/3", "L1/10"}
    first, second = sorted(load_reviews(store.folder).reviews, key=lambda review: review.feature, reverse=True)
    assert (first.bank, second.bank) == (Bank.load(banks[0]).version, Bank.load(banks[1]).version)
    reject(store.folder / "current", "L3/3")
    assert store.rollback().carried == 2
    assert rejected_ids(store.folder) == {"L1/3", "L1/10", "L3/3"}
    assert store.promote(banks[1]).carried == 0
    assert len(load_reviews(store.folder).reviews) == 3


def test_a_review_given_while_a_version_is_promoted_is_not_lost(
    store: VersionStore, banks: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.promote(banks[0])
    reviewer = threading.Thread(target=reject, args=(store.folder,))
    symlink = os.symlink

    def slow(*args: Any) -> None:
        reviewer.start()
        reviewer.join(0.5)  # it waits for the lock by now
        symlink(*args)

    monkeypatch.setattr(os, "symlink", slow)
    store.promote(banks[1])
    reviewer.join(20)
    assert rejected_ids(store.folder) == {"L1/3"}


# ---- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("step", ["rename", "symlink", "replace", "fsync"])
@pytest.mark.parametrize("first", [True, False])
def test_interruption_at_any_step_leaves_a_valid_current(
    store: VersionStore,
    banks: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    first: bool,
    error: type[BaseException],
) -> None:
    if not first:
        store.promote(banks[0])
        reject(store.folder)
    before = state(store)

    def failing(*_: Any) -> None:
        raise error

    monkeypatch.setattr(os, step, failing)
    with pytest.raises(error):
        store.promote(banks[1])
    monkeypatch.undo()
    after = state(store)
    assert {**after, "versions": 0} == {**before, "versions": 0}  # a copy that is there already does no harm
    store.promote(banks[1])
    assert state(store)["loaded"] == Bank.load(banks[1]).version
    assert state(store)["left"] == []
    assert rejected_ids(store.folder) == (set() if first else {"L1/3"})


def test_a_step_that_the_history_lacks_is_added(
    store: VersionStore, banks: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [store.promote(banks[0]).version]

    def failing(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(VersionStore, "_record", failing)
    with pytest.raises(KeyboardInterrupt):
        store.promote(banks[1])
    monkeypatch.undo()
    names.append(Bank.load(store.folder).version)
    assert names[1] == Bank.load(banks[1]).version
    names.append(store.promote(banks[2]).version)
    assert [event.action for event in store.history()] == ["promote", "found", "promote"]
    assert [event.version for event in store.history()] == names
    assert store.rollback().version == names[1]


def test_a_killed_promotion_is_cleaned_up_by_the_next(store: VersionStore, banks: list[Path]) -> None:
    store.promote(banks[0])
    (store.folder / "versions" / ".left.x.tmp").mkdir()
    os.symlink("nowhere", store.folder / ".current.next")
    store.promote(banks[1])
    assert state(store)["left"] == []


@pytest.mark.parametrize("first", [True, False])
def test_a_bank_that_does_not_verify_is_refused_and_changes_nothing(
    store: VersionStore, banks: list[Path], first: bool
) -> None:
    if not first:
        store.promote(banks[0])
    before = state(store)
    reject(banks[1])
    good = (banks[1] / REVIEWS).read_text()
    (banks[1] / REVIEWS).write_text("what\n" + good)
    with pytest.raises(BankError, match=r"reviews\.jsonl:1"):
        store.promote(banks[1])
    (banks[1] / REVIEWS).write_text(good)
    with (banks[1] / FEATURES).open("a") as file:
        file.write("\n")
    with pytest.raises(BankError, match=r"features\.jsonl"):
        store.promote(banks[1])
    assert state(store) == before


def test_a_damaged_version_is_listed_and_never_made_current(store: VersionStore, banks: list[Path]) -> None:
    names = [store.promote(bank).version for bank in banks[:2]]
    with (store.folder / "versions" / names[0] / FEATURES).open("a") as file:
        file.write("\n")
    for action in (store.rollback, lambda: store.promote(banks[0])):
        with pytest.raises(BankError, match=r"features\.jsonl"):
            action()
    assert store.current == names[1]
    damaged, whole = store.versions()
    assert "features.jsonl" in str(damaged.problem)
    assert (whole.problem, whole.current) == (None, True)


def test_a_damaged_current_version_can_be_left(store: VersionStore, banks: list[Path]) -> None:
    names = [store.promote(bank).version for bank in banks[:2]]
    (store.folder / "versions" / names[1] / FEATURES).unlink()
    assert store.rollback().version == names[0]
    store.promote(banks[2])
    shutil.rmtree(store.folder / "versions" / Bank.load(banks[2]).version)
    assert store.promote(banks[2]).version == Bank.load(store.folder).version


@pytest.mark.parametrize("version", ["../../x", "1/2", "", "a b", "x" * 300])
def test_a_version_that_is_no_name_of_a_folder_is_refused(
    store: VersionStore, banks: list[Path], tmp_path: Path, version: str
) -> None:
    write_variant(Bank.load(banks[0]), tmp_path / "odd", name=version or "\n")
    with pytest.raises(BankError, match="cannot name a folder"):
        store.promote(tmp_path / "odd")
    assert not store.folder.exists()


def test_folders_that_are_no_store_are_told(store: VersionStore, banks: list[Path], tmp_path: Path) -> None:
    for action in (store.versions, store.rollback):
        with pytest.raises(BankError, match="bank promote"):
            action()
    with pytest.raises(BankError, match="is a bank itself"):
        VersionStore(banks[0]).promote(banks[1])
    (store.folder / "current").mkdir(parents=True)
    with pytest.raises(BankError, match="is no link"):
        store.promote(banks[0])
    (store.folder / "current").rmdir()
    os.symlink(tmp_path, store.folder / "current")
    with pytest.raises(BankError, match="remove it"):
        store.promote(banks[0])


# ---- several at once -----------------------------------------------------------------------------


def test_two_promoters_are_served_one_after_the_other(store: VersionStore, banks: list[Path]) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom feature_bank.versions import VersionStore\n"
        "for source in sys.argv[2:] * 4: VersionStore(Path(sys.argv[1])).promote(source)"
    )
    orders = [[str(bank) for bank in banks], [str(bank) for bank in reversed(banks)]]
    command = [sys.executable, "-c", code, str(store.folder)]
    promoters = [subprocess.Popen([*command, *order], cwd=ROOT) for order in orders]
    assert [promoter.wait(120) for promoter in promoters] == [0, 0]
    events = store.history()
    assert all(event.action == "promote" for event in events)
    assert [event.previous for event in events[1:]] == [event.version for event in events[:-1]]
    assert store.current == events[-1].version
    assert state(store)["left"] == []


def test_a_reader_never_sees_a_half_state(store: VersionStore, banks: list[Path]) -> None:
    known = {store.promote(bank).version for bank in banks[:2]}
    stop = threading.Event()
    failed: list[BaseException] = []

    def switch() -> None:
        try:
            while not stop.is_set():
                store.rollback("1")
                store.rollback("2")
        except BaseException as error:  # noqa: BLE001  # the test reports it
            failed.append(error)

    switcher = threading.Thread(target=switch)
    switcher.start()
    try:
        seen = {Bank.load(store.folder / "current").version for _ in range(30)}
    finally:
        stop.set()
        switcher.join(30)
    assert failed == []
    assert seen <= known


def test_a_store_resolves_to_its_current_version_for_reviews(store: VersionStore, banks: list[Path]) -> None:
    assert bank_folder(banks[0]) == banks[0]
    store.promote(banks[0])
    with hold(bank_folder(store.folder) / REVIEWS) as journal:
        assert journal.raw() == b""
    reject(store.folder)
    name = Bank.load(store.folder).version
    line = (store.folder / "versions" / name / REVIEWS).read_text()
    assert json.loads(line)["bank"] == name
