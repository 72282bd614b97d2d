"""Facts from files and data sets: the user's own JSON, JSONL or CSV, the field's public sets, the hub.

`files` and `hub` give records, `shapes` knows their layouts, and here they become a set of facts that says what was understood.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sphere_edit.counting import counted
from sphere_edit.errors import SphereEditError, refused_records
from sphere_edit.facts.fact import BadRecord, Fact, short
from sphere_edit.facts.fields import Record
from sphere_edit.facts.files import read_records
from sphere_edit.facts.hub import DATASETS, HubSource, downloaded
from sphere_edit.facts.seam import joined
from sphere_edit.facts.shapes import ZsreTarget, shape_of


@dataclass(frozen=True)
class FactSet:
    """Facts as read, what was left out and why, and by which protocol the records were understood.

    ``ignored`` counts, by name, the fields of usable records that nothing was read from.
    """

    facts: list[Fact]
    bad: list[str]
    protocol: str
    source: str
    sha256: str
    ignored: Mapping[str, int] = field(default_factory=dict)

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
            raise SphereEditError(
                f"{self.source} has {counted(len(self.facts), 'fact')}; none is left after the first {skip}"
            )
        return replace(self, facts=facts, sha256=_digest(facts))

    def remarks(self) -> list[str]:
        """What a user should see of how the records were understood, a sentence each."""
        said = [f"Facts read as {self.protocol}{_beside(self.facts)}"]
        if self.ignored:
            said.append(f"Fields that are not used (in so many records): {_counted(self.ignored)}")
        if kept := _unmeasured(self.facts):
            said.append(f"Kept, and not measured: {_counted(kept)}")
        seams = Counter(_SEAMS.get(fact.separator or "", repr(fact.separator)) for fact in self.facts)
        bare = next((fact for fact in self.facts if fact.separator == ""), None)
        if bare is not None or len(seams) > 1:
            example = ""
            if bare is not None:
                text = (bare.filled_prompt[-25:] + bare.target_new[:15]).replace("\n", "\\n")
                example = f". Nothing, for example, in '…{text}' (record {bare.record})"
            said.append(
                f'Between prompt and answer: {_counted(seams)}{example}. A record\'s "separator" says otherwise'
            )
        return said


_SEAMS = {"": "nothing", " ": "one space"}
_OPTIONAL = ("target_true", "paraphrases", "neighbors", "portability", "generation_prompts", "rewordings", "answers")


def _beside(facts: Sequence[Fact]) -> str:
    """How many facts have which optional fields, so that nobody wonders whether a column was read."""
    held = {name: sum(bool(getattr(fact, name)) for fact in facts) for name in _OPTIONAL}
    said = ", ".join(f"{name} in {count:,}" for name, count in held.items() if count)
    return f"; of {len(facts):,}: {said}" if said else "; none has paraphrases or neighbors to be measured by"


def _counted(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in numbers.items())


def _unmeasured(facts: Iterable[Fact]) -> Counter[str]:
    """How many prompts of each kind the facts hold that nothing measures: portability has to have answers."""
    found: Counter[str] = Counter()
    for fact in facts:
        silent = [probe.group for probe in fact.portability if not probe.answers]
        found.update(f"portability without an answer, {short(group or 'no group', 40)}" for group in silent)
    return +found


def read_facts(
    source: str | Path,
    limit: int | None = None,
    skip_bad: bool = False,
    zsre_target: ZsreTarget = "answer",
    skip: int = 0,
    shuffle: int | None = None,
) -> FactSet:
    """Read facts from ``demo``, a public data set by name (``counterfact``, ``multi_counterfact``, ``zsre``), a ``.json``, ``.jsonl`` or ``.csv``
    file, or a data set of the hub (``owner/name[/config][:split]``) or in a folder (``folder[:split]``).

    Args:
        limit: stop after this many usable facts.
        skip_bad: leave out records that cannot be used (they are listed in ``bad``) and go on.
        zsre_target: what a ZsRE record is edited to: its true ``answer`` (MEMIT, AlphaEdit, SPHERE) or its false
            ``alternative`` (with the true one as target_true).
        skip: leave out this many usable facts before the first, after shuffling.
        shuffle: put the facts in a random order with this seed.

    Raises:
        SphereEditError: naming every bad record by its number, from 1; or no record has the ``alternative`` that was asked for.
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
    even_none: bool = False,
) -> FactSet:
    """The facts of some records; with ``even_none``, a set without facts where none of them can be used."""
    facts: list[Fact] = []
    bad: list[str] = []
    protocols: dict[str, None] = {}
    alternative = False
    ignored: Counter[str] = Counter()
    for number, record in records:
        try:
            if isinstance(record, BadRecord):
                raise record
            shape = shape_of(record)
            found, unused = shape.facts(record, number, zsre_target)
        except BadRecord as error:
            bad.append(f"record {number}: {error}")
            continue
        except RecursionError:  # telling what was found instead of text
            bad.append(f"record {number}: not laid out as expected (nested too deeply)")
            continue
        facts += found
        alternative |= shape.alternative
        ignored.update(set(unused))
        protocols[shape.protocol.format(zsre_target=zsre_target)] = None
        if limit is not None and len(facts) >= limit:
            del facts[limit:]  # a record may hold several
            break
    if bad and not skip_bad:
        raise refused_records(
            f"{source}: {counted(len(bad), 'record')} cannot be used (--skip-bad goes on without)", bad
        )
    if not facts and not (bad and even_none):
        raise SphereEditError(
            f"{source}: no usable fact in it" + (f" ({counted(len(bad), 'bad record')})" if bad else "")
        )
    if zsre_target == "alternative" and not alternative:
        raise SphereEditError(
            f"{source} has no ZsRE record, and only these have an alternative (alt) to be edited to; leave --target alternative out. "
            f"Its facts were read as {'; '.join(protocols)}"
        )
    return FactSet(facts, bad, "; ".join(protocols), source, _digest(facts), {} if source == "demo" else ignored)


