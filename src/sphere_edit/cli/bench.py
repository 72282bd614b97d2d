"""The command that runs a matrix of runs."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from sphere_edit.cli.screen import out, reporter, say_bad
from sphere_edit.errors import SphereEditError
from sphere_edit.plugins import program
from sphere_edit.text import visible


class Executor(str, Enum):
    """Where the runs of a bench are done."""

    here = "here"
    ray = "ray"
    slurm = "slurm"


def bench(
    config: Annotated[Path, typer.Argument(help="YAML file: models, data, methods, variants, seeds, settings.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder of the bench. \\[default: runs/<name of the file>]")
    ] = None,
    executor: Annotated[
        Executor, typer.Option(help="Where runs are done: here, as tasks of Ray, or by a script for Slurm.")
    ] = Executor.here,
    address: Annotated[
        str | None, typer.Option(help="Of the Ray cluster. \\[default: one of this machine's cores]")
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="Run nothing; make the table of what is finished.")] = False,
) -> None:
    """Run a whole matrix of methods, data, variants and seeds, or go on with it; ends with the paper's table and a report."""
    from rich.markdown import Markdown

    from sphere_edit.bench import Bench, write_results
    from sphere_edit.executors import on_ray, slurm_script

    if address is not None and executor is not Executor.ray:
        raise SphereEditError("--address is that of a Ray cluster; add --executor ray")
    matrix = Bench.read(config, output)
    try:
        if executor is Executor.slurm and not table:
            out.print(f"sbatch {slurm_script(matrix, config)}", soft_wrap=True)
            return
        if executor is Executor.ray and not table:
            on_ray(matrix, config, address, reporter())
        elif not table:
            matrix.execute(reporter())
    except KeyboardInterrupt:
        raise SphereEditError(
            f"interrupted; every committed batch is kept. Go on with: {program()} bench {config} -o {matrix.folder}"
        ) from None
    written = write_results(matrix, reporter())
    table_text = (matrix.folder / "table.md").read_text("utf-8")
    if out.is_terminal:
        out.print(Markdown(visible(table_text, keep="\n"), hyperlinks=False))
    else:  # where nobody sees columns, nothing is cut to fit them
        out.print(table_text, soft_wrap=True)
    for name, reason in matrix.failures.items():
        say_bad("Failed", f"{name}: {reason}")
    out.print("\n".join(map(str, written)), soft_wrap=True)
    if matrix.failures:
        raise typer.Exit(3)
