"""Replays the stages of a Dockerfile without Docker: each in an empty folder, with a fresh environment as its Python.

What needs root or Debian's packages is left out and noted; any other command that is not known is an error, so that a
new step cannot be passed over.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dockerfile import (
    Command,
    DockerfileError,
    IgnoreRules,
    Instruction,
    Stage,
    expand,
    parse,
    read_assignments,
    split_commands,
)

__all__ = ["Replay", "ReplayError", "Root", "note", "process", "run", "tail"]

PROGRAMS = frozenset({"pip", "python", "sailguard"})
LEFT_OUT = frozenset({"apt-get", "chown", "groupadd", "useradd"})
SUBSTITUTED = "export"
"""The stage that .venv may stand in for."""
KEPT = ("LANG", "LC_ALL", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE")
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


class ReplayError(Exception):
    """A step failed, or the image is not what it should be."""


@dataclass(kw_only=True, slots=True)
class Root:
    """One stage's files, and what its instructions have set so far."""

    folder: Path
    cwd: str = "/"
    environment: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    volumes: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)
    user: str = "root"
    steps: int = 0

    @property
    def prefix(self) -> Path:
        """Where the image's Python lies."""
        return self.folder / "usr/local"

    def path(self, name: str) -> Path:
        """Where a path of the image lies here; `..` never leads out of it."""
        inside = os.path.normpath(os.path.join(self.cwd, name))
        return self.folder / inside.lstrip("/")

    def word(self, word: str) -> str:
        """A word of a command with the absolute path in it, if there is one, moved into this folder."""
        match = re.fullmatch(r"(--?[\w-]+=)?(/.*)", word, re.DOTALL)
        return f"{match[1] or ''}{self.path(match[2])}" if match else word

    def values(self) -> dict[str, str]:
        """What $NAME stands for."""
        return {**self.arguments, **self.environment}

    def variables(self, *, building: bool = False) -> dict[str, str]:
        """The environment of a process in this stage: the image's own, and of this machine's what a process needs."""
        values = self.values() if building else self.environment
        variables = {name: self.word(value) for name, value in values.items()}
        variables.setdefault("HOME", str(self.path("/root")))
        variables.setdefault("TMPDIR", str(self.path("/tmp")))
        for name in ("HOME", "TMPDIR"):
            Path(variables[name]).mkdir(parents=True, exist_ok=True)
        variables["PATH"] = f"{self.prefix / 'bin'}:/usr/bin:/bin"
        return variables | {name: os.environ[name] for name in KEPT if name in os.environ}


def pip_variables() -> dict[str, str]:
    """How pip is told where packages come from: variables, proxies, and the user's file."""
    found = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    found |= {name: value for name, value in os.environ.items() if name.lower() in PROXIES}
    for file in (Path.home() / ".config/pip/pip.conf", Path.home() / ".pip/pip.conf"):
        if file.is_file():
            found.setdefault("PIP_CONFIG_FILE", str(file))
    return found


def note(text: str) -> None:
    """Say on standard error what is going on."""
    sys.stderr.write(f"replay-image: {text}\n")
    sys.stderr.flush()


