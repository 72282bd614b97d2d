"""A folder that plain transformers and vLLM load: the source's own files but for the edited tensors, a card and a manifest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from sphere_edit.errors import SphereEditError
from sphere_edit.exports.card import Note
from sphere_edit.exports.gauge import Gauge
from sphere_edit.exports.manifest import Manifest
from sphere_edit.exports.shipment import Shipment
from sphere_edit.models.checkpoint import Checkpoint
from sphere_edit.models.configuration import CAUSAL, loader_of
from sphere_edit.models.loading import load_beside
from sphere_edit.models.replica import Replica
from sphere_edit.models.source import read_config
from sphere_edit.runs.weights import RunWeights


def write_hf(
    shipment: Shipment, folder: Path, dtype: torch.dtype | None = None, gauge: Gauge | None = None
) -> list[str]:
    """Write the edited model to a new folder: the source's own files, but for the edited tensors, the card and the manifest.

    Where the edited tensors cannot be found in the source's files, or not in ``dtype``, all weights are written anew by transformers.

    Args:
        gauge: measures the folder once it is written, as it loads.

    Returns:
        what a user should know of it, in sentences.

    Raises:
        SphereEditError: the folder is not empty or cannot be written, or a weight does not fit ``dtype``; nothing half-written is
            left behind.
    """
    replica = Replica(shipment.loaded, shipment.weights, dtype)
    manifest = shipment.manifest("hf", dtype=str(replica.dtype).removeprefix("torch."))

    def note(written: Path) -> Note:
        if gauge is None:
            return Note()
        return Note(measured={"this folder": gauge.measure(load_beside(written, shipment.loaded), "the export")})

    with shipment.folder(folder, manifest, note, replica.companions) as temporary:
        replica.write(temporary)
    told = []
    if replica.why_anew:
        kept = "tokenizer and the rest are the source's own" if replica.source else "so are configuration and tokenizer"
        told.append(f"All weights were written anew by transformers, because {replica.why_anew}; {kept}")
    if replica.companions.left:
        told.append(
            f"Left behind, as nothing that loads the edited model needs it: {', '.join(replica.companions.left)} "
            "(weights in other forms are not edited; code comes along only where it was trusted)"
        )
    return told


def loaded_by(folder: Path) -> str:
    """How transformers loads such a folder, as one would write it."""
    try:
        loader = loader_of(read_config(folder), str(folder), trust=True)
    except SphereEditError:  # a type that only this process knows
        loader = CAUSAL
    return f"{loader}.from_pretrained('{folder}')"


def differing(folder: Path, manifest: Manifest, weights: RunWeights) -> Iterator[str]:
    """Which edited matrices of such a folder are not the run's, one sentence each."""
    assert manifest.state is not None
    stored = Checkpoint(str(folder.absolute()), weights.run.config.architecture)
    dtype = getattr(torch, manifest.details["dtype"])
    for name in manifest.matrices:
        wanted = weights.deployed(name, manifest.state.batch).to(dtype).float()
        if not torch.equal(stored.weight(name), wanted):
            yield f"{name} in {folder} is not that of the run"
