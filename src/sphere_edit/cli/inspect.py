"""The command that says what was found of a model."""

from __future__ import annotations

from typing import Annotated

import typer

from sphere_edit.cli.options import Device, Json, MaxMemory, ModelDtype, TrustRemoteCode, WhichMap, given, places
from sphere_edit.cli.screen import out
from sphere_edit.errors import SphereEditError


def inspect(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, .gguf file or 'smollm2'.")],
    device: Device = None,
    device_map: WhichMap = None,
    max_memory: MaxMemory = None,
    dtype: ModelDtype = None,
    json_file: Json = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Say how a model is laid out, which of its matrices can be edited, by which methods, and what that takes."""
    from sphere_edit.editing.settings import make_settings
    from sphere_edit.files import check_room, write_json
    from sphere_edit.inspection import Inspection, tables
    from sphere_edit.progress import Quiet
    from sphere_edit.runs.folder import RunFolder
    from sphere_edit.runs.session import Session

    if json_file is not None:
        check_room(json_file.absolute().parent, 0)
    if RunFolder.exists(model):
        raise SphereEditError(
            f"{model} is a run; sphere-edit show {model} says what it did, and its config.json what was found"
        )
    settings = make_settings(places(device, device_map, max_memory), given({"dtype": dtype and dtype.value}))
    found = Inspection.of(Session.load(model, settings, Quiet(), trust_remote_code))
    for table in tables(found):
        out.print(table)
    for sentence in found.remarks():
        out.print(f"{sentence}.")
    if json_file is not None:
        write_json(json_file, found.as_content())
