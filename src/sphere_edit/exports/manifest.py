"""What every export says of itself, in ``sphere_edit.json``: its form, the state of which run it is, and a hash of each of its files."""

from __future__ import annotations

import hashlib
import os.path
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from sphere_edit._version import __version__
from sphere_edit.errors import SphereEditError
from sphere_edit.files import plain_errors, read_json, write_json
from sphere_edit.models.identity import tensor_bytes
from sphere_edit.runs.folder import RunFolder
from sphere_edit.runs.records import first_fault

SCHEMA = 1
Form = Literal["hf", "delta", "lora", "gguf"]


class Base(BaseModel):
    """The original model: its name in public, and the SHA-256 of its weights (`models.identity.fingerprint`)."""

    source: str
    fingerprint: str
    dtype: str
    family: str


class State(BaseModel):
    """Which state of which run: the hash of its settings, the batch, and the hashes of the working weights after it."""

    run: str
    batch: int
    facts: int
    working: dict[str, str]


class Manifest(BaseModel):
    """The content of an export's ``sphere_edit.json``.

    Attributes:
        matrices: SHA-256 of each edited matrix as the model runs with it, float32 ``[d_out, d_in]`` (`digest_of`).
        files: SHA-256 of every other file of the export, by its path in the folder.
        details: what its form alone has to say.
        state: None where a model was exported without its run.
    """

    model_config = ConfigDict(frozen=True, populate_by_name=True)
    NAME: ClassVar[str] = "sphere_edit.json"

    version: int = Field(SCHEMA, alias="schema")
    form: Form
    made_by: str = f"sphere-edit {__version__}"
    base: Base
    state: State | None
    matrices: dict[str, str]
    files: dict[str, str] = {}
    details: dict[str, Any] = {}

    def as_content(self) -> dict[str, Any]:
        """Plain values, for the file."""
        return self.model_dump(mode="json", by_alias=True)

    def write(self, folder: Path) -> None:
        """Put it into a folder that holds all other files of the export."""
        files = {name: file_digest(folder / name) for name in _names(folder)}
        write_json(folder / self.NAME, self.model_copy(update={"files": files}).as_content())


def state_of(run: RunFolder, batch: int) -> State:
    """A run's state after a batch, as its journal says it."""
    matrices = run.history.batches[batch - 1].matrices if batch else {}
    facts = len(run.history.retained) if batch == run.history.head else 0
    working = {name: entry["sha256"] for name, entry in matrices.items()}
    return State(run=run.config.digest, batch=batch, facts=facts, working=working)


def is_export(folder: str | Path) -> bool:
    """Whether a folder says that it is one."""
    return os.path.isfile(Path(folder) / Manifest.NAME)  # noqa: PTH113  # a name too long for a file is none


def read_manifest(folder: Path) -> Manifest:
    """What an export says of itself.

    Raises:
        SphereEditError: it says nothing, or what it says is damaged or of a newer version.
    """
    path = folder / Manifest.NAME
    if not is_export(folder):
        raise SphereEditError(
            f"{folder} is no export: it holds no {Manifest.NAME}, which every export of sphere-edit has"
        )
    content = read_json(path)
    if isinstance(content, Mapping) and isinstance(content.get("schema"), int) and content["schema"] > SCHEMA:
        raise SphereEditError(f"{folder} was written by a newer sphere-edit; upgrade")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise SphereEditError(f"{path} is damaged ({first_fault(error)}); make the export again") from None


def changed_files(folder: Path, manifest: Manifest) -> Iterator[str]:
    """What is wrong with the files of an export, one sentence each."""
    for name, sha256 in manifest.files.items():
        path = folder / name
        if not path.is_file():
            yield f"{path} is missing"
        elif file_digest(path) != sha256:
            yield f"{path} is not what was written there"


def digest_of(weight: Tensor) -> str:
    """SHA-256 of a matrix's bytes, float32 ``[d_out, d_in]`` in row-major order."""
    return hashlib.sha256(tensor_bytes(weight)).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read piece by piece."""
    digest = hashlib.sha256()
    with plain_errors(path, "read"), path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _names(folder: Path) -> list[str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [name for path in files if (name := path.relative_to(folder).as_posix()) != Manifest.NAME]
