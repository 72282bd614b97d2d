"""Code from outside the package: files that the user of a command names, and packages that they have installed.

Nothing else is ever run: a run folder says which method it needs, and where that comes from is for the user to say.
"""

from __future__ import annotations

import hashlib
import shlex
import sys
import traceback
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from sphere_edit.errors import SphereEditError

GROUP = "sphere_edit.methods"  # of entry points, each of which is a method's class
_PREFIX = "sphere_edit_plugin_"  # of modules that were run from a file


def run_file(path: Path) -> ModuleType:
    """Run a Python file as a module of its own, named after its place.

    Raises:
        SphereEditError: it is not there, or does not run to its end.
    """
    try:
        source = path.read_bytes()
    except OSError as error:
        raise SphereEditError(f"the plugin {path} cannot be read: {error.strerror}") from None
    place = str(path.resolve())
    module = ModuleType(f"{_PREFIX}{hashlib.sha256(place.encode()).hexdigest()[:16]}")
    module.__file__ = place
    sys.modules[module.__name__] = module  # where dataclasses and pydantic look up the annotations of its classes
    try:
        exec(compile(source, place, "exec"), module.__dict__)
    except SphereEditError as error:
        raise SphereEditError(f"the plugin {path}: {error}") from None
    except Exception as error:
        raise SphereEditError(f"the plugin {path} does not run: {_told(error, place)}") from error
    return module


def options() -> list[str]:
    """The files that were run here, as options of the command line: another process needs them as well."""
    files = [module.__file__ for name, module in sys.modules.items() if name.startswith(_PREFIX)]
    return [part for file in files for part in ("--plugin", str(file))]


def program() -> str:
    """How a command begins that a user is told to give next."""
    return shlex.join(["sphere-edit", *options()])


def installed() -> Iterator[tuple[str, object]]:
    """What installed packages offer as methods, each with where it comes from.

    Raises:
        SphereEditError: one of them cannot be imported.
    """
    for entry in entry_points(group=GROUP):
        origin = _origin(entry)
        try:
            found = entry.load()
        except Exception as error:
            raise SphereEditError(
                f"{origin} cannot be imported: {type(error).__name__}: {error}; mend or uninstall it"
            ) from error
        yield origin, found


def _origin(entry: EntryPoint) -> str:
    package = entry.dist.name if entry.dist is not None else entry.module
    return f"the method '{entry.name}' of the installed package {package}"


def _told(error: Exception, place: str) -> str:
    """An error with the last line of the file that it passed through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == place]
    line = error.lineno if isinstance(error, SyntaxError) else (lines[-1] if lines else None)
    said = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{'' if line is None else f'line {line}: '}{type(error).__name__}: {said}"
