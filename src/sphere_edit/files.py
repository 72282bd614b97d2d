"""Files that are either whole or not there, told in plain words when they cannot be written."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

from sphere_edit import ranks
from sphere_edit.errors import SphereEditError

_SUMS = "sha256"  # in the header of a safetensors file: the hash of each tensor, by name
_MOST_VALUES = 100_000  # of a YAML document
_ALIGNMENT = 64  # bytes: what torch's own tensors on a CPU begin at a multiple of
_UNFINISHED = ".unfinished"  # how the name of a temporary folder ends


class _Damaged(SphereEditError):
    """A file was read, and is not what was written."""


def cache_dir() -> Path:
    """Where statistics and converted models are kept: ``SPHERE_EDIT_CACHE``, else ``~/.cache/sphere-edit``."""
    return Path(os.environ.get("SPHERE_EDIT_CACHE") or Path.home() / ".cache" / "sphere-edit")


@contextmanager
def plain_errors(path: Path, doing: str = "written") -> Iterator[None]:
    """Turn what the file system says into one line that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        text = str(error)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
            raise SphereEditError(
                f"the disk is full: {path} could not be {doing}. Everything committed before is safe; "
                "free some space and go on with --resume"
            ) from None
        reason = os.strerror(number) if number else text
        kind = SphereEditError if isinstance(error, OSError) else _Damaged
        raise kind(f"{path} could not be {doing}: {reason}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _Damaged(f"{path} is damaged ({error}); put it back from a backup") from None


def yaml_value(text: str) -> Any:
    """What a YAML document says.

    Raises:
        ValueError: its aliases make far more of it than stands there, or go round in a circle.
        Exception: whatever the library stumbles over.
    """
    import yaml

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None and _spelled_out(root, {}) > _MOST_VALUES:
        raise ValueError(f"with its aliases spelled out it holds more than {_MOST_VALUES:,} values")
    return yaml.safe_load(text)


def _spelled_out(node: Any, known: dict[int, float]) -> float:
    """How many values a YAML node has, each alias counted as all that it stands for; infinite where it stands for itself."""
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is known
        parts = node.value if isinstance(node.value, list) else []
        inner = [part for parts_of in parts for part in (parts_of if isinstance(parts_of, tuple) else (parts_of,))]
        known[id(node)] = 1 + sum(_spelled_out(part, known) for part in inner)
    return known[id(node)]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to disk, and put it in place in one step; of several ranks, one does."""
    ranks.once(partial(_put_in_place, path, write))


def _put_in_place(path: Path, write: Callable[[Path], object]) -> None:
    with plain_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> str:
    """Write JSON atomically; a file's name that is no UTF-8 is read back as it was. Returns the SHA-256 of the file."""
    return write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> str:
    """Write text atomically; bytes of a file's name that are no UTF-8 as their code. Returns the SHA-256 of the file."""
    data = text.encode("utf-8", "backslashreplace")
    write_atomically(path, lambda file: file.write_bytes(data))
    return hashlib.sha256(data).hexdigest()


def read_json(path: Path, sha256: str | None = None) -> Any:
    """The content of a JSON file, which must have this hash if one is given.

    Raises:
        SphereEditError: it is not there, no JSON, or not what was written.
    """
    with plain_errors(path, "read"):
        data = path.read_bytes()
        check_digest(path, data, sha256)
        return json.loads(data.decode())


def write_cache(path: Path, content: Any) -> None:
    """Write JSON into the cache, with a hash of itself."""
    text = json.dumps(content, ensure_ascii=False)
    write_json(path, {_SUMS: hashlib.sha256(text.encode()).hexdigest(), "content": content})


def read_cache(path: Path) -> Any | None:
    """What `write_cache` put there; None where there is nothing, or something that was damaged since.

    Raises:
        SphereEditError: it is there and cannot be read, which says nothing about what it holds.
    """
    return ranks.once(partial(_cached, path))


def _cached(path: Path) -> Any | None:
    with plain_errors(path, "read"):
        if not path.exists():
            return None
        data = path.read_bytes()
    try:
        kept = json.loads(data.decode())
        text = json.dumps(kept["content"], ensure_ascii=False)
        return kept["content"] if kept[_SUMS] == hashlib.sha256(text.encode()).hexdigest() else None
    except (ValueError, KeyError, TypeError):
        return None


def check_digest(path: Path, data: bytes, sha256: str | None) -> None:
    """Refuse a file whose bytes are not those with this hash, if one is given."""
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise SphereEditError(f"{path} is not what was written there; put it back from a backup")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file atomically, with the SHA-256 of each tensor in its header.

    Returns:
        the digest of the whole file's content (`content_digest`).
    """
    return ranks.once(partial(_store, path, tensors))


def _store(path: Path, tensors: Mapping[str, Tensor]) -> str:
    ready = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    sums = {name: _tensor_digest(tensor) for name, tensor in ready.items()}
    write_atomically(path, lambda file: save_file(ready, file, {_SUMS: json.dumps(sums, sort_keys=True)}))
    return _digest_of_sums(sums)


def read_tensors(path: Path, wanted: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """Read a safetensors file, or those of its tensors whose names are ``wanted``, and compare them with their hashes.

    Raises:
        SphereEditError: it is not there, cut short, or one of these tensors is not what was written.
    """
    with plain_errors(path, "read"), safe_open(path, "pt") as file:
        sums: dict[str, str] = json.loads((file.metadata() or {}).get(_SUMS, "{}"))
        if sums and (
            strange := sums.keys() ^ set(file.keys())
        ):  # one under another name would not be missed by who wants some
            raise _Damaged(
                f"{path} is damaged: '{min(strange)}' in it is not what was written; put the file back from a backup"
            )
        found: dict[str, Tensor] = {
            name: _aligned(file.get_tensor(name))
            for name in file.keys()  # noqa: SIM118
            if wanted is None or wanted(name)
        }
    for name, tensor in found.items():
        if sums and sums.get(name) != _tensor_digest(tensor):
            raise _Damaged(
                f"{path} is damaged: '{name}' in it is not what was written; put the file back from a backup"
            )
    return found


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor where torch would have put it: a product of one that lies elsewhere, as in a mapped file, may round otherwise."""
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def content_digest(path: Path) -> str | None:
    """A SHA-256 over the names and hashes in a safetensors file's header; None where it has none. Reads no tensor."""
    with plain_errors(path, "read"), safe_open(path, "pt") as file:
        sums = (file.metadata() or {}).get(_SUMS)
        return None if sums is None else _digest_of_sums(json.loads(sums))


def _tensor_digest(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(memoryview(tensor.contiguous().flatten().view(uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


def _digest_of_sums(sums: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(sums.items())).encode()).hexdigest()


def is_whole(path: Path) -> bool:
    """Whether a safetensors file is there and its tensors are what was written; one that is read and found otherwise is removed.

    Raises:
        SphereEditError: it is there and cannot be read (too many open files, no permission, …), which says nothing about it.
    """
    return ranks.once(partial(_is_whole, path))


def _is_whole(path: Path) -> bool:
    with plain_errors(path, "read"):
        if not path.is_file():
            return False
        path.open("rb").close()  # safetensors would call any file that it cannot open one that is not there
    try:
        if content_digest(path) is not None:  # one without hashes is of an earlier version
            read_tensors(path)
            return True
    except _Damaged:
        pass
    path.unlink(missing_ok=True)
    return False


def check_room(folder: Path, needed: int) -> None:
    """Refuse a run whose folder cannot be written or whose disk is too small for it.

    Raises:
        SphereEditError: saying which.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    with plain_errors(folder), tempfile.TemporaryFile(prefix=".sphere-edit-", dir=existing):
        pass
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise SphereEditError(f"{folder} needs about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free there")


def require_utf8(path: str | Path, what: str) -> None:
    """Refuse a path with bytes that are no UTF-8, which safetensors and tokenizers cannot open.

    Raises:
        SphereEditError: it has such bytes; ``what`` says what it leads to.
    """
    if any("\udc80" <= sign <= "\udcff" for sign in str(path)):
        raise SphereEditError(f"the path of {what} must be UTF-8, which {path} is not; choose another name")


def refuse_existing(path: Path) -> None:
    """Refuse to write a folder over something.

    Raises:
        SphereEditError: ``path`` exists and is not an empty folder.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise SphereEditError(f"{path} exists already; choose another folder or remove it first")


def remove_file(path: Path) -> None:
    """Remove a file, if it is there; of several ranks, one does."""
    ranks.once(lambda: path.unlink(missing_ok=True))


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that is gone afterwards; of several ranks, all have the same."""
    path = Path(ranks.once(tempfile.mkdtemp))
    try:
        yield path
    finally:
        if ranks.leads():
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def folder_in_place(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that becomes ``path`` when the block ends well, and vanishes otherwise.

    What a killed process left is removed by the next one that writes beside it: a lock tells the dead from the living.

    Raises:
        SphereEditError: ``path`` exists and is not an empty folder, or cannot be written.
    """
    refuse_existing(path)
    with plain_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_unfinished(path.parent)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_UNFINISHED}")
        lock = FileLock(_lock_of(temporary))
        lock.acquire(timeout=0)  # before the folder is there, and until it is gone
        try:
            temporary.mkdir()
            yield temporary
            if os.name == "posix":
                for written in (*temporary.rglob("*"), temporary):
                    _sync(written)
            if path.exists():
                path.rmdir()
            temporary.replace(path)
            _sync_folder(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            _lock_of(temporary).unlink(missing_ok=True)
            lock.release()


def sweep_unfinished(folder: Path) -> None:
    """Remove the temporary folders of `folder_in_place` whose process is no more."""
    for found in folder.glob(f".*{_UNFINISHED}.lock"):
        lock = FileLock(found)
        with suppress(Timeout, OSError), lock.acquire(timeout=0):
            shutil.rmtree(found.with_name(found.name.removesuffix(".lock")), ignore_errors=True)
            found.unlink(missing_ok=True)


def _lock_of(temporary: Path) -> Path:
    return temporary.with_name(f"{temporary.name}.lock")


def copied(source: Path, target: Path) -> None:
    """``target`` as a copy of ``source``, atomically: what becomes of one is nothing to the other."""
    with plain_errors(target):
        write_atomically(target, lambda file: shutil.copyfile(source, file))


def remove_dead_temporaries(folder: Path) -> None:
    """Remove what writers that are no more left behind in a folder; those still at work keep theirs."""
    for leftover in folder.glob(".*.tmp"):
        number = leftover.stem.rsplit(".", 1)[-1]
        if number.isdigit() and not _is_alive(int(number)):
            leftover.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def remove_stale_temporaries(folder: Path) -> None:
    """Remove what an interrupted write left behind."""
    for leftover in folder.rglob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    sweep_unfinished(folder)
    sweep_unfinished(folder.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
