"""Finding SAEs in folders, naming them, reading them, and what is said of them to the user."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_bank.errors import BankError, DataError, SailguardError
from service.commands.terminal import error_console, plain

if TYPE_CHECKING:
    from feature_bank.formats.source import LoadedSAE

__all__ = ["find_saes", "note_other_models", "read_sae", "short_names", "trained_as", "training_record"]


def find_saes(paths: Sequence[Path]) -> list[Path]:
    """The SAE folders that are named, and those that lie anywhere below a folder that is none itself, each once.

    Raises DataError for a path that is not there, and for a folder without an SAE.
    """
    from feature_bank.formats.saelens import CONFIG_FILE, WEIGHTS_FILE

    found: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such folder; name SAE folders, or the --out of `sailguard train saes`")
        folders = [path] if _is_foreign(path) or (path / CONFIG_FILE).is_file() else _below(path)
        if not folders:
            raise DataError(
                f"{path}: holds no SAE; expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, or folders of such "
                "below it, as `sailguard train saes` writes them"
            )
        for folder in folders:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def _below(path: Path) -> list[Path]:
    from feature_bank.formats.saelens import CONFIG_FILE, WEIGHTS_FILE

    if not path.is_dir():
        return []
    configs = sorted(path.rglob(CONFIG_FILE))
    inside = [config.parent for config in configs if (config.parent / WEIGHTS_FILE).is_file()]
    return [folder for folder in inside if not any(part.startswith(".") for part in folder.relative_to(path).parts)]


def _is_foreign(path: Path) -> bool:
    """Whether a path is in some other format, which reading it will say."""
    from feature_bank.formats import detect

    try:
        return detect(path) != "saelens"
    except BankError:
        return False


def short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest tail of each path that tells it from the others, in `/`.

    Raises SailguardError for a path that is given twice.
    """
    parts = [path.resolve().parts for path in paths]
    if repeated := [str(path) for path, own in zip(paths, parts, strict=True) if parts.count(own) > 1]:
        raise SailguardError(f"{repeated[0]}: named twice; name each SAE once")
    names = []
    for own in parts:
        others = [other for other in parts if other != own]
        length = next(n for n in range(1, len(own) + 1) if all(other[-n:] != own[-n:] for other in others))
        names.append(str(Path(*own[-length:])))
    return names


def read_sae(folder: Path) -> LoadedSAE:
    """The SAE of a SAELens folder. Raises BankError naming file and field; for another format, what converts it."""
    from feature_bank.formats import detect, read_source

    form = detect(folder)
    if form != "saelens":
        raise BankError(
            f"is in the format {form}; `sailguard sae convert` makes a SAELens folder of it", file=str(folder)
        )
    return read_source(folder, format=form)


def training_record(source: LoadedSAE) -> dict[str, Any]:
    """What an SAE's configuration says of its training; empty if it does not."""
    config: Any = json.loads((source.weights.parent / "cfg.json").read_text(encoding="utf-8"))
    for key in ("metadata", "training"):
        config = config.get(key) if isinstance(config, dict) else None
    return config if isinstance(config, dict) else {}


def trained_as(source: LoadedSAE) -> str:
    """What an SAE was trained as if its configuration says so, else the architecture that it is kept as."""
    trained: Any = training_record(source)
    for key in ("fingerprint", "config", "architecture"):
        trained = trained.get(key) if isinstance(trained, dict) else None
    if isinstance(trained, str):
        return trained
    config = json.loads((source.weights.parent / "cfg.json").read_text(encoding="utf-8"))
    return str(config.get("architecture", source.format))


def note_other_models(model_names: Mapping[str, str | None], model_id: str) -> None:
    """Say so on standard error if an SAE names another model: widths may agree by chance."""
    for name, found in model_names.items():
        if found and found != model_id:
            note = f"note: {name} says that it was trained on {found}; it is measured in {model_id}"
            error_console().print(plain(note), markup=False, soft_wrap=True)
