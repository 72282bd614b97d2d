"""Files that are either whole or not there, told in plain words when they cannot be written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sphere_edit.errors import SphereEditError


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
        raise SphereEditError(f"{path} could not be {doing}: {reason}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SphereEditError(f"{path} is damaged ({error}); put it back from a backup") from None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to disk, and put it in place in one step."""
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


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    write_atomically(
        path, lambda file: file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    )


def write_text(path: Path, text: str) -> None:
    """Write text atomically."""
    write_atomically(path, lambda file: file.write_text(text, "utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    ready = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda file: save_file(ready, file, dict(metadata or {})))


def read_tensors(path: Path, wanted: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """Read a safetensors file, or those of its tensors whose names are ``wanted``."""
    with plain_errors(path, "read"):
        if wanted is None:
            return load_file(path)
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118


def is_whole(path: Path) -> bool:
    """Whether a safetensors file is there and not cut short; a damaged one is removed."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        path.unlink(missing_ok=True)
        return False


def refuse_existing(path: Path) -> None:
    """Refuse to write a folder over something.

    Raises:
        SphereEditError: ``path`` exists and is not an empty folder.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise SphereEditError(f"{path} exists already; choose another folder or remove it first")


@contextmanager
def folder_in_place(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that becomes ``path`` when the block ends well, and vanishes otherwise.

    Raises:
        SphereEditError: ``path`` exists and is not an empty folder, or cannot be written.
    """
    refuse_existing(path)
    with plain_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield temporary
            temporary.chmod(0o755)
            if path.exists():
                path.rmdir()
            temporary.replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
    """``target`` as another name of ``source`` where the file system allows it, else a copy."""
    with plain_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)
        except OSError:
            write_atomically(target, lambda file: shutil.copyfile(source, file))


def remove_stale_temporaries(folder: Path) -> None:
    """Remove what an interrupted write left behind."""
    for leftover in folder.rglob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
