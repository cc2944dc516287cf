"""The form of a benchmark's result, `benchmarks/results/NAME.json`: written atomically, always checked.

A result names the machine by what it is (cores, memory, processor), never by who owns it: host names and
folders are refused, and so is anything that is not a finite number.
"""

from __future__ import annotations

import json
import os
import platform
import re
import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from feature_bank.atomic import atomic_file
from feature_bank.errors import DataError

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("sailguard", "torch", "transformers", "numpy")
_PRIVATE = re.compile(r"(?<![\w.~-])/(?:home|root|Users|work|tmp|mnt|data)/[\w.-]+")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Machine(_Record):
    """What the figures were measured on."""

    cores: int = Field(ge=1)
    memory_gb: float = Field(gt=0.0)
    cpu: str = Field(min_length=1)
    gpu: str | None


class Figure(_Record):
    """One number that is compared over time. Its spread is in the result's `detail`."""

    value: FiniteFloat
    unit: str = Field(min_length=1)
    n: int | None = Field(default=None, ge=1)
    """How many rows or repeats it rests on."""


class Result(_Record):
    """One file of `benchmarks/results/`."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    machine: Machine
    versions: dict[str, str]
    figures: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], Figure] = Field(min_length=1)
    detail: dict[str, Any]

    def value(self, key: str) -> float | None:
        """The figure's value; None if this run had none."""
        figure = self.figures.get(key)
        return None if figure is None else figure.value


def describe_machine() -> Machine:
    """The machine this runs on, without its name."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        cores=cores,
        memory_gb=round(memory / 2**30, 1),
        cpu=_processor(),
        gpu=torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    )


def describe_versions(packages: Sequence[str] = ()) -> dict[str, str]:
    """Python's version and those of the packages that matter, `packages` besides the usual ones."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def write_result(
    name: str,
    figures: Mapping[str, Figure],
    detail: Mapping[str, Any],
    *,
    packages: Sequence[str] = (),
    folder: Path = RESULTS,
) -> Path:
    """Write `folder/NAME.json`; an earlier result is replaced as a whole or not at all.

    Raises DataError if a figure is not finite, a key has the wrong form, or the text names the machine or
    its folders.
    """
    data = {
        "name": name,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine().model_dump(),
        "versions": describe_versions(packages),
        "figures": {key: figure.model_dump(exclude_none=True) for key, figure in figures.items()},
        "detail": dict(detail),
    }
    path = folder / f"{name}.json"
    try:
        text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as e:
        raise DataError(f"result {name!r} is not plain finite JSON: {e}") from e
    parse_result(text, path.name)
    host = socket.gethostname()
    if len(host) >= 4 and host != "localhost" and re.search(rf"\b{re.escape(host)}\b", text):
        raise DataError(f"result {name!r} holds the name of this machine; leave it out")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as tmp:
        tmp.write_text(text, encoding="utf-8")
    return path


def read_result(path: Path) -> Result:
    """Read and check a result. Raises DataError naming file and field."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path.name}: cannot be read: {e}") from e
    return parse_result(text, path.name)


def parse_result(text: str, file: str) -> Result:
    """Check the text of a result. Raises DataError naming `file` and the field."""
    try:
        result = Result.model_validate(json.loads(text, parse_constant=_refuse_constant))
    except ValidationError as e:
        first = e.errors()[0]
        raise DataError(f"{file}, field {'.'.join(map(str, first['loc']))!r}: {first['msg']}") from e
    except ValueError as e:
        raise DataError(f"{file}: not valid JSON: {e}") from e
    if f"{result.name}.json" != file:
        raise DataError(f"{file}, field 'name': {result.name!r} is not the file's name")
    if private := _PRIVATE.search(text):
        raise DataError(f"{file}: {private[0]!r} is a folder of one machine; leave it out")
    return result


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a finite number")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip() or "unknown"
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"
