"""`demo`: the guard at work, in real conversations."""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import Annotated

import typer

from service.commands.options import BankOption, ModelOption
from service.commands.session import load
from service.commands.terminal import error_console, output_console

__all__ = ["demo"]


def demo(
    model: ModelOption = None,
    bank: BankOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=256, help="Longest answer, in tokens.")] = 40,
) -> None:
    """Hold conversations with and without the guard, side by side: some harmless, one for every domain.

    Exit code 1 if the guard did not do what the conversation was chosen to show.
    """
    from service.demo import CONVERSATIONS, complaint, converse, demo_policy, show, show_policy

    started = time.monotonic()
    console = output_console()
    guard, loaded = load(model, bank, demo_policy())
    features = len(guard.bank.features)
    console.print(f"{loaded.model_id}, guarded by {guard.bank.version}: {features} features", markup=False)
    show_policy(console, guard.policy)
    complaints = []
    for number, conversation in enumerate(CONVERSATIONS, 1):
        with error_console().status(f"conversation {number} of {len(CONVERSATIONS)}"):
            exchange = converse(guard, loaded, conversation, max_new_tokens)
        show(console, exchange)
        if found := complaint(exchange):
            complaints.append(found)
    console.rule(style="dim")
    for line in complaints:
        console.print(f"FAILED  {line}", style="bold red", markup=False)
    passed, seconds = len(CONVERSATIONS) - len(complaints), time.monotonic() - started
    console.print(f"{passed} of {len(CONVERSATIONS)} conversations went as they should, in {seconds:.0f} s.")
    console.print(f"Start the server: {_command()} serve", markup=False, soft_wrap=True)
    if complaints:
        raise typer.Exit(1)


def _command() -> str:
    """How the user calls this program: its name if the shell finds it, else its path."""
    if shutil.which("sailguard"):
        return "sailguard"
    path = os.path.relpath(sys.argv[0])
    return path if not path.startswith("..") else sys.argv[0]
