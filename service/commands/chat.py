"""`chat`: a guarded conversation on the terminal, or one line a turn from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from feature_bank.errors import SailguardError
from service.commands.options import BankOption, JsonOption, ModelOption, PolicyOption
from service.commands.session import opened
from service.commands.terminal import (
    ACTION_STYLES,
    error_console,
    output_console,
    plain,
    print_json,
    verdict_line,
)

if TYPE_CHECKING:
    from guard.events import FinishReason
    from guard.session import AttachedGuard

__all__ = ["chat"]

Message = dict[str, str]


def chat(
    model: ModelOption = None,
    bank: BankOption = None,
    policy: PolicyOption = None,
    system: Annotated[str, typer.Option("--system", help="System message of the conversation.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Nucleus sampling.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Chat with the guarded model. /clear forgets the conversation, /quit ends it.

    Text that is piped in is taken line by line, one turn each. A turn that was stopped is not kept.
    """
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    start: list[Message] = [{"role": "system", "content": system}] if system else []
    with opened(model, bank, policy) as attached:
        history = list(start)
        if sys.stdin.isatty():
            error_console().print(f"model under guard by {attached.guard.bank.version}; /quit ends", style="dim")
        for line in _turns():
            if line in ("/quit", "/exit"):
                break
            if line == "/clear":
                history = list(start)
                continue
            history.append({"role": "user", "content": line})
            try:
                answer, reason = (_answer_json if as_json else _answer)(attached, history, options)
            except SailguardError as error:  # such as a conversation that has outgrown the context
                error_console().print(f"sailguard: {plain(str(error))}; /clear starts anew", markup=False)
                history.pop()
                continue
            if reason == "content_filter":
                history.pop()  # kept, it would stop every later turn too
            else:
                history.append({"role": "assistant", "content": answer})


def _turns() -> Iterator[str]:
    """What the user says, line by line, empty lines left out; ends with the input."""
    if sys.stdin.isatty():
        while True:
            try:
                line = input("you> ").strip()
            except EOFError:
                typer.echo()
                return
            if line:
                yield line
    for raw in sys.stdin.buffer:
        if line := raw.decode("utf-8", "replace").strip():
            yield line


def _answer(
    attached: AttachedGuard, history: list[Message], options: dict[str, Any]
) -> tuple[str, FinishReason | None]:
    """Stream one answer to the terminal, each verdict on a line of its own where it was given."""
    console = output_console()
    text, reason, fresh = "", None, True
    for event in attached.stream(history, **options):
        for verdict in event.verdicts:
            if not fresh:
                console.print()
            style = ACTION_STYLES[verdict.action]
            console.print(f"  [{verdict_line(verdict)}]", style=style, markup=False, soft_wrap=True)
            fresh = True
        if event.text:
            console.print(plain(event.text), end="", markup=False, soft_wrap=True)
            console.file.flush()
            fresh = event.text.endswith("\n")
        text += event.text
        reason = event.finish_reason
    if not fresh:
        console.print()
    return text, reason


def _answer_json(
    attached: AttachedGuard, history: list[Message], options: dict[str, Any]
) -> tuple[str, FinishReason | None]:
    completion = attached.chat(history, **options)
    print_json(completion.to_dict(), lines=True)
    return completion.text, completion.finish_reason
