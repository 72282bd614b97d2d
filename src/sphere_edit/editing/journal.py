"""The run folder: settings, facts, an append-only journal, updates, checkpoints. Everything that survives a crash.

A line in ``journal.jsonl`` is the commit: what it names was written and flushed before it. Whatever is on disk beyond
the last line belongs to work that did not finish, and is done again.

    config.json                 settings, model identity, versions, context templates
    facts/0001.jsonl            the facts of each call of edit, as understood
    statistics/…safetensors     second moments or null spaces, as used
    journal.jsonl               facts, unedited, batch, look back, evaluation, ability, guard, rollback, finished
    updates/batch-0001.…        each batch's ΔW (factors where it has them), and the keys that the method remembers
    checkpoints/batch-0003.…    working weights and method state: the newest, and the last power of two
    heldout.json, passages.json token ids of the text that perplexity is measured on, and of what a repair reads
    evaluations/…json           per-fact results
    metrics.json                the latest summary
    report.html, figures/       the page about the run, and its figures
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from sphere_edit.editing.methods.base import Seen, State
from sphere_edit.errors import SphereEditError
from sphere_edit.facts.fact import Fact
from sphere_edit.files import (
    plain_errors,
    read_tensors,
    remove_stale_temporaries,
    write_json,
    write_tensors,
    write_text,
)
from sphere_edit.numerics.update import PARTS, Update, update_from

SCHEMA = 3

Entry = dict[str, Any]


@dataclass
class History:
    """What the journal says, folded: which batches stand, which facts wait, which are out."""

    total: int = 0  # facts accepted so far
    sessions: list[int] = field(default_factory=list)  # the number of facts each call of edit brought
    batches: list[Entry] = field(default_factory=list)  # batch entries that stand, first to last
    look_backs: list[Entry] = field(default_factory=list)  # at ends of streams: who was asked, who had forgotten
    looked_back: bool = False  # since the last facts came
    withdrawn: set[int] = field(default_factory=set)  # facts taken back by a rollback or the guard
    evaluations: list[Entry] = field(default_factory=list)
    abilities: list[Entry] = field(default_factory=list)  # general ability after some batches, 0 for the unedited model
    finished: bool = False
    guard: Entry | None = None  # why the run stopped before its last facts

    @property
    def head(self) -> int:
        """Number of the last batch that stands; 0 is the unedited model."""
        return len(self.batches)

    @property
    def edited(self) -> list[int]:
        """Indices of the facts that were edited and stand, in order."""
        return [index for batch in self.batches for index in batch["facts"]]

    @property
    def superseded(self) -> set[int]:
        """Facts that a later one contradicted; they leave retention."""
        return {index for batch in self.batches for index in batch["superseded"]}

    @property
    def retained(self) -> list[int]:
        """Facts the model should know now."""
        gone = self.superseded
        return [index for index in self.edited if index not in gone]

    @property
    def due(self) -> list[int]:
        """Retained facts as they are to be asked whether they still stand: those never asked yet, then those asked longest ago."""
        asked: dict[int, float] = dict.fromkeys(self.edited, 0)
        for batch in self.batches:
            asked.update(dict.fromkeys(batch.get("asked", ()), batch["batch"]))
        for look_back in self.look_backs:
            asked.update({index: max(asked[index], look_back["after"] + 0.5) for index in look_back["asked"]})
        return sorted(self.retained, key=lambda index: (asked[index], index))

    @property
    def pending(self) -> list[int]:
        """Facts accepted and not yet edited."""
        gone = set(self.edited) | self.withdrawn
        return [index for index in range(self.total) if index not in gone]

    @property
    def unrepaired(self) -> int:
        """How many facts were edited since ordinary text was last repaired."""
        count = 0
        for batch in reversed(self.batches):
            if "repair" in batch:
                break
            count += len(batch["facts"])
        return count

    @property
    def closing(self) -> bool:
        """Whether the last new facts of a stream were edited, so that what ends it is to be done: repair, and look back."""
        return bool(self.batches) and not self.finished and self.guard is None and not self.pending

    @property
    def forgotten(self) -> list[int]:
        """What the look back at the stream's end found forgotten and no batch has written again since."""
        if not self.looked_back:
            return []
        last = self.look_backs[-1]
        written = {index for batch in self.batches[last["after"] :] for index in batch.get("again", ())}
        return [index for index in last["forgotten"] if index not in written]

    def ability_series(self) -> dict[str, list[tuple[int, Entry]]]:
        """Scores of general ability by task, each with its batch, in order.

        What was asked with another definition, other data or another limit than last time does not compare, and is left out.
        """
        found: dict[str, dict[int, Entry]] = {}
        last: dict[str, tuple[Any, Any]] = {}
        for entry in reversed(self.abilities):
            for task, score in entry["scores"].items():
                kind = entry["limit"], entry["tasks"].get(task, entry["tasks"])  # of a group, all its tasks
                if last.setdefault(task, kind) == kind:
                    found.setdefault(task, {}).setdefault(entry["after"], score)
        return {task: sorted(scores.items()) for task, scores in found.items()}

    def take(self, entry: Entry) -> None:
        """Fold in one more entry."""
        kind = entry["event"]
        if kind == "facts":
            self.sessions.append(entry["count"])
            self.total += entry["count"]
            self.finished, self.guard, self.looked_back = False, None, False
        elif kind == "batch":
            self.batches.append(entry)
        elif kind == "look back":
            self.look_backs.append(entry)
            self.looked_back = True
        elif kind == "evaluation":
            self.evaluations = [e for e in self.evaluations if e["after"] != entry["after"]] + [entry]
        elif kind == "ability":
            self.abilities.append(entry)
        elif kind == "guard":
            self.withdrawn |= set(self.pending)
            self.guard = entry
        elif kind == "rollback":
            kept = self.batches[: entry["to"]]
            self.batches = kept
            self.look_backs = [e for e in self.look_backs if e["after"] <= entry["to"]]
            self.looked_back = False
            self.withdrawn = set(range(self.total)) - set(self.edited)
            self.evaluations = [e for e in self.evaluations if e["after"] <= entry["to"]]
            self.abilities = [e for e in self.abilities if e["after"] <= entry["to"]]
            self.finished, self.guard = True, None
        elif kind == "finished":
            self.finished = True


