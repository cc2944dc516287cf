"""Whatever a policy file holds, reading it gives a policy or a `PolicyError`, soon, and nothing else happens."""

from __future__ import annotations

import contextlib
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from guard.errors import PolicyError
from guard.policy import Policy
from guard.policy_file import SHIPPED, shipped_policies

RULE = "{domain: violence, threshold: {probability: 0.8}, action: block}"
SOURCES = [path.read_text(encoding="utf-8") for path in sorted(SHIPPED.glob("*.yaml"))] + [Policy.default().to_yaml()]
TAGS = (
    *("!!int", "!!float", "!!bool", "!!null", "!!timestamp", "!!binary", "!!str", "!!seq", "!!map", "!!set", "!!omap"),
    *("!!pairs", "!!merge", "!!value", "!!python/name:os.system", "!!python/object/apply:os.getcwd", "!other"),
)

# What a policy is written with, so that chance comes upon more than syntax errors.
words = st.sampled_from(
    [
        *(
            "name",
            "rules",
            "refusal",
            "on_error",
            "allow",
            "extends",
            "without",
            "domain",
            "concept",
            "feature",
            "when",
        ),
        *("threshold", "probability", "fpr", "activation", "action", "scope", "steer", "all", "any", "evidence_tokens"),
        *(
            "violence",
            "politics",
            "flag",
            "block",
            "steer",
            "prompt",
            "default",
            "L14/2031",
            "<<",
            "=",
            "*a",
            "&a",
            "~",
        ),
    ]
)
scalars: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.dates(),
    st.binary(max_size=8),
    words,
)
values: st.SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(words, st.integers(), st.none()), inner, max_size=4)
    ),
    max_leaves=12,
)
pieces = st.one_of(words, st.sampled_from([*TAGS, *":-?,[]{}#&*!|>'\"%@` \n\t", ": ", "- ", "\n  ", "---\n", "..."]))


