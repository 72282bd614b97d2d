"""Whether an export is what it says: every file as it was written, and its edited matrices those of the run it names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sphere_edit.exports import delta, gguf, hf, lora
from sphere_edit.exports.manifest import Manifest, State, changed_files, digest_of, read_manifest
from sphere_edit.progress import Reporter
from sphere_edit.runs.folder import RunFolder
from sphere_edit.runs.proof import Original, Proof, original_weights
from sphere_edit.runs.weights import RunWeights

_FORMS: dict[str, Callable[[Path, Manifest, RunWeights], Iterator[str]]] = {
    "hf": hf.differing,
    "delta": delta.differing,
    "lora": lora.differing,
    "gguf": gguf.differing,
}


def prove_export(
    folder: Path,
    run: RunFolder | None,
    reporter: Reporter,
    model: str | None = None,
    places: Mapping[str, Any] | None = None,
) -> Proof:
    """Compare an export with its manifest and, where its run is given, with the weights that the run's journal and updates make.

    Args:
        model: where the original is now, if it has moved.
        places: a device, or a device map and its memory, in place of the run's.

    Raises:
        SphereEditError: the folder is no export.
    """
    manifest = read_manifest(folder)
    proof = Proof(files=len(manifest.files))
    wrong = list(changed_files(folder, manifest))
    proof.faults, proof.files = wrong, proof.files - len(wrong)
    if run is not None:

        def original() -> Original:
            return original_weights(run, reporter, model, places)

        proof.check(lambda: proof.faults.extend(_differing(folder, manifest, run, original)))
    return proof


def _differing(folder: Path, manifest: Manifest, run: RunFolder, original: Callable[[], Original]) -> Iterator[str]:
    state = manifest.state
    if state is None or not _is_of(state, run):
        yield f"{folder} is not an export of {run.path} as that stands"
        return
    weights = RunWeights(run, original())
    wanted = manifest.matrices.items()
    other = [name for name, sha256 in wanted if digest_of(weights.deployed(name, state.batch)) != sha256]
    yield from (f"{name} is not what {run.path} makes of it after batch {state.batch}" for name in other)
    if not other:
        yield from _FORMS[manifest.form](folder, manifest, weights)


def _is_of(state: State, run: RunFolder) -> bool:
    """Whether the state that an export names is one that the run went through and that stands."""
    if state.run != run.config.digest or state.batch > run.history.head:
        return False
    recorded = run.history.batches[state.batch - 1].matrices if state.batch else {}
    return state.working == {name: entry["sha256"] for name, entry in recorded.items()}
