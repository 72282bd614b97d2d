"""The command that proves a run or an export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sphere_edit.cli.options import MaxMemory, WhichMap, places
from sphere_edit.cli.screen import FAILED, out, reporter, say_bad
from sphere_edit.errors import SphereEditError

if TYPE_CHECKING:
    from sphere_edit.runs.folder import RunFolder


def verify(
    path: Annotated[Path, typer.Argument(metavar="RUN_OR_EXPORT", help="A run folder, or what export wrote.")],
    against: Annotated[
        Path | None, typer.Option(metavar="RUN", help="The run that an export is of: are its weights the run's?")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Where the original model is now, if it has moved.")] = None,
    device: Annotated[str | None, typer.Option(help="Rebuild here. \\[default: as the run was edited]")] = None,
    device_map: WhichMap = None,
    max_memory: MaxMemory = None,
) -> None:
    """Prove that a run, or an export, is what it says: one line, and status 0; or what is wrong, and status 4."""
    from sphere_edit.exports.manifest import is_export
    from sphere_edit.exports.proof import prove_export
    from sphere_edit.runs.folder import RunFolder
    from sphere_edit.runs.proof import prove

    where = places(device, device_map, max_memory)
    if RunFolder.exists(path):
        if against is not None:
            raise SphereEditError(f"{path} is a run; --against RUN is for exports")
        run = _opened(path)
        proof = prove(run, reporter(), model, where)
        said = proof.verdict(run)
    elif is_export(path):
        other = None if against is None else _opened(against)
        if other is None and (where or model is not None):
            raise SphereEditError(
                "--model and where it goes are for an export that is compared with its run: add --against RUN"
            )
        proof = prove_export(path, other, reporter(), model, where)
        said = proof.sentence(
            path, "compared with its manifest alone" if other is None else f"its weights are those of {against}"
        )
    else:
        raise SphereEditError(f"{path} is neither a run folder nor an export (it has no journal and no manifest)")
    if not proof.faults:
        out.print(said, soft_wrap=True)
        return
    say_bad("Not proven", said)
    raise typer.Exit(FAILED)


def _opened(path: Path) -> RunFolder:
    from sphere_edit.runs.folder import RunFolder

    run = RunFolder.open(path)
    run.lock(only_to_read=True)
    return run
