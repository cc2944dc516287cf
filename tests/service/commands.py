"""The command line as tests run it: in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from typer.testing import CliRunner

from service.cli import EXIT_ERROR, build_app

Run = Callable[..., Any]


def run(*args: object, stdin: str | bytes | None = None) -> Any:
    """Run the command; `result.stdout` and `result.stderr` are apart."""
    return CliRunner().invoke(build_app(), [str(arg) for arg in args], input=stdin)


def assert_one_line_error(result: Any, *parts: str) -> None:
    """One line on standard error that holds the parts, and no traceback."""
    assert result.exit_code == EXIT_ERROR
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("sailguard: ")
    for part in parts:
        assert part in lines[0]
