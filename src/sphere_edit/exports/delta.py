"""ΔW alone: what was changed, for whoever has the original; applied to it, it gives the bits of the whole export.

A matrix is kept as the factors of its updates where these are smaller, and as one difference otherwise. Neither is added up by a
library's matrix product, whose rounding differs from machine to machine: products are summed one by one in float64, which every machine
rounds alike. Where that sum still differs from what the run's machine made of it, the entry itself is kept beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sphere_edit.errors import SphereEditError
from sphere_edit.exports.card import Note
from sphere_edit.exports.hf import write_hf
from sphere_edit.exports.manifest import Manifest, changed_files, digest_of, read_manifest
from sphere_edit.exports.shipment import Shipment
from sphere_edit.files import plain_errors, read_tensors, write_tensors, write_text
from sphere_edit.models.loading import load_model
from sphere_edit.models.placement import Placement
from sphere_edit.models.weights import EditedWeights
from sphere_edit.numerics.update import LowRankUpdate, Update
from sphere_edit.progress import Reporter
from sphere_edit.runs.folder import RunFolder
from sphere_edit.runs.weights import RunWeights

FILE = "delta.safetensors"
_MODEL_CARD = "MODEL_CARD.md"  # of the whole model, for whoever applies the delta
_ROWS = 64  # of a matrix that are summed at one time; changes memory, not results
_REVEALS = (
    "A delta shows which subjects were edited. Its card names the facts; and without the card, its factors are made of the subjects' keys, "
    "so that whoever has the original can look for the subjects that have these keys. Give it to nobody who may not know them."
)
Parts = dict[
    str, Tensor
]  # of one matrix: ``left``, ``right`` and ``batches``, or ``delta``; and ``where`` and ``values``


def write_delta(shipment: Shipment, run: RunFolder, folder: Path) -> list[str]:
    """Write what a run changed to a new folder, which `apply_delta` turns into its whole export.

    Returns:
        what a user should know of it, in sentences.

    Raises:
        SphereEditError: the folder is not empty or cannot be written.
    """
    weights, kinds = shipment.weights, {}
    tensors: dict[str, Tensor] = {}
    for name in weights.names:
        parts = _smallest(run, name, weights.original(name), weights.deployed(name), shipment.loaded.dtype)
        tensors |= {f"{name}/{part}": value for part, value in parts.items()}
        kinds[name] = "factors" if "left" in parts else "difference"
    manifest = shipment.manifest("delta", kinds=kinds)
    text = (
        f"This folder holds the change alone. `sphere-edit apply DELTA BASE -o DIR` adds it to the original, whose weights "
        f"have the hash above, and gives the bits of the whole export.\n\n{_REVEALS}"
    )
    with shipment.folder(folder, manifest, lambda _: Note("sphere-edit", text)) as temporary:
        write_tensors(temporary / FILE, tensors)
        write_text(temporary / _MODEL_CARD, shipment.card(Note()))
    return [_REVEALS]


def apply_delta(
    delta: Path,
    base: str,
    folder: Path,
    reporter: Reporter,
    trust_remote_code: bool = False,
    placement: Placement | None = None,
) -> list[str]:
    """Add a delta to its original, and write the whole edited model to a new folder.

    Args:
        base: the original: a hub id, a local folder, a ``.gguf`` file or ``smollm2``.
        placement: how it is spread, where it does not fit memory whole.

    Raises:
        SphereEditError: the delta is damaged or none, or ``base`` is another model.
    """
    manifest = read_manifest(delta)
    if manifest.form != "delta":
        raise SphereEditError(
            f"{delta} is an export as {manifest.form}, not a delta; make one with: sphere-edit export RUN --as delta"
        )
    wrong = next(changed_files(delta, manifest), None)
    if wrong is not None:
        raise SphereEditError(f"{wrong}; get the delta again")
    loaded = load_model(base, "cpu", manifest.base.dtype, trust_remote_code, reporter, placement)
    if loaded.fingerprint != manifest.base.fingerprint:
        raise SphereEditError(
            f"'{base}' is not the model that {delta} was made from: its weights have the hash {loaded.fingerprint[:16]}…, "
            f"and those of '{manifest.base.source}' had {manifest.base.fingerprint[:16]}…"
        )
    weights = EditedWeights(loaded.model, loaded.architecture, list(manifest.matrices))
    for name, parts in _read(delta).items():
        weight = rebuilt(weights.original(name), parts, loaded.dtype)
        if digest_of(weight) != manifest.matrices[name]:
            raise SphereEditError(f"{name} made from {delta} is not what its manifest says; get the delta again")
        weights.deploy(name, weight)
    with plain_errors(delta / _MODEL_CARD, "read"):
        card = (delta / _MODEL_CARD).read_text("utf-8")
    return write_hf(Shipment(loaded, weights, lambda note: card, manifest.state, reporter), folder)


def differing(folder: Path, manifest: Manifest, weights: RunWeights) -> Iterator[str]:
    """Which matrices a delta would make other than the run's, one sentence each."""
    assert manifest.state is not None
    dtype = getattr(torch, manifest.base.dtype)
    for name, parts in _read(folder).items():
        if not torch.equal(rebuilt(weights.original(name), parts, dtype), weights.deployed(name, manifest.state.batch)):
            yield f"{name} in {folder} is not that of the run"