def outcome(text: str | bytes) -> Policy | PolicyError:
    """The policy that a file with this text is, or the error; anything else fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
        try:
            policy = Policy.load(path)
        except PolicyError as error:
            refusal = error
        else:
            check(policy)
            return policy
    assert str(path) in str(refusal), "an error names the file"
    assert str(refusal).encode()
    return refusal


def check(policy: Policy) -> None:
    """All that is done with a policy works, and it survives being written."""
    assert type(policy) is Policy
    policy.version.encode()
    assert Policy.model_validate(yaml.safe_load(policy.to_yaml())).version == policy.version
    for rule in policy.rules:
        rule.label.encode()
        assert "policy.yaml" in policy.where(rule) or rule.label not in policy.origins


@settings(max_examples=300)
@given(text=st.text(max_size=200))
@example("\x00")
@example("\ufeffrules: []")
@example("\ud800")
def test_any_text_is_a_policy_or_refused(text: str) -> None:
    outcome(text)


@settings(max_examples=200)
@given(raw=st.binary(max_size=100))
def test_any_bytes_are_a_policy_or_refused(raw: bytes) -> None:
    outcome(raw)


@settings(max_examples=300)
@given(parts=st.lists(pieces, max_size=40))
def test_any_pieces_of_yaml_are_a_policy_or_refused(parts: list[str]) -> None:
    outcome("".join(parts))


@settings(max_examples=300)
@given(data=values, form=st.sampled_from(["yaml", "json", "name", "rules", "rule", "when", "threshold", "extends"]))
def test_any_values_are_a_policy_or_refused(data: Any, form: str) -> None:
    rule = yaml.safe_load(RULE)
    places = {
        "name": {"name": data, "rules": [rule]},
        "rules": {"rules": data},
        "rule": {"rules": [data]},
        "when": {"rules": [{"when": data, "action": "flag"}]},
        "threshold": {"rules": [{**rule, "threshold": data}]},
        "extends": {"extends": data},
    }
    document = places.get(form, data)
    outcome(json.dumps(document, default=str) if form == "json" else yaml.safe_dump(document))


@settings(max_examples=400)
@given(
    source=st.sampled_from(SOURCES),
    places=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=3),
    piece=pieces,
    cut=st.integers(0, 12),
)
def test_altered_policies_are_policies_or_refused(source: str, places: list[float], piece: str, cut: int) -> None:
    for place in places:
        start = int(place * len(source))
        source = source[:start] + piece + source[start + cut :]
    outcome(source)


@pytest.mark.parametrize(
    "value",
    [
        '!!int ""',
        '!!float ""',
        "!!bool bird",
        "!!timestamp bird",
        "!!binary é",
        "!!int 0b2",
        "1:" * 200 + "1.5",
        "9" * 5000,
        "0x" + "f" * 5000,
        "2024-02-31",
        '"\\ud800"',
        '"\\0"',
        '"a\\0b"',
        "a" * 5000,
        "/" + "a/" * 3000,
        "!!python/object/apply:os.getcwd []",
        "!!python/object/new:dict []",
        "!!python/name:os.system",
        "!!python/tuple [1]",
    ],
)
@pytest.mark.parametrize(
    "text",
    [
        "name: VALUE\nrules: [" + RULE + "]",
        "extends: VALUE",
        "extends: default\nwithout: [VALUE]",
        "? VALUE\n: 1",
        "rules: [{domain: violence, action: block, threshold: {probability: VALUE}}]",
        "rules: [{action: flag, when: {all: [VALUE]}}]",
    ],
)
def test_odd_values_are_refused_wherever_they_stand(text: str, value: str) -> None:
    found = outcome(text.replace("VALUE", value))
    assert isinstance(found, PolicyError) or text.startswith("name")  # any text is a name


@pytest.mark.parametrize("tag", ["object/apply:os.mkdir", "object/new:os.mkdir", "object:os.mkdir", "name:os.mkdir"])
def test_no_tag_makes_an_object(tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for value in (f"!!python/{tag} [made]", f"!!python/{tag} {{args: [made]}}", f"!!python/{tag} made"):
        for text in (value, f"rules: {value}", f"rules: []\nname: {value}", f"? {value}\n: 1"):
            assert isinstance(outcome(text), PolicyError)
    assert not list(tmp_path.iterdir())


def bomb(first: str, layer: str, layers: int) -> list[str]:
    """Texts of which each means nine of the one before it."""
    made = [f"&a0 {first}"]
    for number in range(1, layers):
        made.append(f"&a{number} " + layer.format(", ".join([f"*a{number - 1}"] * 9)))
    return made


@pytest.mark.parametrize("layers", [2, 4, 6, 9, 12, 40])
@pytest.mark.parametrize(
    ("first", "layer"),
    [
        ("[bird, bird]", "[{}]"),
        ("{bird: 1}", "{{<<: [{}]}}"),
        ("{domain: violence, threshold: {probability: 0.5}}", "{{all: [{}]}}"),
        ("{domain: violence, threshold: {probability: 0.5}}", "{{any: [{}]}}"),
    ],
    ids=["lists", "merges", "all", "any"],
)
def test_aliases_that_mean_a_huge_text_are_refused_before_it_is_made(first: str, layer: str, layers: int) -> None:
    made = bomb(first, layer, layers)
    forms = (
        "\n".join(f"a{number}: {text}" for number, text in enumerate(made)),
        "rules:\n" + "\n".join(f"- {{action: flag, name: r{n}, when: {text}}}" for n, text in enumerate(made)),
        "name: " + made[0] + "\nrules: [" + ", ".join(made[1:]) + "]",
    )
    for text in forms:
        found = outcome(text)
        if layers > 6:
            assert isinstance(found, PolicyError)
            assert "values" in str(found)


@pytest.mark.parametrize(
    "text", ["&a [*a]", "&a {rules: *a}", "rules: &a [*a]", "rules: [&a {when: *a, action: flag}]", "&a {<<: *a}"]
)
def test_aliases_to_what_they_stand_in_are_refused(text: str) -> None:
    assert isinstance(outcome(text), PolicyError)


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ("{a: ", "}"), ("- ", "")])
@pytest.mark.parametrize("depth", [50, 5000])
def test_deep_nesting_is_refused(opening: str, closing: str, depth: int) -> None:
    nested = opening * depth + "1" + closing * depth
    for text in (nested, f"rules:\n  {nested}", nested[: len(nested) // 2]):
        assert isinstance(outcome(text), PolicyError)


def test_deep_conditions_are_read_or_refused() -> None:
    signal = "{domain: violence, threshold: {probability: 0.5}}"
    for depth in (1, 10, 100, 400, 2000):
        condition = "{all: [" * depth + signal + "]}" * depth
        found = outcome("rules: [{action: flag, when: " + condition + "}]")
        assert isinstance(found, PolicyError) or depth <= 400


@settings(max_examples=60)
@given(names=st.lists(st.sampled_from(["a.yaml", "b.yaml", "./a.yaml", "default", "nowhere"]), min_size=2, max_size=2))
def test_files_that_extend_each_other_are_read_or_refused(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for file, extends in zip(("a.yaml", "b.yaml"), names, strict=True):
            (Path(folder) / file).write_text(f"extends: {extends}\n")
        with contextlib.suppress(PolicyError):
            check(Policy.load(Path(folder) / "a.yaml"))


@pytest.mark.parametrize("name", shipped_policies())
def test_every_prefix_of_a_shipped_policy_is_read_or_refused(name: str) -> None:
    text = (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")
    read = sum(isinstance(outcome(text[:end]), Policy) for end in itertools.chain(range(0, len(text), 7), [len(text)]))
    assert read >= 1
