"""The files of a model's source: where they lie, the tensors in them, and what can be told of them without loading any."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sphere_edit.errors import SphereEditError
from sphere_edit.files import plain_errors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_LFS = b"version https://git-lfs"
_LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}

# what surrounds weights: configuration, tokenizer, templates, licences, policies, cards
_COMPANIONS = (".json", ".jinja", ".txt", ".md", ".model", ".tiktoken", ".spm", ".bpe", ".vocab")
_NAMED = ("licen", "notice", "copying", "use_policy", "acceptable_use", "authors", ".gitattributes")
_TEMPLATES = "additional_chat_templates"
_OF_AN_EXPORT = "sphere_edit.json"  # what an export of ours says of itself: the next one says it anew
_NOT_COPIED = ("adapter_config.json", "trainer_state.json")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor where it lies: bytes ``start`` to ``end`` of ``file``, in row-major order; dtype as safetensors spells it."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def content(self) -> bytes:
        """Its bytes."""
        with plain_errors(self.file, "read"), self.file.open("rb") as file:
            file.seek(self.start)
            return file.read(self.end - self.start)


@dataclass(frozen=True)
class Companions:
    """Files of a source besides its weights: those an export takes along, names of those it leaves behind, and the card."""

    taken: tuple[Path, ...]
    left: tuple[str, ...]
    card: Path | None


NOTHING = Companions((), (), None)  # of a source without files


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a source.

    Raises:
        SphereEditError: it is not there, or no JSON object.
    """
    return read_object(folder / "config.json")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        SphereEditError: the file is a pointer, is damaged, or holds something else.
    """
    refuse_pointer(path)
    with plain_errors(path, "read"):
        found = json.loads(path.read_text("utf-8"))
    if not isinstance(found, dict):
        raise SphereEditError(f"{path} is damaged: it holds no JSON object; put it back from a backup")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors that transformers loads: one file, or the shards that the index names.

    Raises:
        SphereEditError: there are none, or a shard is missing.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise SphereEditError(f"folder '{folder}' holds no {SINGLE} and no {INDEX}; transformers loads no other names")
    shards = read_object(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise SphereEditError(f"{folder / INDEX} is damaged: it does not say which shard holds which tensor")
    names = sorted(set(shards.values()))
    outside = next((name for name in names if Path(name).name != name), None)
    if outside is not None:
        raise SphereEditError(f"{folder / INDEX} names a shard outside its folder: '{outside}'; get the model again")
    lacking = [name for name in names if not (folder / name).is_file()]
    if lacking:
        raise SphereEditError(
            f"folder '{folder}' lacks {len(lacking)} of the {len(names)} shards that {INDEX} names; the first: {lacking[0]}. "
            "Download the model again"
        )
    return [folder / name for name in names]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a source's safetensors by its name in the files; no weights are read.

    Raises:
        SphereEditError: a file is missing, cut short, a pointer or damaged.
    """
    return {tensor.name: tensor for file in weight_files(folder) for tensor in read_header(file)}


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, from its header (https://huggingface.co/docs/safetensors).

    Raises:
        SphereEditError: the file is cut short, a pointer or damaged.
    """
    refuse_pointer(file)
    with plain_errors(file, "read"):
        size = file.stat().st_size
        with file.open("rb") as opened:
            first = opened.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
            text = opened.read(length) if 2 <= length <= min(size - 8, _LARGEST_HEADER) else b""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        found = [_stored(file, name, entry, 8 + length) for name, entry in header.items()]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise SphereEditError(f"{file} is no safetensors file, or a damaged one; download it again") from None
    expected = max((tensor.end for tensor in found), default=8 + length)
    if size < expected:
        raise SphereEditError(f"{file} is cut short: {size} of {expected} bytes are there; download it again")
    return found


def _stored(file: Path, name: str, entry: Mapping[str, Any], base: int) -> StoredTensor:
    start, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(size) for size in entry["shape"])
    width = _BYTES.get(entry["dtype"])
    if not 0 <= start <= end or (width is not None and math.prod(shape) * width != end - start):
        raise ValueError
    return StoredTensor(file, name, str(entry["dtype"]), shape, base + start, base + end)


def companions(folder: Path, code: bool = False) -> Companions:
    """What of a source an export takes along besides the weights; with ``code``, Python files too.

    Weights in other forms are not edited, and are left behind with everything whose kind is unknown. So is a link that
    leads out of the place where ``config.json`` lies: a model from elsewhere could name any file of this machine.
    """
    home = [folder.resolve(), (folder / "config.json").resolve().parent]
    weights = {file.name for file in weight_files(folder)}
    taken: list[Path] = []
    left: list[Path] = []
    for path in sorted([*folder.iterdir(), *folder.glob(f"{_TEMPLATES}/*.jinja")]):
        name = path.relative_to(folder).as_posix()
        hidden = path.is_dir() and path.name.startswith(".")
        if hidden or path.name in weights or name in (_TEMPLATES, _OF_AN_EXPORT):
            continue
        inside = any(path.resolve().is_relative_to(place) for place in home)
        (taken if path.is_file() and inside and _accompanies(path.name, code) else left).append(path)
    card = next((path for path in taken if path == folder / "README.md"), None)
    taken = [path for path in taken if path != card]
    return Companions(tuple(taken), tuple(path.relative_to(folder).as_posix() for path in left), card)


def _accompanies(name: str, code: bool) -> bool:
    low = name.lower()
    if low in _NOT_COPIED or (low.endswith(".index.json") and name != INDEX):
        return False
    return low.endswith(_COMPANIONS) or low.startswith(_NAMED) or (code and low.endswith(".py"))


def cached(name: str, file: str, fetch: bool = True) -> Path | None:
    """A file of a hub model, from the cache or (``fetch``) from the hub; None where there is none or no way to it."""
    from transformers.utils import cached_file

    try:
        found = cached_file(
            name,
            file,
            local_files_only=not fetch,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):  # what is wrong with the name is told by whoever loads the model
        return None
    return None if found is None else Path(found)


def hub_folder(name: str) -> Path:
    """A hub model's folder in the local cache, with its configuration and safetensors.

    Raises:
        SphereEditError: there is no such model, or it cannot be fetched.
    """
    folder = _snapshot(name, None, ["config.json", SINGLE, INDEX])
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return folder
    shards = sorted(set(read_object(folder / INDEX).get("weight_map", {}).values()))
    return _snapshot(name, folder.name, ["config.json", INDEX, *shards])


def hub_companions(name: str, code: bool = False) -> Path:
    """A hub model's folder in the local cache, at the revision last loaded, with everything that an export takes along.

    Raises:
        SphereEditError: it was not loaded from the hub, or cannot be fetched.
    """
    config = cached(name, "config.json", fetch=False)
    if config is None:
        raise SphereEditError(f"'{name}' has no files of its own")
    wanted = [*(f"*{ending}" for ending in _COMPANIONS), *(f"{word}*" for word in _NAMED)]
    wanted += [f"{form}*" for word in _NAMED for form in (word.upper(), word.capitalize())]
    return _snapshot(name, config.parent.name, [*wanted, *(["*.py"] if code else [])])


def _snapshot(name: str, revision: str | None, wanted: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(wanted)))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise SphereEditError(f"model '{name}' cannot be found: {' '.join(str(error).split())[:400]}") from None


def refuse_pointer(path: Path) -> None:
    """Refuse a Git LFS pointer in the place of a file.

    Raises:
        SphereEditError: ``path`` is one, or cannot be read.
    """
    with plain_errors(path, "read"), path.open("rb") as file:
        start = file.read(len(_LFS))
    if start == _LFS:
        raise SphereEditError(
            f"{path} is a Git LFS pointer, a note of where the file is instead of the file; run 'git lfs pull' in its folder"
        )


def pickled(names: Iterable[str]) -> Sequence[str]:
    """Those of some file names that are pickled weights."""
    return sorted(name for name in names if name.endswith(_PICKLED))