def read_pasted(text: str, name: str = "the text") -> FactSet:
    """Facts from text that somebody pasted: a JSON list, objects a line, or CSV with a header; what cannot be used is in ``bad``.

    Raises:
        SphereEditError: there is no record in it, or it is none of these.
    """
    first = text.lstrip()[:1]
    suffix = ".json" if first == "[" else ".jsonl" if first == "{" else ".csv"
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"pasted{suffix}"
        path.write_text(text, "utf-8", errors="surrogatepass")
        return read_named(path, name)


def read_named(path: Path, name: str) -> FactSet:
    """Facts from a file that is called ``name`` where something is said of it; what cannot be used is in ``bad``, be it all.

    Raises:
        SphereEditError: it is no file of facts, or has no record.
    """
    try:
        return _fact_set(name, enumerate(read_records(path, name), 1), None, True, "answer", even_none=True)
    except SphereEditError as error:
        raise SphereEditError(str(error).replace(str(path), name)) from None


def _digest(facts: Iterable[Fact]) -> str:
    """SHA-256 of what the facts say, by which runs name their data."""
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(json.dumps(_told(fact), sort_keys=True).encode())
    return digest.hexdigest()


def _told(fact: Fact) -> dict[str, Any]:
    """The fact's fields, without those of later versions where they say nothing: it keeps the hash it had before there were any."""
    fields = fact.as_dict()
    for name in ("generation_prompts", "answers", "true_answers", "portability", "rewordings", "forms"):
        if not fields[name]:
            del fields[name]
    if fact.system is None:
        del fields["system"]
    if fact.separator is None or fact.separator + fact.target_new == joined(fact.target_new):
        del fields["separator"]
    for probe in fields.get("portability", ()):
        for name in ("rival", "rival_ids"):
            if probe[name] is None:
                del probe[name]
    for neighbor in fields["neighbors"]:
        if not neighbor["answers"]:
            del neighbor["answers"]
    return fields


def facts_from(facts: str | Path | FactSet | Iterable[Fact | Record], skip_bad: bool = False) -> FactSet:
    """Facts from wherever a caller has them: a source that `read_facts` knows, or facts and records in memory."""
    if isinstance(facts, FactSet):
        return facts
    if isinstance(facts, (str, Path)):
        return read_facts(facts, skip_bad=skip_bad)
    records = [fact.as_dict() if isinstance(fact, Fact) else fact for fact in facts]
    return _fact_set("facts given in Python", enumerate(records, 1), None, skip_bad, "answer")


def _records(source: str | Path) -> Iterator[tuple[int, Record | BadRecord]]:
    if source == "demo":
        demo = resources.files("sphere_edit") / "data" / "demo_facts.jsonl"
        with resources.as_file(demo) as path:
            yield from enumerate(read_records(path, "demo"), 1)
        return
    if source in DATASETS and not Path(source).exists():
        source = downloaded(str(source))
    try:
        path = Path(source).expanduser()
        is_file = path.is_file()
    except (OSError, RuntimeError) as error:
        raise SphereEditError(f"{source} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if is_file:
        yield from enumerate(read_records(path, source), 1)
        return
    hub = None if path.suffix.lower() in (".json", ".jsonl", ".csv") else HubSource.parse(str(source))
    if hub is None:
        raise SphereEditError(f"there is no file '{source}'")
    yield from enumerate(hub.rows(), 1)
