"""The command that asks a run's model, as it is and as it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from sphere_edit.cli.options import Device, MaxMemory, Run, WhichMap, places
from sphere_edit.cli.screen import out, reporter, say_bad
from sphere_edit.errors import SphereEditError
from sphere_edit.text import terminal

if TYPE_CHECKING:
    from sphere_edit.editor import Editor


def chat(
    run: Run,
    side_by_side: Annotated[bool, typer.Option("--side-by-side", help="Ask the unedited model too.")] = False,
    in_chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Prompts are messages in the model's own chat.")
    ] = False,
    tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 40,
    device: Device = None,
    device_map: WhichMap = None,
    max_memory: MaxMemory = None,
) -> None:
    """Ask the edited model, prompt by prompt; a line is a prompt, typed or piped in. Answers are greedy."""
    from sphere_edit.editor import opened

    with opened(run, reporter(), only_to_read=True, **places(device, device_map, max_memory)) as editor:
        if in_chat:
            from sphere_edit.facts.chat import chat_frame

            chat_frame(editor.tokenizer)
        for prompt in _prompts():
            try:
                _answer(editor, prompt, side_by_side, in_chat, tokens)
            except SphereEditError as error:
                say_bad("Error", str(error))


def _answer(editor: Editor, prompt: str, side_by_side: bool, in_chat: bool, tokens: int) -> None:
    if not side_by_side:
        out.print(editor.generate(prompt, tokens, in_chat), soft_wrap=True)
        return
    from sphere_edit.reporting.results import make_table

    with editor.weights.unedited():
        before = editor.generate(prompt, tokens, in_chat)
    after = editor.generate(prompt, tokens, in_chat)
    columns = ("unedited", "edited")
    table = make_table("", *columns, left=columns)
    table.columns[1].style = "" if before == after else "bold"
    table.add_row(before.strip(), after.strip())
    out.print(terminal(prompt, "bold"), soft_wrap=True)
    out.print(table)


def _prompts() -> Iterator[str]:
    """Lines from the keyboard until it says that it is the end (Ctrl-D), or of what is piped in; empty ones are no prompts."""
    typed = sys.stdin.isatty()
    while True:
        try:
            line = input("> ") if typed else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            out.print()
            return
        if not typed and not line:
            return
        if line.strip():
            yield line.rstrip("\r\n")
