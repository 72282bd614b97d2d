"""The command that opens the studio, a local web page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sphere_edit.cli.screen import out, reporter

if TYPE_CHECKING:
    from sphere_edit.studio.desk import Desk


def studio(
    given: Annotated[
        str | None, typer.Argument(metavar="[RUN|MODEL]", help="A run folder to open, or a model as for edit.")
    ] = None,
    folder: Annotated[
        list[Path] | None,
        typer.Option(
            "--folder",
            help="Folders that the page may open runs and models from; new runs and exports go to the first. Repeatable. \\[default: runs]",
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with any setting of the API, for new runs.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page.")] = 7860,
    host: Annotated[
        str, typer.Option(help="Address; any other than this machine's own asks for --auth.")
    ] = "127.0.0.1",
    auth: Annotated[
        str | None,
        typer.Option(
            metavar="NAME:PASSWORD", envvar="SPHERE_EDIT_STUDIO_AUTH", show_envvar=True, help="Ask for these first."
        ),
    ] = None,
) -> None:
    """Edit, compare, look, undo and ship on a local web page (needs the extra studio)."""
    from sphere_edit.studio.server import checked, serve

    checked(host, auth)

    def make() -> Desk:
        from sphere_edit.editing.settings import read_settings_file
        from sphere_edit.runs.folder import RunFolder
        from sphere_edit.studio.desk import Desk
        from sphere_edit.studio.places import Places

        settings = read_settings_file(config) if config else {}
        desk = Desk(Places(folder or [Path("runs")], given), settings, reporter())
        if given is not None:
            desk.open_run(given) if RunFolder.exists(given) else desk.open_model(given)
        return desk

    serve(make, host, port, auth, lambda text: out.print(text, soft_wrap=True))
