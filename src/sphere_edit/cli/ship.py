"""Commands that take an edited model out of its run."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from sphere_edit.cli.options import Device, Dtype, MaxMemory, Run, TrustRemoteCode, WhichMap, places
from sphere_edit.cli.screen import out, reporter
from sphere_edit.errors import SphereEditError

Output = Annotated[Path, typer.Option("-o", "--output", help="Folder to create.")]


class Form(str, Enum):
    """How an edited model leaves its run."""

    hf = "hf"
    delta = "delta"
    lora = "lora"
    gguf = "gguf"


def export(
    run: Run,
    output: Output,
    form: Annotated[
        Form,
        typer.Option(
            "--as", help="hf: the whole model. delta: the change, for sphere-edit apply. lora: a PEFT adapter."
        ),
    ] = Form.hf,
    dtype: Annotated[
        Dtype, typer.Option(help="hf: numbers of the weights. \\[default: as the run's model has them]")
    ] = Dtype.auto,
    rank: Annotated[int | None, typer.Option(help="lora: its rank. \\[default: the least within --within]")] = None,
    within: Annotated[
        float | None, typer.Option(min=0, help="lora: points that it may be worse than the whole edit. \\[default: 1]")
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="gguf: the file to replace tensors in. \\[default: the one that the model came from]"),
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Load what was written, and measure it.")] = False,
    push_to: Annotated[
        str | None,
        typer.Option("--push", metavar="OWNER/NAME", help="Send it to the Hugging Face hub too, as a private model."),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: everybody may see it.")] = False,
    device: Device = None,
    device_map: WhichMap = None,
    max_memory: MaxMemory = None,
) -> None:
    """Write the edited model, or what was changed in it, to a new folder with a card and a manifest."""
    from sphere_edit.runs.folder import RunFolder

    RunFolder.open(run)
    _check_output(output)
    import torch

    from sphere_edit.editor import opened
    from sphere_edit.exports.forms import Wanted
    from sphere_edit.exports.push import check_push, push

    numbers = None if dtype is Dtype.auto else getattr(torch, dtype.value)
    asked: dict[str, Any] = {"dtype": numbers, "rank": rank, "within": within, "base": base, "measure": measure}
    Wanted(form.value, **asked)
    if public and push_to is None:
        raise SphereEditError("--public says who may see what is pushed; add --push owner/name")
    if push_to is not None:
        check_push(push_to, public)
    with opened(run, reporter(), only_to_read=True, **places(device, device_map, max_memory)) as editor:
        editor.export(output, form.value, **asked)
    if push_to is not None:
        out.print(f"{push(output, push_to, public)} holds it too.", soft_wrap=True)


def apply(
    delta: Annotated[Path, typer.Argument(help="What export --as delta wrote.")],
    base: Annotated[
        str, typer.Argument(help="The original model, as for edit; its weights must have the delta's hash.")
    ],
    output: Output,
    device_map: WhichMap = None,
    max_memory: MaxMemory = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Add a delta to its original model: the bits of the whole export, without the run."""
    from sphere_edit.exports.manifest import read_manifest

    read_manifest(delta)
    _check_output(output)
    from sphere_edit.editing.settings import make_settings
    from sphere_edit.exports.delta import apply_delta
    from sphere_edit.exports.hf import loaded_by

    where = make_settings(places(None, device_map, max_memory)).placement()
    _say(apply_delta(delta, base, output, reporter(), trust_remote_code, where))
    out.print(f"{output} holds the model; {loaded_by(output)} loads it.", soft_wrap=True)


def _check_output(output: Path) -> None:
    """Refuse, before anything is loaded, a folder that cannot be made."""
    from sphere_edit.files import check_room, refuse_existing, require_utf8

    require_utf8(output, "a model")
    refuse_existing(output)
    check_room(output.absolute().parent, 0)


def _say(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        reporter().say(sentence)
