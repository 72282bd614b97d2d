"""Whether a run is what it says: every file there and as it was written, every batch rebuilt to its recorded hash. No model is run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from sphere_edit.counting import counted
from sphere_edit.errors import SphereEditError
from sphere_edit.evaluation.catalogue import HELDOUT
from sphere_edit.files import check_digest, plain_errors, read_tensors
from sphere_edit.models.checkpoint import Checkpoint
from sphere_edit.models.identity import tensor_bytes
from sphere_edit.progress import Reporter
from sphere_edit.runs.folder import METRICS, RunFolder
from sphere_edit.runs.preparing import session_of
from sphere_edit.runs.records import Unedited

_T = TypeVar("_T")
Original = Callable[[str], Tensor]


@dataclass
class Proof:
    """What was compared, and what is wrong, a sentence each."""

    faults: list[str] = field(default_factory=list)
    files: int = 0
    batches: int = 0

    def sentence(self, path: Path, said: str) -> str:
        """What came of it: that all is whole, with what else was compared; or the first fault, and how many more there are."""
        if not self.faults:
            return f"{path} is whole: {counted(self.files, 'file')} as written; {said}"
        more = f" (and {len(self.faults) - 1} more)" if len(self.faults) > 1 else ""
        return f"{self.faults[0]}{more}"

    def verdict(self, run: RunFolder) -> str:
        """The same of a run."""
        return self.sentence(
            run.path, f"{self.batches} of {counted(run.history.head, 'batch')} rebuilt to the recorded hashes"
        )

    def check(self, work: Callable[[], object]) -> bool:
        """Do something that raises what is wrong; whether nothing was."""
        try:
            work()
        except SphereEditError as error:
            self.faults.append(str(error))
            return False
        return True

    def each(self, found: Iterator[_T]) -> Iterator[_T]:
        """What an iterator gives, up to where it raises what is wrong."""
        try:
            yield from found
        except SphereEditError as error:
            self.faults.append(str(error))


def prove(
    run: RunFolder, reporter: Reporter, model: str | None = None, places: Mapping[str, Any] | None = None
) -> Proof:
    """Compare all that a run is made of with what its journal says.

    W0 is read from the files of the original, one matrix at a time; the model is loaded only where its files hold the matrices in
    another form than it has them in memory.

    Args:
        model: where the original is now, if it has moved.
        places: a device to rebuild on, or a device map and its memory, in place of the run's.
    """
    proof = Proof()
    for path, sha256 in _files(run):
        proof.files += proof.check(lambda path=path, sha256=sha256: _compare(path, sha256))  # type: ignore[misc]
    proof.check(run.check_inputs)
    proof.check(run.facts)
    if run.history.finished:
        proof.files += proof.check(lambda: _compare_metrics(run))
    original: list[Original] = []
    if run.history.head and proof.check(lambda: original.append(original_weights(run, reporter, model, places))):
        _rebuild(run, original[0], proof, reporter, _device(run, (places or {}).get("device")))
    return proof


def original_weights(
    run: RunFolder, reporter: Reporter, model: str | None = None, places: Mapping[str, Any] | None = None
) -> Original:
    """W0 of each edited matrix, float32 ``[d_out, d_in]`` in the digits that the run's model was loaded in.

    Raises:
        SphereEditError: the original is not there, or is not the one that the run edited.
    """
    dtype = getattr(torch, run.config.model.dtype)
    with suppress(SphereEditError):
        checkpoint = Checkpoint(model or run.config.model.source, run.config.architecture)
        for name in run.config.matrices:
            checkpoint.weight(name)
        return lambda name: checkpoint.weight(name).to(dtype).float()
    return session_of(run, reporter, places or {}, False, model).weights.original


def _files(run: RunFolder) -> Iterator[tuple[Path, str | None]]:
    """Every file that the journal speaks of but facts and updates, which are read elsewhere, with its hash if that is of its bytes."""
    for name, digest in run.inputs.items():
        path = run.path / name
        if path.name != "config.json":
            yield path, None if path.suffix == ".safetensors" else digest
    scores = {record.session: record.sha256 for record in run.records if isinstance(record, Unedited)}
    for session, sha256 in scores.items():
        yield run.path / "evaluations" / f"unedited-{session:04d}.json", sha256
    for evaluation in run.history.evaluations:
        yield run.path / "evaluations" / f"batch-{evaluation.after:04d}.json", evaluation.sha256
    yield from ((path, None) for path in sorted((run.path / "checkpoints").glob("batch-*.safetensors")))


def _compare(path: Path, sha256: str | None) -> None:
    if not path.is_file():
        raise SphereEditError(f"{path} is missing; put it back from a backup")
    if path.suffix == ".safetensors":
        read_tensors(path)
        return
    with plain_errors(path, "read"):
        check_digest(path, path.read_bytes(), sha256)


def _compare_metrics(run: RunFolder) -> None:
    """What stands in ``metrics.json`` is what the journal says of the last batch; where it is of an earlier one, it only has to be whole."""
    metrics, evaluation = run.metrics(), run.history.evaluation_at_head(final=True)
    if evaluation is None or metrics["after"] != run.history.head:
        return
    edited = metrics["edited"]
    measured = {**evaluation.summary, **{metric.name: getattr(evaluation, metric.name) for metric in HELDOUT}}
    for name, value in measured.items():
        if edited.get(name) != value:
            raise SphereEditError(
                f"{run.path / METRICS} says {edited.get(name)} of {name}, and the journal {value}; --resume writes the file anew"
            )


def _device(run: RunFolder, device: str | None) -> torch.device:
    """Where to rebuild: the kind of device that edited, if it is here, for another may round otherwise."""
    wanted = torch.device(device or run.config.device)
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError):
        return torch.device("cpu")
    return wanted


def _rebuild(run: RunFolder, original: Original, proof: Proof, reporter: Reporter, device: torch.device) -> None:
    """Add update after update to W0, matrix by matrix, and compare each sum, and each checkpoint, with the journal's hashes."""
    names, head = run.config.matrices, run.history.head
    reached = dict.fromkeys(names, 0)  # the last batch whose weight is as recorded
    with reporter.bar("rebuilding", len(names) * head, "update") as advance:
        for name in names:
            for number, weight in proof.each(_weights(run, name, original, device)):
                if not _matches(run, name, number, weight):
                    proof.faults.append(_other(run, name, number, device))
                    break
                reached[name] = number
                advance(1)
    proof.batches = min(reached.values())


