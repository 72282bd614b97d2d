"""A method's statistics (C0 or its null space) for each edited matrix: measured once, cached, kept with the run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sphere_edit.editing.methods.base import Method, Statistics
from sphere_edit.editing.moments import Corpus, second_moments
from sphere_edit.errors import SphereEditError
from sphere_edit.files import cache_dir, copied, is_whole, read_tensors, write_tensors
from sphere_edit.models.identity import cache_key, fingerprints
from sphere_edit.models.loading import LoadedModel
from sphere_edit.numerics.linalg import null_space
from sphere_edit.progress import Reporter


def prepare_statistics(
    loaded: LoadedModel,
    corpus: Corpus,
    layers: Sequence[int],
    names: Sequence[str],
    method: Method,
    max_tokens: int,
    tolerance: float,
    reporter: Reporter,
    folder: Path,
) -> None:
    """Put second moments, and what else the method needs, into ``folder``, one file a kind and matrix, taken from the cache where it is there.

    Second moments are kept with a null space too: they tell what an update does to ordinary keys.

    The cache key covers the weights up to the layer, the layer's matrix, the text, the batching, the tolerance, the null-space
    rule and what computes (`cache_key`), so that no run ever picks up another model's statistics, or another machine's.
    """
    hashes = fingerprints(loaded.model, layers)
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
    for name, file in files.items():
        copied(file, folder / "second_moment" / f"{name}.safetensors")
    if method.needs.statistics == "null_space":
        for name, file in _null_spaces(loaded, files, method, reporter).items():
            copied(file, folder / "null_space" / f"{name}.safetensors")


def load_statistics(folder: Path, names: Sequence[str], device: torch.device) -> dict[str, Statistics]:
    """The statistics a run was started with: what its method needs, and second moments wherever there are any."""
    found = {}
    for name in names:
        files = [folder / kind / f"{name}.safetensors" for kind in ("second_moment", "null_space", "anchor")]
        parts = [_checked(read_tensors(file), file) for file in files if file.is_file()]
        found[name] = Statistics(**{key: value.to(device) for part in parts for key, value in part.items()})
    return found


def _checked(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Statistics as they were read, if they are what their file is for: one float tensor by its name."""
    kind = file.parent.name
    if list(tensors) == [kind] and tensors[kind].is_floating_point() and bool(tensors[kind].isfinite().all()):
        return tensors
    raise SphereEditError(f"{file} is damaged: expected a finite float tensor '{kind}'; put it back from a backup")


def _null_spaces(loaded: LoadedModel, files: dict[str, Path], method: Method, reporter: Reporter) -> dict[str, Path]:
    assert method.needs.null_space is not None
    rule, threshold = method.needs.null_space
    found: dict[str, Path] = {}
    with reporter.bar("null spaces", len(files), "layers") as advance:
        for name, file in files.items():
            found[name] = cache_dir() / "null-spaces" / f"{file.stem}-{rule.value}-{threshold!r}.safetensors"
            if not is_whole(found[name]):
                moment: Tensor = read_tensors(file)["second_moment"].to(loaded.device)
                write_tensors(found[name], {"null_space": null_space(moment, rule, threshold).float()})
            advance(1)
    return found
