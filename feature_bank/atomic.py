"""Atomic writes: a file or folder is either the old one or the new one, whatever happens in between."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder; on success fsync it and rename it to `target`, replacing what stood
    there.

    On an exception the temporary folder is removed and `target` is left as it was. A folder cannot be renamed
    over another, so a process that is killed between the two renames leaves the old one as
    `.TARGET.*.old/old`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    tmp = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    tmp.chmod(0o755)  # mkdtemp makes it private; the finished folder is an ordinary one
    retired: Path | None = None
    try:
        yield tmp
        for path in tmp.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # some writers make files private
            _fsync(path)
        _fsync(tmp)
        if target.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
            os.rename(target, retired / "old")
            os.rename(tmp, target)
        else:
            os.rename(tmp, target)
        _fsync(target.parent)
    except BaseException:
        if retired is not None and (retired / "old").exists() and not target.exists():
            os.rename(retired / "old", target)
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    finally:
        if retired is not None:
            shutil.rmtree(retired, ignore_errors=True)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling path to write; on success fsync it and rename it to `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(descriptor)
    tmp = Path(name)
    tmp.chmod(0o644)
    try:
        yield tmp
        _fsync(tmp)
        os.replace(tmp, target)
        _fsync(target.parent)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
