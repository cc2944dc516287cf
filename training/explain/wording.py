"""An executable explanation in words: exactly the terms of its predicate, each quoted once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from feature_bank.schema import Predicate, PredicateTerm
from training.explain.lexicons import Lexicon

NOTHING = "No term stands for it: no word or token tells where it fires."


def wording(predicate: Predicate, lexicons: Mapping[str, Lexicon]) -> str:
    """A sentence: what speaks for firing, the strongest first, then what speaks against it.

    Tokens are what it fires on; words, word pairs and concepts (any of whose words count) are what stands near.
    """
    more = [term for term in predicate.terms if term.weight > 0]
    less = sorted((term for term in predicate.terms if term.weight <= 0), key=lambda term: term.weight)
    parts = []
    if tokens := _listed((t for t in more if t.kind == "token"), lexicons):
        parts.append(f"fires on the token {tokens}")
    if near := _listed((t for t in more if t.kind != "token"), lexicons):
        parts.append(f"{'more' if parts else 'fires'} in text with {near}")
    if tokens := _listed((t for t in less if t.kind == "token"), lexicons):
        parts.append(f"{'less' if parts else 'fires less'} around the token {tokens}")
    if near := _listed((t for t in less if t.kind != "token"), lexicons):
        parts.append(f"{'less' if parts else 'fires less'} in text with {near}")
    if not parts:
        return NOTHING
    sentence = "; ".join(parts)
    return sentence[0].upper() + sentence[1:] + "."


def _listed(terms: Iterable[PredicateTerm], lexicons: Mapping[str, Lexicon]) -> str:
    names: Sequence[str] = [_named(term, lexicons) for term in terms]
    return " or ".join([*([", ".join(names[:-1])] if len(names) > 1 else []), *names[-1:]])


def _named(term: PredicateTerm, lexicons: Mapping[str, Lexicon]) -> str:
    if term.kind == "concept":
        name = lexicons[term.text].name if term.text in lexicons else term.text
        return f"words of the concept “{name}”"
    return f"“{term.text}”"
