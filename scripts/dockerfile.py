"""Reads a Dockerfile: its stages, the words of their commands, and what .dockerignore leaves out of a COPY.

It knows the part of the language that this project uses and refuses the rest, so that nothing is passed over.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

__all__ = [
    "Command",
    "Dockerfile",
    "DockerfileError",
    "IgnoreRules",
    "Instruction",
    "Stage",
    "expand",
    "parse",
    "read_assignments",
    "split_commands",
]

KNOWN = frozenset(
    {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "RUN", "STOPSIGNAL", "USER"}
    | {"VOLUME", "WORKDIR"}
)
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


class DockerfileError(Exception):
    """A Dockerfile holds something that cannot be replayed; the message names the line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Instruction:
    """One instruction, its continued lines joined."""

    line: int
    name: str
    flags: tuple[str, ...]
    """What stands before the arguments, such as `--from=build`."""
    value: str

    def flag(self, name: str) -> str | None:
        """The value of a flag that is given once, or none."""
        found = [flag.partition("=")[2] for flag in self.flags if flag.split("=")[0] == f"--{name}"]
        return found[0] if found else None

    def mounts(self) -> list[dict[str, str]]:
        """The options of each `--mount`."""
        values = [flag.removeprefix("--mount=") for flag in self.flags if flag.startswith("--mount=")]
        return [dict(part.partition("=")[::2] for part in value.split(",")) for value in values]

    def words(self) -> list[str]:
        """The JSON list of an exec form. Raises DockerfileError if it is another form."""
        try:
            words = json.loads(self.value)
        except ValueError:
            words = None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise DockerfileError(f"line {self.line}: {self.name} is not a JSON list of words: {self.value}")
        return words


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """What stands between one FROM and the next."""

    name: str
    base: str
    instructions: tuple[Instruction, ...]

    def last(self, name: str) -> Instruction | None:
        """The last instruction of this name, which is the one that counts."""
        found = [step for step in self.instructions if step.name == name]
        return found[-1] if found else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Dockerfile:
    """The stages by name, in order; without a name a stage goes by its number."""

    stages: Mapping[str, Stage]

    def lineage(self, target: str) -> list[Stage]:
        """The stages that `target` is built on, the first one first, itself last."""
        if target not in self.stages:
            raise DockerfileError(f"no stage {target!r}; there are {', '.join(self.stages)}")
        stage = self.stages[target]
        return [*(self.lineage(stage.base) if stage.base in self.stages else []), stage]

    def image(self, target: str) -> str:
        """The image from outside that `target` begins with."""
        return self.lineage(target)[0].base


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One simple command of a RUN: variables set for it alone, and its words."""

    environment: Mapping[str, str]
    words: tuple[str, ...]


def parse(text: str) -> Dockerfile:
    """Read a Dockerfile. Raises DockerfileError at an unknown instruction or one outside its place."""
    stages: dict[str, Stage] = {}
    arguments: dict[str, str] = {}
    opened: tuple[str, str] | None = None
    steps: list[Instruction] = []

    def close() -> None:
        if opened is not None:
            stages[opened[0]] = Stage(name=opened[0], base=opened[1], instructions=tuple(steps))
        steps.clear()

    for step in _instructions(text):
        if step.name == "FROM":
            close()
            words = expand(step.value, arguments, step.line).split()
            if len(words) not in (1, 3) or (len(words) == 3 and words[1].upper() != "AS") or step.flags:
                raise DockerfileError(f"line {step.line}: FROM takes IMAGE [AS NAME], not {step.value!r}")
            opened = (words[2] if len(words) == 3 else str(len(stages)), words[0])
            if opened[0] in stages:
                raise DockerfileError(f"line {step.line}: two stages are named {opened[0]!r}")
        elif opened is None:
            if step.name != "ARG":
                raise DockerfileError(f"line {step.line}: {step.name} stands before the first FROM")
            arguments |= read_assignments(step, arguments)
        else:
            steps.append(step)
    close()
    if not stages:
        raise DockerfileError("there is no FROM")
    return Dockerfile(stages=stages)


def _instructions(text: str) -> list[Instruction]:
    found = []
    parts: list[str] = []
    start = 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or not line.strip():
            continue
        if not parts:
            start = number
        stripped = line.rstrip()
        parts.append(stripped.removesuffix("\\").strip())
        if not stripped.endswith("\\"):
            found.append(_instruction(start, " ".join(parts)))
            parts = []
    if parts:
        raise DockerfileError(f"line {start}: the last line is continued, but nothing follows")
    return found


def _instruction(line: int, text: str) -> Instruction:
    name, _, value = text.partition(" ")
    name = name.upper()
    if name not in KNOWN:
        raise DockerfileError(f"line {line}: unknown instruction {name}; known are {', '.join(sorted(KNOWN))}")
    flags = []
    value = value.strip()
    while value.startswith("--"):
        flag, _, value = value.partition(" ")
        flags.append(flag)
        value = value.strip()
    return Instruction(line=line, name=name, flags=tuple(flags), value=value)


def read_assignments(step: Instruction, values: Mapping[str, str]) -> dict[str, str]:
    """The NAME=VALUE pairs of an ARG, ENV or LABEL; an ARG without a value is left out."""
    found = {}
    for word in shlex.split(step.value):
        name, equals, value = word.partition("=")
        if equals:
            found[name] = expand(value, values, step.line)
        elif step.name != "ARG":
            raise DockerfileError(f"line {step.line}: {step.name} takes NAME=VALUE, not {word!r}")
    return found


def expand(text: str, values: Mapping[str, str], line: int) -> str:
    """Put values in for $NAME and ${NAME}. Raises DockerfileError for a name that is not set."""

    def value_of(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in values:
            raise DockerfileError(f"line {line}: ${name} is not set by an ARG or ENV of this stage")
        return values[name]

    expanded = _VARIABLE.sub(value_of, text)
    if "$" in _VARIABLE.sub("", text):
        raise DockerfileError(f"line {line}: only $NAME and ${{NAME}} are known, not {text!r}")
    return expanded


def split_commands(step: Instruction, values: Mapping[str, str]) -> list[Command]:
    """The simple commands of a RUN that are joined by `&&`. Raises DockerfileError for anything else of a shell."""
    if "`" in step.value or "$(" in step.value:
        raise DockerfileError(f"line {step.line}: the output of a command in a command is not known")
    lexer = shlex.shlex(step.value, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    lexer.commenters = ""
    groups: list[list[str]] = [[]]
    for word in lexer:
        if word == "&&":
            groups.append([])
        elif word and set(word) <= set("();<>|&"):
            raise DockerfileError(f"line {step.line}: only && may join commands, not {word!r}")
        else:
            groups[-1].append(expand(word, values, step.line))
    commands = []
    for words in groups:
        environment = {}
        while words and re.match(r"[A-Za-z_]\w*=", words[0]):
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        if not words:
            raise DockerfileError(f"line {step.line}: an empty command")
        commands.append(Command(environment=environment, words=tuple(words)))
    return commands


class IgnoreRules:
    """What a .dockerignore leaves out of the build context: the last pattern that matches a path decides."""

    def __init__(self, text: str) -> None:
        lines = (line.strip() for line in text.splitlines())
        self._rules = [
            (not line.startswith("!"), _pattern(line.removeprefix("!").strip("/")))
            for line in lines
            if line and not line.startswith("#")
        ]

    def leaves_out(self, path: str | PurePosixPath) -> bool:
        """Whether the file at `path`, relative to the context, stays behind."""
        parts = PurePosixPath(path).parts
        names = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
        ignored = False
        for ignores, pattern in self._rules:
            if any(pattern.fullmatch(name) for name in names):  # a pattern for a folder holds for what is in it
                ignored = ignores
        return ignored


def _pattern(text: str) -> re.Pattern[str]:
    expression = ""
    for part in re.findall(r"\*\*/?|\*|\?|\[[^]]*\]|[^*?[]+", text):
        if part.startswith("**"):
            expression += "(?:.*/)?" if part.endswith("/") else ".*"
        elif part == "*":
            expression += "[^/]*"
        elif part == "?":
            expression += "[^/]"
        else:
            expression += part if part.startswith("[") else re.escape(part)
    return re.compile(expression)
