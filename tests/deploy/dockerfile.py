"""Loads what scripts/ holds for the images: the scripts have no package, and those that are run have no suffix."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["ROOT", "load_script", "step"]

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"


def load_script(name: str) -> Any:
    """Return scripts/NAME as a module; each is loaded once, so that its exceptions are those of its importers."""
    module_name = name.removesuffix(".py").replace("-", "_")
    if module_name in sys.modules:
        return sys.modules[module_name]
    loader = SourceFileLoader(module_name, str(SCRIPTS / name))
    spec = importlib.util.spec_from_loader(module_name, loader)
    assert spec is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    sys.path.insert(0, str(SCRIPTS))
    write = sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # a script without a suffix would leave its bytecode beside it
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = write
        sys.path.remove(str(SCRIPTS))
    return module


def step(text: str) -> Any:
    """The first instruction after `FROM image`."""
    parsed = load_script("dockerfile.py").parse(f"FROM python:3.11\n{text}\n")
    return parsed.stages["0"].instructions[0]
