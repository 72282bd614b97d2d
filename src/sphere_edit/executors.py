"""A bench on a cluster: its runs as tasks of Ray, or as an array of Slurm jobs. All machines see the bench's folder."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from sphere_edit.bench import Bench, Cell
from sphere_edit.counting import counted
from sphere_edit.editing.methods import register_file
from sphere_edit.errors import SphereEditError
from sphere_edit.files import write_text
from sphere_edit.plugins import options
from sphere_edit.progress import Quiet, Reporter

_RETRIES = 3  # of a run whose worker died; each goes on from the last committed batch


def on_ray(matrix: Bench, config: Path, address: str | None, reporter: Reporter) -> None:
    """Do every run that is not finished as a task of a Ray cluster, with the resources that the bench declares.

    A run that fails is recorded and passed over, as on one machine; one whose worker dies goes on elsewhere.

    Args:
        config: the file that the bench was read from, seen by every worker.
        address: of the cluster; without one, a cluster of this machine's cores, for as long as this takes.

    Raises:
        SphereEditError: Ray is not installed, or there is no cluster at the address.
    """
    ray = _ray()
    try:
        own = {} if address else {"include_dashboard": False}
        ray.init(address=address, log_to_driver=False, logging_level="error", **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise SphereEditError(f"there is no Ray cluster at '{address}': {str(error).splitlines()[0]}") from None
    try:
        wanted = matrix.config.resources
        task = ray.remote(_run).options(num_cpus=wanted.cpus, num_gpus=wanted.gpus, max_retries=_RETRIES)
        todo = [cell for cell in matrix.cells if not matrix.finished(cell)]
        reporter.say(f"{len(todo)} of {counted(len(matrix.cells), 'run')} to Ray, {wanted.words} each", "bold")
        where = str(config.resolve()), str(matrix.folder.resolve())
        asked = {task.remote(*where, cell.name, options()[1::2]): cell for cell in todo}
        while asked:
            (done, *_), _ = ray.wait(list(asked), num_returns=1)
            _told(ray, matrix, done, asked.pop(done), reporter)
    finally:
        ray.shutdown()


def _run(config: str, folder: str, name: str, plugins: list[str]) -> None:
    """One run of a bench, on a worker; the files that brought methods are run there too."""
    for file in plugins:
        register_file(Path(file))
    matrix = Bench.read(Path(config), Path(folder))
    matrix.execute(Quiet(), [cell for cell in matrix.cells if cell.name == name])


def _told(ray: Any, matrix: Bench, done: Any, cell: Cell, reporter: Reporter) -> None:
    """What came of a task; that of a run which failed stands in the bench's folder."""
    try:
        ray.get(done)
    except ray.exceptions.RayError as error:
        matrix.failures[cell.name] = " ".join(str(error).split())
        matrix.record([cell])
    failed = json.loads((matrix.folder / "failures.json").read_text("utf-8")).get(cell.name)
    if failed is None:
        reporter.say(f"done: {cell.label}")
    else:
        matrix.failures[cell.name] = failed
        reporter.say(f"failed, and passed over: {cell.label}: {failed}", "red")


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise SphereEditError("--executor ray needs Ray; install it with: pip install 'sphere-edit[bench]'") from None
    return ray


def slurm_script(matrix: Bench, config: Path) -> Path:
    """Write a script for ``sbatch`` into the bench's folder: as many jobs as runs, each of which takes one run after another.

    A job takes the next run that no other is at (`Bench.execute`), so that any number of them may run at one time, and a job that is
    given again goes on.
    """
    wanted, folder = matrix.config.resources, matrix.folder.resolve()
    command = [sys.executable, "-m", "sphere_edit", *options(), "bench", str(config.resolve()), "-o", str(folder)]
    lines = [
        "#!/bin/sh",
        f"#SBATCH --job-name=sphere-edit-{config.stem}",
        f"#SBATCH --array=1-{len(matrix.cells)}",
        f"#SBATCH --cpus-per-task={max(1, round(wanted.cpus))}",
        *([f"#SBATCH --gres=gpu:{max(1, round(wanted.gpus))}"] if wanted.gpus else []),
        f"#SBATCH --output={folder}/slurm-%A-%a.log",
        "#SBATCH --requeue",
        f"exec {shlex.join(command)}",
    ]
    path = folder / "bench.sbatch"
    write_text(path, "\n".join(lines) + "\n")
    return path
