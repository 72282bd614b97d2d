"""Statistics of each edited matrix's inputs (C0, its null space): measured once, cached; and all that a run keeps of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sphere_edit.editing.moments import Corpus, second_moments
from sphere_edit.editing.problem import Statistics
from sphere_edit.errors import SphereEditError
from sphere_edit.files import cache_dir, is_whole, read_tensors, write_tensors
from sphere_edit.models.identity import cache_key, fingerprints
from sphere_edit.models.loading import LoadedModel
from sphere_edit.numerics.linalg import NullSpaceRule, null_space
from sphere_edit.progress import Reporter


def cached_moments(
    loaded: LoadedModel,
    corpus: Corpus,
    layers: Sequence[int],
    names: Sequence[str],
    max_tokens: int,
    tolerance: float,
    reporter: Reporter,
) -> dict[str, Path]:
    """The files of the cache with each matrix's second moments; what is not there yet is measured.

    The cache key covers the weights up to the layer, the layer's matrix, the text, the batching, the tolerance and what
    computes (`cache_key`), so that no run ever picks up another model's statistics, or another machine's.
    """
    hashes = fingerprints(loaded.model, loaded.architecture.layers, layers)
    files: dict[str, Path] = {}
    for layer, name in zip(layers, names, strict=True):
        key = cache_key(loaded.device, hashes[layer], name, corpus.sha256, max_tokens, tolerance)
        files[name] = cache_dir() / "moments" / f"{key}.safetensors"
    missing = [name for name in names if not is_whole(files[name])]
    if missing:
        together = hashlib.sha256("|".join(files[name].stem for name in missing).encode()).hexdigest()
        partial = cache_dir() / "moments" / f"partial-{together}.safetensors"
        moments = second_moments(loaded, corpus.passages, missing, max_tokens, reporter, tolerance, partial)
        for name, moment in moments.items():
            write_tensors(files[name], {"second_moment": moment})
    return files


def load_statistics(
    folder: Path, names: Sequence[str], devices: Mapping[str, torch.device], away: bool = False
) -> dict[str, Statistics]:
    """What a run was started with, by matrix: everything that its ingredients have measured.

    Args:
        devices: of each matrix.
        away: statistics lie in CPU memory, and go to their matrix's device when they are asked for (`Kept`).
    """
    kinds = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    found = {}
    for name in names:
        files = [kind / f"{name}.safetensors" for kind in kinds]
        parts = [_checked(read_tensors(file), file) for file in files if file.is_file()]
        measured = {key: value for part in parts for key, value in part.items()}
        here = {key: value if away else value.to(devices[name]) for key, value in measured.items()}
        found[name] = Statistics(here, devices[name] if away else None)
    return found


def _checked(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Statistics as they were read, if they are what their file is for: one float tensor by its name."""
    kind = file.parent.name
    if list(tensors) == [kind] and tensors[kind].is_floating_point() and bool(tensors[kind].isfinite().all()):
        return tensors
    raise SphereEditError(f"{file} is damaged: expected a finite float tensor '{kind}'; put it back from a backup")


def cached_null_spaces(
    loaded: LoadedModel, moments: Mapping[str, Path], rule: NullSpaceRule, threshold: float, reporter: Reporter
) -> dict[str, Path]:
    """The files of the cache with each matrix's null space, found from its second moments in ``moments`` where it is not there yet.

    The cache key is that of the second moments, and the rule.
    """
    found: dict[str, Path] = {}
    with reporter.bar("null spaces", len(moments), "layer") as advance:
        for name, file in moments.items():
            found[name] = cache_dir() / "null-spaces" / f"{file.stem}-{rule.value}-{threshold!r}.safetensors"
            if not is_whole(found[name]):
                moment: Tensor = read_tensors(file)["second_moment"].to(loaded.device)
                write_tensors(found[name], {"null_space": null_space(moment, rule, threshold).float()})
            advance(1)
    return found
