"""Which folders the page may open, and where it may write: those that were named when the studio was started, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from sphere_edit.errors import SphereEditError
from sphere_edit.facts.fact import short
from sphere_edit.runs.folder import RunFolder

_NAME = re.compile(r"\w[\w .+-]{0,99}")
_HUB = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_DEEP = 3  # folders below a chosen one in which runs and models are listed


class Places:
    """The chosen folders, the first of which takes new runs and exports; and the model or run that the studio was started with."""

    def __init__(self, folders: Sequence[Path], given: str | None = None):
        self.folders = [folder.expanduser().resolve() for folder in folders]
        if given is not None and RunFolder.exists(given):
            self.folders.append(Path(given).resolve())
            given = None
        self.given = given

    @property
    def home(self) -> Path:
        """Where new things go."""
        return self.folders[0]

    def new(self, name: str) -> Path:
        """A folder to be made.

        Raises:
            SphereEditError: the name is no plain name, or is taken.
        """
        name = name.strip()
        if not _NAME.fullmatch(name) or name.endswith((".", " ")):
            raise SphereEditError(
                f"'{short(name)}' cannot be a folder's name here: letters, digits, spaces and . + - _ only, and no path; "
                f"it is made in {self.home}"
            )
        if (self.home / name).exists():
            raise SphereEditError(f"{self.home / name} is there already; choose another name")
        return self.home / name

    def inside(self, path: str | Path) -> Path:
        """A path that lies in a chosen folder, from here on if it lies below where the studio was started.

        Raises:
            SphereEditError: it lies elsewhere.
        """
        try:
            found = Path(path).expanduser().resolve()
        except (OSError, RuntimeError, ValueError):
            raise SphereEditError(f"'{short(str(path))}' is no path") from None
        if any(found.is_relative_to(folder) for folder in self.folders):
            here = Path.cwd()
            return found.relative_to(here) if found.is_relative_to(here) else found
        folders = ", ".join(str(folder) for folder in self.folders)
        raise SphereEditError(
            f"'{short(str(path))}' lies outside the folders that this page may open ({folders}); start the studio with --folder DIR"
        )

    def model(self, source: str) -> str:
        """A model as `load_model` takes it: a hub id, or what lies in a chosen folder.

        Raises:
            SphereEditError: it is neither.
        """
        source = source.strip()
        if source == self.given or source == "smollm2":
            return source
        if not source:
            raise SphereEditError("which model? A hub id, a folder, a .gguf file, or smollm2")
        try:
            here = Path(source).expanduser().exists()
        except (OSError, RuntimeError, ValueError):
            here = False
        return source if _HUB.fullmatch(source) and not here else str(self.inside(source))

    def runs(self) -> list[Path]:
        """The run folders in them, the newest first."""
        found = {path.parent for folder in self.folders for path in _below(folder, "journal.jsonl")}
        whole = [path for path in found if RunFolder.exists(path)]
        return sorted(whole, key=lambda path: (path / "journal.jsonl").stat().st_mtime, reverse=True)

    def models(self) -> list[str]:
        """What can be loaded without a download: what the studio was started with, the embedded model, folders and GGUF files."""
        folders = {str(path.parent) for folder in self.folders for path in _below(folder, "config.json")}
        local = {path for path in folders if any(Path(path).glob("*.safetensors"))}
        files = {str(path) for folder in self.folders for path in _below(folder, "*.gguf")}
        return list(dict.fromkeys([*([] if self.given is None else [self.given]), "smollm2", *sorted(local | files)]))


def _below(folder: Path, name: str) -> Iterator[Path]:
    """Files of a name in a folder and a few floors below it; what a link leads out to is not in it."""
    for depth in range(_DEEP):
        found = folder.glob("/".join(["*"] * depth + [name]))
        yield from (path for path in found if path.resolve().is_relative_to(folder))
