"""Records from JSON, JSONL and CSV files: what each line or row holds, or in words why it holds nothing."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sphere_edit.errors import SphereEditError
from sphere_edit.facts.fact import BadRecord, short
from sphere_edit.facts.fields import Record
from sphere_edit.facts.shapes import is_record

MAX_LINE = 1 << 20  # bytes of one JSONL line
MAX_FILE = 1 << 30  # bytes of a JSON or CSV file, which are parsed whole
_LISTS = ("paraphrases", "neighbors", "generation_prompts", "answers", "portability", "rewordings", "locality", "forms")


def read_records(path: Path, source: object) -> Iterator[Record | BadRecord]:
    """The records of a file by its suffix.

    Raises:
        SphereEditError: it is no file of facts, or cannot be read.
    """
    readers = {".json": _json, ".jsonl": _jsonl, ".csv": _csv}
    if path.suffix.lower() not in readers:
        raise SphereEditError(
            f"{source}: facts come from .json, .jsonl or .csv files, not '{path.suffix or path.name}'"
        )
    try:
        _refuse_binary(path)
        yield from readers[path.suffix.lower()](path)
    except OSError as error:
        raise SphereEditError(f"{source} cannot be read: {error.strerror}") from None


def _refuse_binary(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(4096)
    if not head.removeprefix(codecs.BOM_UTF8).strip():
        raise SphereEditError(f"{path} is empty")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise SphereEditError(f"{path} is UTF-16; save it as UTF-8")
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"version https://git-lfs"):
        raise SphereEditError(
            f"{path} is a Git LFS pointer, which stands for the real file; fetch that one: git lfs pull"
        )
    if start[:9].lower() == b"<!doctype" or start[:5].lower() == b"<html":
        raise SphereEditError(f"{path} is a web page, not the {path.suffix} text it is named as; download the raw file")
    kinds = {
        b"PK\x03\x04": "a zip file",
        b"\x1f\x8b": "a gzip file",
        b"\x89PNG": "a PNG picture",
        b"%PDF": "a PDF",
        b"PAR1": "a Parquet file",
    }
    for magic, kind in kinds.items():
        if head.startswith(magic):
            raise SphereEditError(f"{path} is {kind}, not the {path.suffix} text it is named as")
    if head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5":
        raise SphereEditError(
            f"{path} is a Python pickle, which can run code and is never opened; save it as {path.suffix}"
        )
    if b"\0" in head:
        raise SphereEditError(f"{path} is a binary file, not the {path.suffix} text it is named as")


def _jsonl(path: Path) -> Iterator[Record | BadRecord]:
    with path.open("rb") as file:
        first, blank = True, 0
        while line := file.readline(MAX_LINE + 1):
            too_long = len(line) > MAX_LINE
            if first:
                line = line.removeprefix(codecs.BOM_UTF8)
                if line.lstrip().startswith(b"["):
                    raise SphereEditError(f"{path} holds one JSON list, not an object a line; rename it to .json")
                first = False
            if not line.strip() and not too_long:
                blank += 1
                continue
            for _ in range(blank):  # blank lines at the very end are no records
                yield BadRecord("the line is empty")
            blank = 0
            if too_long:
                size = len(line)
                while not line.endswith(b"\n") and (line := file.readline(MAX_LINE)):
                    size += len(line)
                yield BadRecord(f"the line is {size / 1e6:.1f} MB long; a fact is at most {MAX_LINE / 1e6:.0f} MB")
                continue
            yield _parsed(line.rstrip(b"\r\n"))


def _parsed(line: bytes) -> Record | BadRecord:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return BadRecord(
            f"not valid UTF-8 (byte 0x{line[error.start]:02x} at position {error.start}); save the file as UTF-8"
        )
    except json.JSONDecodeError as error:
        return BadRecord(f"not valid JSON (column {error.colno}: {error.msg})")
    except ValueError:  # Python's own limit
        return BadRecord("not valid JSON (a number of thousands of digits)")
    except RecursionError:
        return BadRecord("not valid JSON (nested too deeply)")


def _whole_text(path: Path) -> str:
    size = path.stat().st_size
    if size > MAX_FILE:
        raise SphereEditError(
            f"{path} is {size / 1e9:.1f} GB; a {path.suffix} file is parsed whole and may have 1 GB; use .jsonl"
        )
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SphereEditError(
            f"{path}, line {line}: not valid UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8"
        ) from None


def _json(path: Path) -> Iterable[Record]:
    text = _whole_text(path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; if it holds one object a line, rename it to .jsonl" if error.msg == "Extra data" else ""
        raise SphereEditError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}){hint}") from None
    except ValueError:  # Python's own limit
        raise SphereEditError(f"{path}: not valid JSON (a number of thousands of digits)") from None
    except RecursionError:
        raise SphereEditError(f"{path}: not valid JSON (nested too deeply)") from None
    if isinstance(content, dict):
        return [content] if is_record(content) else _unwrapped(path, content)
    if not isinstance(content, list):
        raise SphereEditError(f"{path}: expected a list of records, found {type(content).__name__}")
    return content


def _unwrapped(path: Path, content: Mapping[str, Any]) -> Iterable[Record]:
    """The records within an object that is none itself: its only list, or its values where all are records.

    ``chat`` or ``forms`` beside them hold for those that say nothing of it themselves, and so does ``system``.

    Raises:
        SphereEditError: there are none, or several lists that may be meant.
    """
    shared = {name: content[name] for name in ("chat", "forms", "system") if name in content}
    content = {name: value for name, value in content.items() if name not in shared}
    lists = [name for name, value in content.items() if isinstance(value, list)]
    values = content[lists[0]] if len(lists) == 1 else list(content.values())
    if len(lists) == 1 or (values and all(isinstance(value, dict) and is_record(value) for value in values)):
        return [_with_shared(record, shared) for record in values]
    found = short(", ".join(f"'{short(repr(name)[1:-1], 40)}'" for name in lists or content), 200) or "nothing"
    kind = "lists" if lists else "no list but"
    raise SphereEditError(
        f"{path}: expected a list of records, found an object with {kind} {found}; save the list alone"
    )


def _with_shared(record: Any, shared: Mapping[str, Any]) -> Any:
    """A record with what stands beside all of them, where it says nothing of that itself."""
    if not isinstance(record, dict):
        return record
    in_forms = {"chat", "forms"} & record.keys()
    return {**{name: value for name, value in shared.items() if name == "system" or not in_forms}, **record}


def _csv(path: Path) -> Iterator[Record | BadRecord]:
    text = _whole_text(path)
    if text.lstrip().startswith(("[", "{")):
        raise SphereEditError(f"{path} holds JSON, not CSV; rename it to .json or .jsonl")
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = columns
        if not is_record(dict.fromkeys(columns)):
            lacking = next(name for name in ("subject", "prompt", "target_new") if name not in columns)
            found = short(", ".join(columns), 200) or "nothing"
            raise SphereEditError(f"{path}: the header lacks the column '{lacking}' (found: {found})")
        for row in reader:
            if None in row:
                yield BadRecord(f"more fields than the header's {len(columns)}")
            else:
                try:
                    yield _row(row)
                except BadRecord as error:
                    yield error
    except csv.Error as error:
        raise SphereEditError(f"{path}, line {reader.reader.line_num}: not valid CSV ({error})") from None


def _row(row: Mapping[str, str]) -> Record:
    """A row's cells: empty ones are missing, those of fields with several values are lists, and ``chat`` is true or false.

    An empty ``separator`` is no separator set: a row cannot tell it from an empty cell.
    """
    cells: dict[str, Any] = {name: cell or None for name, cell in row.items()}
    for name in _LISTS:
        if cells.get(name):
            cells[name] = _cell_list(cells[name], name)
    if cells.get("chat"):
        cells["chat"] = {"true": True, "false": False}.get(cells["chat"].strip().lower(), cells["chat"])
    return cells


def _cell_list(cell: str, name: str) -> list[Any]:
    """A CSV cell with several values: a JSON list, or texts with ``|`` between them.

    Raises:
        BadRecord: it begins as a JSON list and is none.
    """
    start = cell.lstrip()
    if start.startswith("["):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            if start[1:].lstrip()[:1] in ('"', "{", "[", ""):
                raise BadRecord(f"'{name}' begins as a JSON list and is none: {short(cell)}") from None
    return [part.strip() for part in cell.split("|") if part.strip()]
