"""A file or folder is the old one or the new one, whatever happens while it is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from feature_bank.atomic import atomic_file, atomic_folder


def write(target: Path, text: str, error: type[BaseException] | None = None) -> None:
    with atomic_folder(target) as tmp:
        (tmp / "sub").mkdir()
        (tmp / "sub" / "f").write_text(text)
        if error is not None:
            raise error


def write_file(target: Path, text: str, error: type[BaseException] | None = None) -> None:
    with atomic_file(target) as tmp:
        tmp.write_text(text)
        if error is not None:
            raise error


def test_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "parent" / "folder"
    write(target, "old")
    write(target, "new")
    assert (target / "sub" / "f").read_text() == "new"
    assert [p.name for p in target.parent.iterdir()] == ["folder"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("existed", [True, False])
def test_interrupted_write_leaves_the_old_folder(tmp_path: Path, error: type[BaseException], existed: bool) -> None:
    target = tmp_path / "folder"
    if existed:
        write(target, "old")
    with pytest.raises(error):
        write(target, "half", error)
    assert [p.name for p in tmp_path.iterdir()] == (["folder"] if existed else [])
    assert not existed or (target / "sub" / "f").read_text() == "old"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_interruption_between_the_renames_restores_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    target = tmp_path / "folder"
    write(target, "old")
    rename, calls = os.rename, []

    def failing(source: Path, destination: Path) -> None:
        calls.append(destination)
        if len(calls) == 2:
            raise error
        rename(source, destination)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(error):
        write(target, "new")
    assert (target / "sub" / "f").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_write_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "f"
    write_file(target, "old")
    with pytest.raises(error):
        write_file(target, "half", error)
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