@contextmanager
def process(words: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, all of which is gone when the context ends."""
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True, **options) as started:
        try:
            yield started
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(started.pid, number)
                    started.wait(15 if number == signal.SIGTERM else None)
                except ProcessLookupError:
                    break
                except subprocess.TimeoutExpired:
                    continue


def run(words: Sequence[str], cwd: Path, environment: Mapping[str, str], log: Path) -> None:
    """Run a step to its end. Raises ReplayError with the last lines that it wrote if it fails."""
    with (
        log.open("ab") as output,
        process(words, cwd=cwd, env=environment, stdout=output, stderr=output, umask=0o022) as started,
    ):
        code = started.wait()
    if code != 0:
        raise ReplayError(f"{' '.join(words)}\nended with {code}:\n{tail(log)}")


def tail(log: Path) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])


class Replay:
    """Replays the stages of one Dockerfile under one folder; each stage once."""

    def __init__(self, project: Path, work: Path, *, arguments: Mapping[str, str], sidecar: Path | None) -> None:
        self.project = project
        self.work = work
        self.file = parse((project / "Dockerfile").read_text(encoding="utf-8"))
        self.ignored = IgnoreRules((project / ".dockerignore").read_text(encoding="utf-8"))
        self.arguments = arguments
        self.sidecar = sidecar
        self.roots: dict[str, Root] = {}
        self.substituted: list[str] = []
        self.left_out: list[str] = []
        self.log = work / "steps.log"

    def stage(self, name: str) -> Root:
        """Replay a stage, and before it the one that it is built on."""
        if name in self.roots:
            return self.roots[name]
        stage = self.file.lineage(name)[-1]
        note(f"stage {name}")
        if stage.base in self.file.stages:
            root = self.stage(stage.base)  # built on in place: a stage that others copy from has ended by then
        else:
            root = Root(folder=self.work / name)
            self._python(stage.base, root)
        root.arguments = {}
        for step in stage.instructions:
            self._replay(step, root)
        self.roots[name] = root
        return root

    def _python(self, image: str, root: Root) -> None:
        match = re.search(r"python:(\d+\.\d+)", image)
        if match is None:
            raise DockerfileError(f"the base image {image!r} is not Python's")
        wanted = f"python{match[1]}"
        here = f"python{sys.version_info.major}.{sys.version_info.minor}"
        found = sys.executable if here == wanted else shutil.which(wanted)
        if found is None:
            raise ReplayError(f"the image begins with {wanted}, which this machine does not have")
        root.folder.mkdir(parents=True)
        run([found, "-m", "venv", str(root.prefix)], root.folder, dict(os.environ), self.log)

    def _replay(self, step: Instruction, root: Root) -> None:
        root.steps += 1
        values = root.values()
        match step.name:
            case "ARG":
                found = read_assignments(step, values)
                root.arguments |= found | {name: value for name, value in self.arguments.items() if name in found}
            case "ENV":
                root.environment |= read_assignments(step, values)
            case "WORKDIR":
                root.cwd = os.path.normpath(os.path.join(root.cwd, expand(step.value, values, step.line)))
                root.path(".").mkdir(parents=True, exist_ok=True)
            case "USER":
                root.user = expand(step.value, values, step.line)
            case "VOLUME":
                root.volumes += step.words()
            case "ENTRYPOINT":
                root.entrypoint = step.words()
            case "CMD":
                root.command = step.words()
            case "HEALTHCHECK":
                command = Instruction(
                    line=step.line, name="CMD", flags=(), value=step.value.removeprefix("CMD").strip()
                )
                root.health = command.words()
            case "COPY":
                self._copy(step, root)
            case "RUN":
                self._run(step, root)
            case _:  # LABEL, EXPOSE, STOPSIGNAL: they change no file; anything unknown was refused by the parser
                pass

    def _copy(self, step: Instruction, root: Root) -> None:
        *sources, target = expand(step.value, root.values(), step.line).split()
        if unknown := [flag for flag in step.flags if not flag.startswith("--from=")]:
            raise DockerfileError(f"line {step.line}: COPY {unknown[0]} is not known")
        stage = step.flag("from")
        place = root.path(target)
        for name in sources:
            source = self._source(stage, name, step.line)
            into_folder = target.endswith(("/", ".")) or len(sources) > 1
            if source.is_dir():
                base = None if stage else self.project
                shutil.copytree(source, place, ignore=self._left_behind(base), dirs_exist_ok=True, symlinks=True)
            else:
                destination = place / source.name if into_folder else place
                destination.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, destination)

    def _left_behind(self, base: Path | None) -> Any:
        def ignore(folder: str, names: list[str]) -> list[str]:
            if base is None:
                return []
            inside = Path(folder).relative_to(base)
            return [name for name in names if self.ignored.leaves_out(str(inside / name))]

        return ignore

    def _source(self, stage: str | None, name: str, line: int) -> Path:
        """Where a COPY or a mount finds a path: in the build context, or in another stage."""
        if stage is None:
            source = self.project / name.lstrip("/")
            if not source.exists() or self.ignored.leaves_out(name.lstrip("/")):
                raise DockerfileError(f"line {line}: {name} is not in the build context (see .dockerignore)")
            return source
        if stage == SUBSTITUTED and stage not in self.roots:
            root = self._substitute(self.file.lineage(stage)[-1], name)
        else:
            root = self.stage(stage)
        source = Root(folder=root.folder).path(name)
        if not source.exists():
            raise DockerfileError(f"line {line}: the stage {stage} has made no {name}")
        return source

    def _substitute(self, stage: Stage, name: str) -> Root:
        """Let the given folder, or .venv, stand in for a stage whose base would have to be installed for it."""
        root = self.roots[stage.name] = Root(folder=self.work / stage.name)
        place = root.path(name)
        place.parent.mkdir(parents=True)
        if self.sidecar is not None:
            note(f"stage {stage.name}: {self.sidecar} stands in for it")
            self.substituted.append(f"{stage.name}: the folder given with --sidecar")
            shutil.copytree(self.sidecar, place)
            for path in (place, *place.rglob("*")):
                path.chmod(0o755 if path.is_dir() else 0o644)
            return root
        program = self.project / ".venv/bin"
        if not (program / "sailguard").exists():
            raise ReplayError(f"{program} holds no sailguard: run scripts/setup, or replay `full export` first")
        note(f"stage {stage.name}: .venv stands in for its base")
        self.substituted.append(f"{stage.name}: its command was run by .venv")
        for step in stage.instructions:
            if step.name != "RUN":
                continue
            for command in split_commands(step, {}):
                words = [root.word(word) for word in command.words]
                words[0] = str(program / words[0]) if words[0] in PROGRAMS else words[0]
                run(words, root.folder, dict(os.environ), self.log)
        return root

    def _run(self, step: Instruction, root: Root) -> None:
        with self._mounted(step, root):
            for command in split_commands(step, root.values()):
                self._command(command, step, root)

    @contextmanager
    def _mounted(self, step: Instruction, root: Root) -> Iterator[None]:
        if unknown := [flag for flag in step.flags if not flag.startswith("--mount=type=bind,")]:
            raise DockerfileError(f"line {step.line}: RUN {unknown[0]} is not known")
        links = []
        try:
            for mount in step.mounts():
                source = self._source(mount.get("from"), mount["source"], step.line)
                link = root.path(mount["target"])
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(source)
                links.append(link)
            yield
        finally:
            for link in links:
                link.unlink()
                if link.parent != root.folder and not any(link.parent.iterdir()):
                    link.parent.rmdir()

    def _command(self, command: Command, step: Instruction, root: Root) -> None:
        name, *rest = command.words
        shown = " ".join(command.words)
        if name in LEFT_OUT or (name == "rm" and all(word.startswith(("-", "/var/lib/apt/")) for word in rest)):
            self.left_out.append(shown)
        elif name == "install" and rest[:1] == ["-d"]:
            for word in rest:
                if word.startswith("/"):
                    root.path(word).mkdir(parents=True, exist_ok=True)
            self.left_out.append(f"{shown} (the owner alone)")
        elif name == "chmod":
            run([name, *self._words(rest, root)], root.path("."), root.variables(building=True), self.log)
        elif name in PROGRAMS:
            note(f"  {shown}")
            program = root.prefix / "bin" / name
            variables = root.variables(building=True)
            if "pip" in (name, *rest[:2]):
                variables |= pip_variables()
            variables |= {key: root.word(value) for key, value in command.environment.items()}
            run([str(program), *self._words(rest, root)], root.path("."), variables, self.log)
        else:
            raise DockerfileError(f"line {step.line}: do not know how to replay {shown!r}")

    @staticmethod
    def _words(words: Sequence[str], root: Root) -> list[str]:
        """The words with paths moved and patterns of files put in, as a shell would."""
        found: list[str] = []
        for word in words:
            moved = root.word(word)
            matches = sorted(glob.glob(moved)) if moved != word and "*" in word else []
            found += matches or [moved]
        return found