class RunFolder:
    """One run on disk. Open it to read; take the lock to write."""

    def __init__(self, path: Path, config: dict[str, Any], entries: list[Entry]):
        self.path, self.config = path, config
        self._take_all(entries)
        self._lock = FileLock(str(path / ".lock"))

    def _take_all(self, entries: list[Entry]) -> None:
        self.entries, self._history = entries, History()
        for entry in entries:
            self._history.take(entry)

    @classmethod
    def exists(cls, path: str | Path) -> bool:
        """Whether a run was started there: its journal has a line, the facts it accepted."""
        try:
            with (Path(path) / "journal.jsonl").open("rb") as file:
                return file.readline().endswith(b"\n")
        except OSError:
            return False

    @classmethod
    def refuse_taken(cls, path: Path) -> None:
        """Refuse a folder in which a new run cannot start; what a start that did not finish left behind is no obstacle.

        Raises:
            SphereEditError: it holds a run, or something else.
        """
        if cls.exists(path):
            raise SphereEditError(
                f"{path} holds a run already; add --resume to go on with it, or choose another folder"
            )
        ours = {"config.json", "journal.jsonl", "statistics", "heldout.json", "passages.json", "facts"}
        with plain_errors(path, "read"):
            if path.exists() and (not path.is_dir() or {i.name for i in path.iterdir() if i.name[0] != "."} - ours):
                raise SphereEditError(f"{path} exists and is not a run folder; choose another")

    @classmethod
    def create(cls, path: Path, config: dict[str, Any]) -> RunFolder:
        """Start a run, with the lock taken.

        Raises:
            SphereEditError: the folder holds something else, or cannot be written.
        """
        cls.refuse_taken(path)
        with plain_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            (path / "journal.jsonl").touch()
        run = cls(path, config, [])
        run.lock()
        write_json(path / "config.json", config)
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Read a run. A half-written last line (the process died while writing it) does not count.

        Raises:
            SphereEditError: no run there, or a journal that is damaged or of a newer version.
        """
        path = Path(path)
        if not cls.exists(path):
            raise SphereEditError(f"{path} is not a run folder (it has no journal)")
        with plain_errors(path / "config.json", "read"):
            config = json.loads((path / "config.json").read_text("utf-8"))
        with plain_errors(path / "journal.jsonl", "read"):
            lines = (path / "journal.jsonl").read_bytes().split(b"\n")
        schema = config.get("schema") if isinstance(config, dict) else None
        if not isinstance(schema, int):
            raise SphereEditError(f"{path / 'config.json'} is damaged; put it back from a backup")
        if schema != SCHEMA:
            age, advice = ("a newer", "upgrade") if schema > SCHEMA else ("an older", "go on with that one")
            raise SphereEditError(f"{path} was written by {age} sphere-edit (schema {schema}); {advice}")
        entries = []
        for number, line in enumerate(lines[:-1], 1):
            try:
                entries.append(json.loads(line))
            except ValueError:
                raise SphereEditError(
                    f"{path / 'journal.jsonl'}, line {number} is damaged; restore it from a backup"
                ) from None
        return cls(path, config, entries)

    def lock(self) -> None:
        """Keep every other process off this run until this one ends or calls `unlock`.

        Raises:
            SphereEditError: another process is at work in it.
        """
        with plain_errors(self.path):
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise SphereEditError(
                    f"another process is working in {self.path}; wait for it, or stop it first"
                ) from None
        remove_stale_temporaries(self.path)
        journal = self.path / "journal.jsonl"
        with plain_errors(journal):
            content = journal.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                os.truncate(journal, whole)
        self._take_all([json.loads(line) for line in content[:whole].split(b"\n")[:-1]])

    def unlock(self) -> None:
        """Let others in."""
        self._lock.release()

    @property
    def history(self) -> History:
        """The journal, folded; to be read, not changed."""
        return self._history

    def append(self, event: str, **content: Any) -> Entry:
        """Commit one entry: written and flushed to disk before this returns."""
        entry = {"event": event, **content}
        line = json.dumps(entry, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        journal = self.path / "journal.jsonl"
        with plain_errors(journal):
            size = journal.stat().st_size
            try:
                with journal.open("ab", buffering=0) as file:
                    rest = memoryview(line)
                    while rest:
                        rest = rest[file.write(rest) :]
                    os.fsync(file.fileno())
            except BaseException:  # all of the line or nothing, whatever stopped it
                os.truncate(journal, size)
                raise
        self.entries.append(entry)
        self._history.take(entry)
        return entry

    # --- facts ----------------------------------------------------------------------------------------------------

    def add_facts(self, facts: Sequence[Fact], **about: Any) -> None:
        """Accept the facts of one call of edit."""
        session = len(self.history.sessions) + 1
        text = "".join(json.dumps(fact.as_dict(), ensure_ascii=False) + "\n" for fact in facts)
        write_text(self.path / "facts" / f"{session:04d}.jsonl", text)
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        self.append("facts", session=session, count=len(facts), sha256=sha256, **about)

    def facts(self) -> list[Fact]:
        """All facts accepted so far, by index."""
        facts: list[Fact] = []
        for session in range(1, len(self.history.sessions) + 1):
            path = self.path / "facts" / f"{session:04d}.jsonl"
            with plain_errors(path, "read"):
                facts += [Fact.from_dict(json.loads(line)) for line in path.read_text("utf-8").split("\n") if line]
        return facts

    # --- updates and checkpoints ----------------------------------------------------------------------------------

    def write_update(self, batch: int, updates: Mapping[str, Update], seen: Mapping[str, Seen]) -> None:
        """Store a batch's ΔW and what the method's state learns from the batch."""
        tensors = {
            f"{name}/{part}": value for name, update in updates.items() for part, value in update.tensors().items()
        }
        tensors |= {f"{name}/{part}": value for name, parts in seen.items() for part, value in parts.items()}
        write_tensors(self._update(batch), tensors)

    def read_update(self, batch: int) -> tuple[dict[str, Update], dict[str, Seen]]:
        """A batch's ΔW by matrix, and what the method's state learnt from it."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in read_tensors(self._update(batch)).items():
            matrix, part = name.rsplit("/", 1)
            parts.setdefault(matrix, {})[part] = value
        seen = {
            matrix: {part: value for part, value in tensors.items() if part not in PARTS}
            for matrix, tensors in parts.items()
        }
        return {matrix: update_from(tensors) for matrix, tensors in parts.items()}, seen

    def read_keys(self, batch: int) -> dict[str, Tensor]:
        """The keys that the method remembers of a batch, by matrix, without its ΔW."""
        return {name.removesuffix("/keys"): keys for name, keys in read_tensors(self._update(batch), "/keys").items()}

    def write_checkpoint(self, batch: int, weights: Mapping[str, Tensor], states: Mapping[str, State]) -> None:
        """Store working weights and method state after a batch, together."""
        tensors = {f"weight/{name}": value for name, value in weights.items()}
        tensors |= {f"state/{name}/{key}": value for name, state in states.items() for key, value in state.items()}
        write_tensors(self._checkpoint(batch), tensors)

    def read_checkpoint(self, batch: int) -> tuple[dict[str, Tensor], dict[str, State]]:
        """Working weights and method state after a batch."""
        weights: dict[str, Tensor] = {}
        states: dict[str, State] = {}
        for name, value in read_tensors(self._checkpoint(batch)).items():
            kind, rest = name.split("/", 1)
            if kind == "weight":
                weights[rest] = value
            else:
                matrix, key = rest.rsplit("/", 1)
                states.setdefault(matrix, {})[key] = value
        return weights, states

    def nearest_checkpoint(self, batch: int) -> int:
        """The last batch up to ``batch`` whose checkpoint is there; 0 where only the original weights remain."""
        return next((number for number in range(batch, 0, -1) if self._checkpoint(number).is_file()), 0)

    def thin(self, head: int) -> None:
        """Keep two checkpoints, the newest and that of the last power of two, and no file beyond the head.

        Whatever else a rollback asks for is replayed from the updates, which are small.
        """
        power = 1 << (head.bit_length() - 1) if head else 0
        kept = {self.nearest_checkpoint(head), self.nearest_checkpoint(power)}
        for path in (self.path / "checkpoints").glob("batch-*.safetensors"):
            number = int(path.stem.split("-")[1])
            if number not in kept:
                path.unlink(missing_ok=True)
        for path in (self.path / "updates").glob("batch-*.safetensors"):
            if int(path.stem.split("-")[1]) > head:
                path.unlink(missing_ok=True)

    def _update(self, batch: int) -> Path:
        return self.path / "updates" / f"batch-{batch:04d}.safetensors"

    def _checkpoint(self, batch: int) -> Path:
        return self.path / "checkpoints" / f"batch-{batch:04d}.safetensors"