def rebuilt(original: Tensor, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """W0 ``[d_out, d_in]`` with its change, float32 in the digits of ``dtype``; the same bits on every machine."""
    weight = original.float().cpu()
    if "delta" in parts:
        weight = (weight.double() + parts["delta"].double()).float()
    else:
        sizes = parts["batches"].tolist()
        for left, right in zip(parts["left"].split(sizes, 1), parts["right"].split(sizes, -2), strict=True):
            weight = _sum_of_products(weight, left.double(), right.double())
    stored = weight.to(dtype)
    stored.view(-1)[parts["where"].long()] = parts["values"].to(dtype)
    return stored.float()


def _sum_of_products(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``W + L R`` rounded to float32, the products of float64 factors added one after another, so that no machine rounds otherwise."""
    if weight.dim() == 3:  # by expert
        return torch.stack([_sum_of_products(one, left, part) for one, part in zip(weight, right, strict=True)])
    sums = []
    for rows, factors in zip(weight.double().split(_ROWS), left.split(_ROWS), strict=True):
        total = rows.clone()
        for number in range(left.shape[1]):
            total += torch.outer(factors[:, number], right[number])
        sums.append(total)
    return torch.cat(sums).float()


def _smallest(run: RunFolder, name: str, original: Tensor, wanted: Tensor, dtype: torch.dtype) -> Parts:
    """The parts of a matrix that take the fewest bytes."""
    ways: list[Callable[[], Parts | None]] = [
        lambda: {"delta": (wanted - original).to(dtype).cpu()},
        lambda: _factors(run, name, wanted.numel() * dtype.itemsize),
    ]
    found = [_exact(original, parts, wanted.cpu(), dtype) for way in ways if (parts := way()) is not None]
    return min(found, key=_size)


def _factors(run: RunFolder, name: str, limit: int) -> Parts | None:
    """The factors of every batch's update, one batch after another; None where one has none, or they take ``limit`` bytes.

    None too where facts were removed: their factors would go out with the others', and be subtracted again.
    """
    if run.history.removed:
        return None
    updates: list[Update] = []
    for _, found, _ in run.updates(0, run.history.head, name):
        updates.append(found[name])
        if not isinstance(found[name], LowRankUpdate) or sum(_size(one.tensors()) for one in updates) >= limit:
            return None
    kept = [one.tensors() for one in updates]
    if not kept:
        return None
    return {
        "left": torch.cat([one["left"] for one in kept], 1).float(),
        "right": torch.cat([one["right"] for one in kept], -2).float(),
        "batches": torch.tensor([one["left"].shape[1] for one in kept]),
    }


def _exact(original: Tensor, parts: Parts, wanted: Tensor, dtype: torch.dtype) -> Parts:
    """These parts, with the entries beside them that they alone would make otherwise."""
    none = {"where": torch.zeros(0, dtype=torch.int64), "values": torch.zeros(0, dtype=dtype)}
    alone = rebuilt(original, {**parts, **none}, dtype)
    where = (alone.view(torch.int32) != wanted.view(torch.int32)).flatten().nonzero().flatten()  # −0 is not 0
    small = torch.int32 if wanted.numel() < 2**31 else torch.int64
    return {**parts, "where": where.to(small), "values": wanted.flatten()[where].to(dtype)}


def _size(parts: Mapping[str, Tensor]) -> int:
    return sum(part.numel() * part.itemsize for part in parts.values())


def _read(folder: Path) -> dict[str, Parts]:
    """The parts of each matrix."""
    found: dict[str, Parts] = {}
    for key, value in read_tensors(folder / FILE).items():
        name, part = key.rsplit("/", 1)
        found.setdefault(name, {})[part] = value
    return found
