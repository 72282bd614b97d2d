"""Facts from files and data sets: the user's own JSON, JSONL or CSV, CounterFact in both public shapes, ZsRE, the hub.

A reader turns one record into the fields of a fact. To add a data set, add one function and one row to ``SHAPES``.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import hashlib
import io
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from sphere_edit.errors import SphereEditError, refused_records
from sphere_edit.facts.datasets import DATASETS, downloaded
from sphere_edit.facts.fact import BadRecord, Fact, as_list, make_fact, short

MAX_LINE = 1 << 20  # bytes of one JSONL line
MAX_FILE = 1 << 30  # bytes of a JSON or CSV file, which are parsed whole

Record = Mapping[str, Any]
ZsreTarget = Literal["answer", "alternative"]


@dataclass(frozen=True)
class FactSet:
    """Facts as read, what was left out and why, and by which protocol the records were understood."""

    facts: list[Fact]
    bad: list[str]
    protocol: str
    source: str
    sha256: str

    def chosen(self, skip: int = 0, limit: int | None = None, shuffle: int | None = None) -> FactSet:
        """Some of the facts: in a random order seeded by ``shuffle``, without the first ``skip``, at most ``limit``.

        Raises:
            SphereEditError: nothing is left.
        """
        facts = list(self.facts)
        if shuffle is not None:
            random.Random(shuffle).shuffle(facts)
        facts = facts[skip:] if limit is None else facts[skip : skip + limit]
        if not facts:
            raise SphereEditError(f"{self.source} has {len(self.facts)} facts; none is left after the first {skip}")
        return replace(self, facts=facts, sha256=_digest(facts))


def read_facts(
    source: str | Path,
    limit: int | None = None,
    skip_bad: bool = False,
    zsre_target: ZsreTarget = "answer",
    skip: int = 0,
    shuffle: int | None = None,
) -> FactSet:
    """Read facts from ``demo``, a public data set by name (``counterfact``, ``multi_counterfact``, ``zsre``), a ``.json``, ``.jsonl`` or ``.csv`` file, or a data set (``owner/name[:split]``, or a folder[:split]).

    Args:
        limit: stop after this many usable facts.
        skip_bad: leave out records that cannot be used (they are listed in ``bad``) and go on.
        zsre_target: what a ZsRE record is edited to: its true ``answer`` (MEMIT, AlphaEdit, SPHERE) or its false
            ``alternative`` (with the true one as target_true).
        skip: leave out this many usable facts before the first, after shuffling.
        shuffle: put the facts in a random order with this seed.

    Raises:
        SphereEditError: naming every bad record by its number, from 1.
    """
    if limit is not None and limit < 1:
        raise SphereEditError(f"--limit takes a positive number of facts, not {limit}")
    if skip < 0:
        raise SphereEditError(f"--skip takes a number of facts, not {skip}")
    if skip == 0 and shuffle is None:
        return _fact_set(str(source), _records(source), limit, skip_bad, zsre_target)
    return _fact_set(str(source), _records(source), None, skip_bad, zsre_target).chosen(skip, limit, shuffle)


def _fact_set(
    source: str,
    records: Iterable[tuple[int, Record | BadRecord]],
    limit: int | None,
    skip_bad: bool,
    zsre_target: ZsreTarget,
) -> FactSet:
    facts: list[Fact] = []
    bad: list[str] = []
    protocols: dict[str, None] = {}
    for number, record in records:
        try:
            if isinstance(record, BadRecord):
                raise record
            shape = _shape_of(record)
            fact = shape.fact(record, number, zsre_target)
        except BadRecord as error:
            bad.append(f"record {number}: {error}")
            continue
        except RecursionError:  # telling what was found instead of text
            bad.append(f"record {number}: not laid out as expected (nested too deeply)")
            continue
        facts.append(fact)
        protocols[shape.protocol.format(zsre_target=zsre_target)] = None
        if limit is not None and len(facts) == limit:
            break
    if bad and not skip_bad:
        many = "one record" if len(bad) == 1 else f"{len(bad)} records"
        raise refused_records(f"{source}: {many} cannot be used (--skip-bad goes on without)", bad)
    if not facts:
        raise SphereEditError(f"{source}: no usable fact in it" + (f" ({len(bad)} bad records)" if bad else ""))
    return FactSet(facts, bad, "; ".join(protocols), source, _digest(facts))


def _digest(facts: Iterable[Fact]) -> str:
    """SHA-256 of what the facts say, by which runs name their data."""
    digest = hashlib.sha256()
    for fact in facts:
        fields = fact.as_dict()
        if not fact.generation_prompts:  # a fact without keeps the hash it had before there were any
            del fields["generation_prompts"]
        digest.update(json.dumps(fields, sort_keys=True).encode())
    return digest.hexdigest()


def facts_from(facts: str | Path | FactSet | Iterable[Fact | Record], skip_bad: bool = False) -> FactSet:
    """Facts from wherever a caller has them: a source that `read_facts` knows, or facts and records in memory."""
    if isinstance(facts, FactSet):
        return facts
    if isinstance(facts, (str, Path)):
        return read_facts(facts, skip_bad=skip_bad)
    records = [fact.as_dict() if isinstance(fact, Fact) else fact for fact in facts]
    return _fact_set("facts given in Python", enumerate(records, 1), None, skip_bad, "answer")


# --- shapes of a record -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """How a kind of record is told (by keys it must have) and turned into a fact."""

    keys: frozenset[str]
    protocol: str
    read: Callable[[Record, ZsreTarget], dict[str, Any]]

    def fact(self, record: Record, number: int, zsre_target: ZsreTarget) -> Fact:
        try:
            fields = self.read(record, zsre_target)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise BadRecord(f"not laid out as expected ({type(error).__name__}: {error})") from None
        known = (record.get(name) for name in ("case_id", "id", "source_id"))
        source_id = str(next((value for value in known if value is not None), ""))
        return make_fact(**fields, source_id=source_id.encode(errors="replace").decode(), record=number)


def _nested_counterfact(record: Record, _: ZsreTarget) -> dict[str, Any]:
    rewrite = record["requested_rewrite"]
    truth = rewrite["target_true"]["str"]
    neighbors = as_list(record.get("neighborhood_prompts"), "neighborhood_prompts")
    return {
        "subject": rewrite["subject"],
        "prompt": rewrite["prompt"],
        "target_new": rewrite["target_new"]["str"],
        "target_true": truth,
        "paraphrases": record.get("paraphrase_prompts", []),
        "neighbors": [{"prompt": prompt, "answer": truth} for prompt in neighbors],
        "generation_prompts": record.get("generation_prompts"),
    }


def _flat_counterfact(record: Record, _: ZsreTarget) -> dict[str, Any]:
    locality = record.get("locality_prompt")
    return {
        "subject": record["subject"],
        "prompt": record["prompt"],
        "target_new": record["target_new"],
        "target_true": record["ground_truth"],
        "paraphrases": [record["rephrase_prompt"]] if record.get("rephrase_prompt") else [],
        "neighbors": [{"prompt": locality, "answer": record.get("locality_ground_truth")}] if locality else [],
    }


def _zsre(record: Record, target: ZsreTarget) -> dict[str, Any]:
    answer = as_list(record["answers"], "answers")[0]
    return {
        "subject": record["subject"],
        "prompt": record["src"],
        "target_new": answer if target == "answer" else record["alt"],
        "target_true": None if target == "answer" else answer,
        "paraphrases": [record["rephrase"]] if record.get("rephrase") else [],
        "neighbors": [{"prompt": record["loc"].rstrip("?") + "?", "answer": record["loc_ans"]}]
        if record.get("loc")
        else [],
    }


def _own(record: Record, _: ZsreTarget) -> dict[str, Any]:
    names = ("subject", "prompt", "target_new", "target_true", "paraphrases", "neighbors", "generation_prompts")
    lacking = [name for name in names if name not in record]
    for given in record if lacking else ():
        near = () if given in names else difflib.get_close_matches(str(given), lacking, 1, cutoff=0.85)
        if near:
            raise BadRecord(f"'{short(str(given), 40)}' is no field; did you mean '{near[0]}'?")
    return {name: record.get(name) for name in names}


SHAPES = (
    Shape(
        frozenset({"requested_rewrite"}),
        "CounterFact, nested (ROME/MEMIT): neighborhood prompts are answered by target_true",
        _nested_counterfact,
    ),
    Shape(
        frozenset({"ground_truth", "prompt", "subject", "target_new"}),
        "CounterFact, flat: one rephrase, one locality prompt with its own answer",
        _flat_counterfact,
    ),
    Shape(
        frozenset({"src", "answers", "subject"}),
        "ZsRE: src is edited to its {zsre_target}; locality is the Natural Questions prompt and its answer",
        _zsre,
    ),
    Shape(frozenset({"subject", "prompt", "target_new"}), "subject, prompt, target_new", _own),
)


def _shape_of(record: object) -> Shape:
    if not isinstance(record, Mapping):
        raise BadRecord(f"expected an object with subject, prompt and target_new, found {type(record).__name__}")
    shape = next((shape for shape in SHAPES if shape.keys <= record.keys()), None)
    if shape is None:
        missing = [name for name in ("subject", "prompt", "target_new") if name not in record]
        found = ", ".join(short(repr(str(name))[1:-1], 40) for name in list(record)[:12]) or "nothing"
        raise BadRecord(f"'{missing[0]}' is missing (found: {found})")
    return shape


# --- where records come from --------------------------------------------------------------------------------------


def _records(source: str | Path) -> Iterator[tuple[int, Record | BadRecord]]:
    if source == "demo":
        demo = resources.files("sphere_edit") / "data" / "demo_facts.jsonl"
        with resources.as_file(demo) as path:
            yield from enumerate(_jsonl(path), 1)
        return
    readers = {".json": _json, ".jsonl": _jsonl, ".csv": _csv}
    if source in DATASETS and not Path(source).exists():
        source = downloaded(str(source))
    try:
        path = Path(source).expanduser()
        is_file = path.is_file()
    except (OSError, RuntimeError) as error:
        raise SphereEditError(f"{source} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if is_file:
        if path.suffix.lower() not in readers:
            raise SphereEditError(
                f"{source}: facts come from .json, .jsonl or .csv files, not '{path.suffix or path.name}'"
            )
        try:
            _refuse_binary(path)
            yield from enumerate(readers[path.suffix.lower()](path), 1)
        except OSError as error:
            raise SphereEditError(f"{source} cannot be read: {error.strerror}") from None
        return
    name, _, split = str(source).partition(":")
    folder = Path(name).expanduser()
    if path.suffix.lower() in readers or (name.count("/") > 1 and not folder.is_dir()):
        raise SphereEditError(f"there is no file '{source}'")
    yield from enumerate(_hub(str(folder) if name and folder.is_dir() else name, split), 1)


def _refuse_binary(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(4096)
    if not head.removeprefix(codecs.BOM_UTF8).strip():
        raise SphereEditError(f"{path} is empty")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise SphereEditError(f"{path} is UTF-16; save it as UTF-8")
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
    if isinstance(content, dict) and _is_record(content):
        return [content]
    if not isinstance(content, list):
        raise SphereEditError(f"{path}: expected a list of records, found {type(content).__name__}")
    return content


def _is_record(content: Record) -> bool:
    return any(shape.keys <= content.keys() for shape in SHAPES)


def _csv(path: Path) -> Iterator[Record | BadRecord]:
    text = _whole_text(path)
    if text.lstrip().startswith(("[", "{")):
        raise SphereEditError(f"{path} holds JSON, not CSV; rename it to .json or .jsonl")
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = columns
        for name in ("subject", "prompt", "target_new"):
            if name not in columns:
                raise SphereEditError(
                    f"{path}: the header lacks the column '{name}' (found: {short(', '.join(columns), 200) or 'nothing'})"
                )
        for row in reader:
            if None in row:
                yield BadRecord(f"more fields than the header's {len(columns)}")
            else:
                cells = {name: cell for name, cell in row.items() if cell not in (None, "")}
                for name in ("paraphrases", "neighbors", "generation_prompts"):
                    if name in cells:
                        cells[name] = _cell_list(cells[name])
                yield {"subject": None, "prompt": None, "target_new": None, **cells}
    except csv.Error as error:
        raise SphereEditError(f"{path}, line {reader.reader.line_num}: not valid CSV ({error})") from None


def _cell_list(cell: str) -> list[Any]:
    """A CSV cell with several values: a JSON list, or texts with ``|`` between them."""
    if cell.lstrip().startswith("["):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            pass
    return [part.strip() for part in cell.split("|") if part.strip()]


def _hub(repository: str, split: str) -> Iterable[Record]:
    """A data set of the hub (``owner/name``) or a local folder, through `datasets`; the split is train by default."""
    import datasets

    try:
        loaded = datasets.load_dataset(repository)
    except Exception as error:  # the library raises whatever its storage raised
        reason = " ".join(str(error).split())[:300]
        raise SphereEditError(f"'{repository}' is neither a file nor a data set that can be loaded: {reason}") from None
    split = split or ("train" if "train" in loaded else next(iter(loaded)))
    if split not in loaded:
        raise SphereEditError(f"data set '{repository}' has no split '{split}'; it has {', '.join(loaded)}")
    return loaded[split]
