"""Reading taxonomy files: one YAML file a domain, checked for form and for texts that stand in them twice."""

from __future__ import annotations

import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from feature_bank.errors import DataError
from feature_bank.taxonomy.domains import DOMAINS, Domain
from feature_bank.taxonomy.records import DomainTaxonomy

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, in C where PyYAML has it
SHIPPED = Path(__file__).parent

Taxonomy = dict[Domain, DomainTaxonomy]


def load_taxonomy(folder: Path | None = None) -> Taxonomy:
    """The files `DOMAIN.yaml` of a folder, by domain; the shipped ones if no folder is given.

    Raises DataError, naming file and field, for a folder without such files, a file of the wrong form, or an id or a
    text that occurs twice, in one domain or in two.
    """
    place = SHIPPED if folder is None else folder
    found: Taxonomy = {}
    for domain in DOMAINS:
        path = place / f"{domain}.yaml"
        if path.is_file():
            found[domain] = _read(path, domain)
    if not found:
        raise DataError(f"{place}: holds no taxonomy; expected files such as {DOMAINS[0]}.yaml")
    _refuse_repeats(found)
    return found


def taxonomy_files(folder: Path | None = None) -> list[Path]:
    """The files that `load_taxonomy` reads."""
    place = SHIPPED if folder is None else folder
    return [path for domain in DOMAINS if (path := place / f"{domain}.yaml").is_file()]


def normalised(text: str) -> str:
    """What makes two texts the same: letters and digits alone, whatever their case and width."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in folded if c.isalnum())


def _read(path: Path, domain: Domain) -> DomainTaxonomy:
    try:
        data: Any = yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)  # noqa: S506  # a safe one
        if not isinstance(data, dict):
            raise DataError(f"{path}: expected the fields 'domain' and 'subtopics'; the file holds none")
        taxonomy = DomainTaxonomy.model_validate(data)
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: not YAML in UTF-8: {' '.join(str(e).split())}") from e
    except ValidationError as e:
        first = e.errors()[0]
        place = ".".join(map(str, first["loc"])) or "file"
        raise DataError(f"{path}, field {place!r}: {first['msg'].replace('valid tuple', 'list')}") from e
    if taxonomy.domain != domain:
        raise DataError(f"{path}, field 'domain': {taxonomy.domain!r} does not belong into this file")
    return taxonomy


def _refuse_repeats(taxonomy: Taxonomy) -> None:
    texts: dict[str, str] = {}
    for domain, record in taxonomy.items():
        ids = Counter(
            name
            for subtopic in record.subtopics
            for name in (subtopic.id, *(concept.id for concept in subtopic.concepts))
        )
        for name, times in ids.items():
            if times > 1:
                raise DataError(f"{domain}.yaml: the id {name!r} occurs {times} times")
        for concept in record.concepts:
            place = f"{domain}/{concept.id}"
            for text in concept.texts():
                key = normalised(text)
                if key in texts:
                    raise DataError(f"{place}: the text {text!r} occurs twice (first in {texts[key]})")
                texts[key] = place
