"""The command `sailguard`: which commands there are, and what becomes of their errors."""

from __future__ import annotations

import io
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from feature_bank.errors import SailguardError
from service.commands import (
    audit,
    bank,
    chat,
    demo,
    evaluate,
    export_onnx,
    judge,
    keys,
    policy,
    sae,
    score,
    serve,
    spool,
    taxonomy,
    train,
)
from service.commands.terminal import plain

__all__ = ["EXIT_ERROR", "EXIT_INTERRUPTED", "build_app", "main"]

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


class Commands(TyperGroup):
    """A group whose commands end in one clear line on standard error instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command. What a user can cause (SailguardError, OSError) exits with 2, Ctrl-C with 130."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of a pipe is gone, which is no error of this side
            raise
        except (SailguardError, OSError) as error:
            message = " ".join(plain(str(error)).split())
            typer.echo(f"sailguard: {message or type(error).__name__}", err=True)
            raise typer.Exit(EXIT_ERROR) from error
        except KeyboardInterrupt as error:
            typer.echo("sailguard: interrupted", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from error


def build_app() -> typer.Typer:
    """The application with all its commands."""
    app = typer.Typer(
        name="sailguard",
        cls=Commands,
        help="Read a language model from the inside, and flag, steer or stop what it says.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,  # they would print texts that are being judged
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    app.command()(demo.demo)
    app.command()(chat.chat)
    app.command()(judge.check)
    app.command()(judge.trace)
    app.command()(score.score)
    app.command("eval")(evaluate.evaluate)
    app.add_typer(train.build_app(), name="train")
    app.add_typer(bank.build_app(), name="bank")
    app.add_typer(policy.build_app(), name="policy")
    app.add_typer(sae.build_app(), name="sae")
    app.add_typer(taxonomy.build_app(), name="taxonomy")
    app.add_typer(keys.build_app(), name="keys")
    app.add_typer(audit.build_app(), name="audit")
    app.add_typer(spool.build_app(), name="spool")
    app.command("export-onnx")(export_onnx.export_onnx)
    app.command(context_settings={"allow_extra_args": True})(serve.serve)
    return app


def main() -> None:
    """Entry point of the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a narrow encoding must not end a command half-way
    build_app()()


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        typer.echo(f"sailguard {metadata.version('sailguard')}")
        raise typer.Exit


def _root(
    _version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """Only `--version` stands before a command."""


if __name__ == "__main__":
    main()
