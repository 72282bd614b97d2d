"""What a run measures, told to the loggers that people use: trackio, Weights & Biases, TensorBoard, each by its own package.

The run folder stays the only record. What is told is numbers and settings: no fact, no prompt and no path. A logger that fails is told
of once and left out, for no run may die of it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Literal

from sphere_edit import ranks
from sphere_edit.errors import SphereEditError
from sphere_edit.evaluation.catalogue import HELDOUT
from sphere_edit.progress import Reporter, RichReporter
from sphere_edit.runs.folder import RunFolder
from sphere_edit.runs.records import Ability, Batch, Evaluation, GuardStop, Record, Unedited
from sphere_edit.text import public_name

Service = Literal["trackio", "wandb", "tensorboard"]
Log = Callable[[Mapping[str, float], int], None]
Close = Callable[[], None]

_PROJECT = "sphere-edit"


def check_service(service: Service) -> None:
    """Raises:
    SphereEditError: the package of this logger is not installed.
    """
    if importlib.util.find_spec(service) is None:
        raise SphereEditError(f"--log {service} needs its package: pip install {service} (or 'sphere-edit[log]')")


def numbers_of(record: Record) -> tuple[int, dict[str, float]]:
    """The batch that a line of the journal speaks of, and its numbers by name; none of lines that measure nothing.

    Of the edited matrices it is the sum of collateral ratios, and of the other measures the largest.
    """
    if isinstance(record, (Batch, GuardStop)):
        return record.number, _known(_of_batch(record))
    if isinstance(record, (Unedited, Evaluation)):
        whole = {metric.name: getattr(record, metric.name) for metric in HELDOUT}
        scores = {f"eval/{name}": value for name, value in {**record.summary, **whole}.items()}
        return record.after if isinstance(record, Evaluation) else 0, _known(scores)
    if isinstance(record, Ability):
        scores = {f"ability/{task}/{name}": value for task, row in record.scores.items() for name, value in row.items()}
        return record.after, _known(scores)
    return 0, {}


def _of_batch(record: Batch | GuardStop) -> dict[str, Any]:
    matrices = list(record.matrices.values())
    ratios = [matrix["collateral_ratio"] for matrix in matrices if matrix["collateral_ratio"] is not None]
    return {
        "batch/facts": len(record.facts),
        "batch/asked": len(record.rechecked),
        "batch/rewritten": len(record.rewritten),
        "batch/seconds": sum(record.seconds.values()),
        "batch/target_probability": record.targets["probability_after"],
        "batch/collateral_ratio": sum(ratios) if ratios else None,
        "batch/relative_norm": max((matrix["relative_norm"] for matrix in matrices), default=None),
        "batch/relative_drift": max((matrix["relative_drift"] for matrix in matrices), default=None),
        "batch/energy_drift": max((matrix["energy_drift"] for matrix in matrices), key=abs, default=None),
        "batch/stopped_by_guard": float(isinstance(record, GuardStop)),
    }


def _known(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


class Tracker:
    """Tells one logger of each line of a run's journal once it is committed.

        tracker = Tracker("wandb")
        editor.watchers.append(tracker)
        editor.edit(facts)
        tracker.close()

    Raises:
        SphereEditError: the logger's package is not installed.
    """

    def __init__(self, service: Service, reporter: Reporter | None = None):
        check_service(service)
        self._service, self._reporter = service, reporter or RichReporter()
        self._log: Log | None = None
        self._close: Close = _nothing
        self._failed = False

    def __call__(self, run: RunFolder, record: Record) -> None:
        """Tell of one line of this run."""
        batch, numbers = numbers_of(record)
        if numbers and ranks.leads():
            self._try(lambda: self._tell(run, numbers, batch))

    def _tell(self, run: RunFolder, numbers: Mapping[str, float], batch: int) -> None:
        if self._log is None:
            settings = {**run.config.settings, "model": public_name(run.config.model.source)}
            self._log, self._close = _BEGIN[self._service](run, settings)
        self._log(numbers, batch)

    def close(self) -> None:
        """Send what is not sent yet."""
        self._try(self._close)

    def _try(self, action: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:  # whatever another package raises
            self._failed = True
            self._reporter.say(f"{self._service} failed and is left out; the run goes on: {error}", "yellow")
            with suppress(Exception):
                self._close()


def _nothing() -> None:
    """Nothing was begun."""


def _trackio(run: RunFolder, settings: Mapping[str, Any]) -> tuple[Log, Close]:
    import trackio

    trackio.init(project=_PROJECT, name=_name(run), config=dict(settings), resume="allow")
    return lambda numbers, batch: trackio.log(dict(numbers), step=batch), trackio.finish


def _wandb(run: RunFolder, settings: Mapping[str, Any]) -> tuple[Log, Close]:
    import wandb

    began = wandb.init(
        project=_PROJECT, name=run.path.name, id=run.config.digest[:16], config=dict(settings), resume="allow"
    )
    began.define_metric("*", step_metric="batch")  # its own steps only grow, and a rollback goes back
    return lambda numbers, batch: began.log({**numbers, "batch": batch}), began.finish


def _tensorboard(run: RunFolder, settings: Mapping[str, Any]) -> tuple[Log, Close]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run.path / "tensorboard"))
    writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in settings.items()), 0)

    def log(numbers: Mapping[str, float], batch: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, batch)
        writer.flush()

    return log, writer.close


def _name(run: RunFolder) -> str:
    """Of a run at a logger that continues runs by name: another run in a folder of the same name is another run."""
    return f"{run.path.name}-{run.config.digest[:6]}"


_BEGIN: dict[Service, Callable[[RunFolder, Mapping[str, Any]], tuple[Log, Close]]] = {
    "trackio": _trackio,
    "wandb": _wandb,
    "tensorboard": _tensorboard,
}
