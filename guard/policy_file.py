"""A policy's YAML text, with the place of everything in it, so that an error can say where it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from guard.errors import PolicyError

SHIPPED = Path(__file__).parent / "policies"
Field = tuple[str | int, ...]


class Place(NamedTuple):
    """Where something stands in a file, counted from 1."""

    line: int
    column: int


class PolicyText(NamedTuple):
    """What a policy file holds, before anything of it is checked."""

    source: str
    data: dict[str, Any]
    places: Mapping[Field, Place]

    def where(self, field: Sequence[str | int]) -> str:
        """The file, and the place of a field or of the nearest thing around it that is there."""
        known = next(
            self.places[tuple(field[:n])] for n in range(len(field), -1, -1) if tuple(field[:n]) in self.places
        )
        return f"policy file {self.source!r}, line {known.line}, column {known.column}"


def shipped_policies() -> list[str]:
    """The names under which policies come with sailguard."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def read_policy_text(path: str | Path) -> PolicyText:
    """A policy file, or a shipped policy by its name. Raises PolicyError if it is no YAML mapping."""
    source = str(path)
    file = Path(path)
    if source in shipped_policies() and not file.exists():
        file = SHIPPED / f"{source}.yaml"
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as e:
        known = ", ".join(shipped_policies())
        raise PolicyError(
            f"policy file {source!r} cannot be read: {e.strerror}; give a file, or a shipped policy's name: {known}"
        ) from e
    except UnicodeDecodeError as e:
        raise PolicyError(f"policy file {source!r} is not valid YAML: {e}") from e
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # ValueError: a date that there is not
        mark = getattr(e, "problem_mark", None)
        place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        reason = getattr(e, "problem", None) or e
        raise PolicyError(f"policy file {source!r}{place} is not valid YAML: {reason}") from e
    if not isinstance(data, dict) or not isinstance(root, yaml.MappingNode):
        raise PolicyError(f"policy file {source!r} must hold a mapping with the key 'rules'")
    places: dict[Field, Place] = {}
    _note(root, (), places, set())
    return PolicyText(source, data, places)


def _note(node: yaml.Node, field: Field, places: dict[Field, Place], seen: set[int]) -> None:
    """Note the places of a node and of all below it. What an alias repeats is followed once."""
    places[field] = Place(node.start_mark.line + 1, node.start_mark.column + 1)
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = (*field, str(key.value))
            _note(value, name, places, seen)
            places[name] = Place(key.start_mark.line + 1, key.start_mark.column + 1)
    elif isinstance(node, yaml.SequenceNode):
        for position, value in enumerate(node.value):
            _note(value, (*field, position), places, seen)
