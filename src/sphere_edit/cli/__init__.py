"""The command line. Every mistake of a user ends in one sentence and status 2, never in a traceback."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sphere_edit import ranks
from sphere_edit._version import __version__
from sphere_edit.cli.bench import bench
from sphere_edit.cli.demo import demo
from sphere_edit.cli.edit import edit
from sphere_edit.cli.inspect import inspect
from sphere_edit.cli.judge import judge
from sphere_edit.cli.look import methods, report, show
from sphere_edit.cli.measure import ability, energy, evaluate
from sphere_edit.cli.prove import verify
from sphere_edit.cli.remove import history, remove
from sphere_edit.cli.screen import fail, hush, out
from sphere_edit.cli.ship import apply, export
from sphere_edit.cli.state import rollback
from sphere_edit.cli.studio import studio
from sphere_edit.cli.talk import chat
from sphere_edit.cli.tune import tune
from sphere_edit.errors import SphereEditError
from sphere_edit.text import visible


class Commands(TyperGroup):
    """The commands; what typer itself says of a wrong argument shows that argument, and nothing of it acts."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        """As typer does it."""
        with _shown():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        """As typer does it."""
        with _shown():
            return super().invoke(ctx)


@contextmanager
def _shown() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(message := getattr(error, "message", None), str) and hasattr(error, "format_message"):
            if getattr(error, "option_name", None) == "--plugin":
                message = "--plugin stands before the command: sphere-edit --plugin FILE COMMAND …"
                error.possibilities = None  # type: ignore[attr-defined]
            error.message = visible(message, keep="\n")  # type: ignore[attr-defined]
        raise


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Change facts inside an open-weight language model, batch after batch, and keep the model.\n\n"
    "A first look: [bold]sphere-edit demo[/bold]. Your own facts: a JSONL file with one object a line,\n\n"
    '[dim]{"subject": "Big Ben", "prompt": "{} stands in the city of", "target_new": "Vienna"}[/dim]\n\n'
    "then: check what would happen, edit, look, and ship or go back:\n\n"
    "  [bold]sphere-edit edit smollm2 facts.jsonl -o runs/first --dry-run[/bold]\n\n"
    "  [bold]sphere-edit edit smollm2 facts.jsonl -o runs/first[/bold]\n\n"
    "  [bold]sphere-edit show runs/first[/bold]\n\n"
    "  [bold]sphere-edit export runs/first -o edited-model[/bold]\n\n"
    "  [bold]sphere-edit remove runs/first --fact 'Big Ben'[/bold]\n\n"
    "  [bold]sphere-edit rollback runs/first --to 0[/bold]",
)
for _command in (
    demo,
    edit,
    methods,
    evaluate,
    ability,
    judge,
    chat,
    show,
    history,
    report,
    energy,
    remove,
    rollback,
    verify,
    export,
    apply,
    inspect,
    tune,
    bench,
    studio,
):
    app.command("eval" if _command is evaluate else None)(_command)


TOGETHER = ("edit", "remove")  # commands that several processes can do together


def main() -> None:
    """Run the command line; turn mistakes into sentences."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot spell is told by its code
    try:
        app()
    except SphereEditError as error:
        fail(str(error))
    except UnicodeEncodeError as error:
        if not any("\udc80" <= sign <= "\udcff" for sign in error.object):
            raise
        fail(f"a name that is not UTF-8 cannot be used here: {error.object}; rename the file or folder")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        fail(
            "the device ran out of memory. What was committed is kept; a new run with smaller targets.tokens or "
            "tokens_per_batch (in --config) or --dtype bfloat16 needs less"
        )


def _version(value: bool) -> None:
    if value:
        out.print(f"sphere-edit {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    plugin: Annotated[
        list[Path] | None,
        typer.Option(
            "--plugin",
            help="Run this Python file, which registers methods or data formats; repeatable, before COMMAND.",
        ),
    ] = None,
) -> None:
    if ranks.started() > 1:
        if ctx.invoked_subcommand not in TOGETHER:
            raise SphereEditError(
                f"'{ctx.invoked_subcommand}' is the work of one process, and {ranks.started()} were started together; start it without torchrun"
            )
        ctx.with_resource(ranks.joined())
        if not ranks.leads():
            hush()
    if plugin:
        from sphere_edit.editing.methods import register_file

        for path in plugin:
            register_file(path)
