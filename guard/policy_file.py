"""A policy's YAML text, with the place of everything in it, so that an error can say where it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from guard.errors import PolicyError

SHIPPED = Path(__file__).parent / "policies"
MAX_NODES = 20_000  # values of one file, what aliases repeat counted as often as it is repeated
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
    try:
        if source in shipped_policies() and not file.exists():
            file = SHIPPED / f"{source}.yaml"
        text = file.read_text(encoding="utf-8")
    except OSError as e:
        known = ", ".join(shipped_policies())
        raise PolicyError(
            f"policy file {source!r} cannot be read: {e.strerror}; give a file, or a shipped policy's name: {known}"
        ) from e
    except UnicodeDecodeError as e:
        raise PolicyError(f"policy file {source!r} is not valid YAML: {e}") from e
    except ValueError as e:  # a NUL, which no name of a file can hold
        raise PolicyError(f"policy file {source!r} cannot be read: {e}") from e
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        # Before anything is made of it: merging and checking repeat what aliases repeat.
        if root is not None and _count(root, {}) > MAX_NODES:
            raise PolicyError(f"policy file {source!r} holds more than {MAX_NODES:,} values; write a shorter one")
        data = yaml.safe_load(text)
    except PolicyError:
        raise
    except Exception as e:  # what an odd tag or number makes of a value raises errors of any kind
        mark = getattr(e, "problem_mark", None)
        place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        said = isinstance(e, (yaml.YAMLError, ValueError, RecursionError))
        reason = (getattr(e, "problem", None) or e) if said else "a value is not what its tag says"
        raise PolicyError(f"policy file {source!r}{place} is not valid YAML: {reason}") from e
    if not isinstance(data, dict) or not isinstance(root, yaml.MappingNode):
        raise PolicyError(f"policy file {source!r} must hold a mapping with the key 'rules'")
    places: dict[Field, Place] = {}
    _note(root, (), places, set())
    return PolicyText(source, data, places)


def _count(node: yaml.Node, counts: dict[int, int]) -> int:
    """How many nodes a node comes to with what its aliases repeat. Raises ValueError for what is no text."""
    if id(node) in counts:
        return counts[id(node)]
    counts[id(node)] = 1  # of itself, an alias to what it stands in adds no more
    if isinstance(node, yaml.MappingNode):
        below = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        below = node.value
    else:
        below = []
        node.value.encode()  # an escape can stand for half a character, which nothing can be written with
    counts[id(node)] += sum(_count(part, counts) for part in below)
    return counts[id(node)]


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