def _weights(run: RunFolder, name: str, original: Original, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """The working weight of a matrix after each batch, from the updates alone."""
    batches = run.history.batches
    taken_up = {batch.restored for batch in batches}
    kept = {0: original(name).to(device)}  # the weights that a later batch begins from
    weight = kept[0]
    for batch in batches:
        if batch.restored is None:
            weight = run.read_update(batch.number, name)[0][name].added_to(weight)
        else:
            weight = kept[batch.restored]
        if batch.number in taken_up:
            kept[batch.number] = weight
        yield batch.number, weight


def _matches(run: RunFolder, name: str, number: int, weight: Tensor) -> bool:
    recorded = run.history.batches[number - 1].matrices[name]["sha256"]
    same = hashlib.sha256(tensor_bytes(weight)).hexdigest() == recorded
    if same and run.nearest_checkpoint(number) == number:
        return torch.equal(run.read_checkpoint(number, name)[0][name], weight.cpu())
    return same


def _other(run: RunFolder, name: str, number: int, device: torch.device) -> str:
    why = (
        ""
        if device == torch.device(run.config.device)
        else f" (it was edited on {run.config.device}, which rounds otherwise)"
    )
    return f"{name} after batch {number} is not what {run.path} recorded, rebuilt on {device}{why}"
