"""The run folder: settings, facts, an append-only journal, updates, checkpoints. Everything that survives a crash.

A line in ``journal.jsonl`` is the commit: what it names was written and flushed before it. Whatever is on disk beyond
the last line belongs to work that did not finish, and is done again.

    config.json                 settings, model identity, versions, context templates
    facts/0001.jsonl            the facts of each call of edit, as understood
    statistics/…safetensors     second moments or null spaces, as used
    journal.jsonl               facts, unedited, batch, look back, removal check, evaluation, ability, guard, rollback, finished
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from sphere_edit import ranks
from sphere_edit.counting import counted
from sphere_edit.editing.problem import Seen, State
from sphere_edit.errors import SphereEditError
from sphere_edit.facts.fact import Fact
from sphere_edit.files import (
    check_digest,
    content_digest,
    plain_errors,
    read_json,
    read_tensors,
    remove_stale_temporaries,
    write_json,
    write_tensors,
    write_text,
)
from sphere_edit.numerics.update import PARTS, Update, update_from
from sphere_edit.runs.history import History
from sphere_edit.runs.journal import Journal
from sphere_edit.runs.records import FactsAccepted, Record, RunConfig, parse_config
from sphere_edit.runs.summary import MetricsContent, parse_metrics
from sphere_edit.text import visible

METRICS = "metrics.json"
_NOT_STARTED = "nothing has been decided for this run yet"


Watcher = Callable[["RunFolder", Record], None]  # told of every line of a journal once it is committed; must not raise


class RunFolder:
    """One run on disk. Open it to read; take the lock to write.

    Of several ranks, each has read it, and the first one writes and locks for all.
    """

    def __init__(self, path: Path, config: RunConfig | None, records: list[Record]):
        self.path, self._config = path, config
        self.records, self._history = records, History.of(records)
        self._inputs: dict[str, str] = {}
        self.watchers: list[Watcher] = []
        self.writable = False  # whether the lock is held
        self._journal, self._lock = Journal(path), FileLock(str(path / ".lock"))

    @property
    def config(self) -> RunConfig:
        """What was decided before the first batch."""
        assert self._config is not None, _NOT_STARTED
        return self._config

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The journal's lines as plain values."""
        return [record.as_entry() for record in self.records]

    @classmethod
    def exists(cls, path: str | Path) -> bool:
        """Whether a run was started there: its journal has a line, the facts it accepted."""
        return Journal(Path(path)).begun

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
        ours = {RunConfig.NAME, Journal.NAME, "statistics", "heldout.json", "passages.json", "facts"}
        with plain_errors(path, "read"):
            if path.exists() and (not path.is_dir() or {i.name for i in path.iterdir() if i.name[0] != "."} - ours):
                raise SphereEditError(f"{path} exists and is not a run folder; choose another")

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """Start a run, with the lock taken; what it decides comes with `decide`.

        Raises:
            SphereEditError: the folder holds something else, or cannot be written.
        """
        ranks.once(partial(cls._start, path))
        run = cls(path, None, [])
        run.lock()
        return run

    @classmethod
    def _start(cls, path: Path) -> None:
        cls.refuse_taken(path)
        with plain_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            (path / Journal.NAME).touch()

    def decide(self, config: RunConfig, inputs: Mapping[str, str]) -> None:
        """Write down everything that affects results, before the first batch, with the hashes of the files that do."""
        self._config = ranks.once(lambda: config)  # the hour in it is one
        write_json(self.path / RunConfig.NAME, self.config.as_content())
        self._inputs = {RunConfig.NAME: self.config.digest, **inputs}

    @property
    def inputs(self) -> dict[str, str]:
        """Hashes of what the run was started with, by file; empty for runs that kept none."""
        first = next((record for record in self.records if isinstance(record, FactsAccepted)), None)
        return (first.inputs or {}) if first is not None else self._inputs

    def check_inputs(self) -> None:
        """Compare what the run was started with, as far as it is still there, with what the journal says of it.

        Tensors are compared where they are read (`files.read_tensors`); here it is made sure that the files are those of this run.

        Raises:
            SphereEditError: naming what was changed.
        """
        for name, digest in self.inputs.items():
            path = self.path / name
            if name == RunConfig.NAME:  # compared when the run was opened
                continue
            if path.suffix == ".safetensors":
                same = not path.is_file() or content_digest(path) == digest
            else:
                with plain_errors(path, "read"):
                    same = hashlib.sha256(path.read_bytes()).hexdigest() == digest
            if not same:
                raise _not_as_started(path)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Read a run. A half-written last line (the process died while writing it) does not count.

        Raises:
            SphereEditError: no run there, or a config or journal that is damaged or of another version.
        """
        path = Path(path)
        if not cls.exists(path):
            raise SphereEditError(f"{path} is not a run folder (it has no journal)")
        _refuse_links(path)
        with plain_errors(path / RunConfig.NAME, "read"):
            content = json.loads((path / RunConfig.NAME).read_text("utf-8"))
        config = parse_config(content, str(path))
        run = cls(path, config, Journal(path).read())
        if run.inputs.get(RunConfig.NAME, config.digest) != config.digest:
            raise _not_as_started(path / RunConfig.NAME)
        return run

    def lock(self, only_to_read: bool = False) -> None:
        """Keep every other process off this run until this one ends or calls `unlock`.

        Args:
            only_to_read: nothing will be written, so that a folder that cannot be written is no obstacle.

        Raises:
            SphereEditError: another process is at work in it.
        """
        records = ranks.once(partial(self._take_lock, only_to_read))
        if records is not None:
            self.writable, self.records = True, records
            self._history = History.of(self.records)

    def _take_lock(self, only_to_read: bool) -> list[Record] | None:
        """The journal as it stands now, or nothing where it will only be read."""
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise SphereEditError(f"another process is working in {self.path}; wait for it, or stop it first") from None
        except OSError as error:
            if only_to_read:
                return None
            with plain_errors(self.path):
                raise error
        try:
            remove_stale_temporaries(self.path)
            return self._journal.take_over()
        except BaseException:
            self.unlock()
            raise

    def unlock(self) -> None:
        """Let others in."""
        self.writable = False
        self._lock.release()

    @property
    def history(self) -> History:
        """The journal, folded; to be read, not changed."""
        return self._history

    def append(self, record: Record) -> None:
        """Commit one record, with the time: written and flushed to disk before this returns."""
        record = ranks.once(partial(self._journal.append, record))
        self.records.append(record)
        self._history.take(record)
        for watcher in self.watchers:
            watcher(self, record)

    # --- facts ----------------------------------------------------------------------------------------------------

    def add_facts(self, facts: Sequence[Fact], source: str, protocol: str, left_out: Sequence[str]) -> None:
        """Accept the facts of one call of edit."""
        session = len(self.history.sessions) + 1
        text = "".join(json.dumps(fact.as_dict(), ensure_ascii=False) + "\n" for fact in facts)
        sha256 = write_text(self.path / "facts" / f"{session:04d}.jsonl", text)
        about: dict[str, Any] = {"source": visible(source), "protocol": protocol, "left_out": list(left_out)}
        about |= {"inputs": self.inputs} if session == 1 else {}
        self.append(FactsAccepted(session=session, count=len(facts), sha256=sha256, **about))

    def facts(self) -> list[Fact]:
        """All facts accepted so far, by index."""
        facts: list[Fact] = []
        for record in self.records:
            if isinstance(record, FactsAccepted):
                path = self.path / "facts" / f"{record.session:04d}.jsonl"
                with plain_errors(path, "read"):
                    data = path.read_bytes()
                    check_digest(path, data, record.sha256)
                    lines = [json.loads(line) for line in data.decode().split("\n") if line]
                    facts += facts_of(lines, record.count, path)
        return facts

    def metrics(self) -> MetricsContent:
        """The content of ``metrics.json``."""
        return read_metrics(self.path)

    def current_metrics(self) -> MetricsContent | None:
        """The same, if it is there and of where the run stands."""
        try:
            content = self.metrics()
        except SphereEditError:  # not there, or damaged: it can be made again
            return None
        return content if content["after"] == self.history.head else None

    # --- updates and checkpoints ----------------------------------------------------------------------------------

    def write_update(self, batch: int, updates: Mapping[str, Update], seen: Mapping[str, Seen]) -> str:
        """Store a batch's ΔW and what the method's state learns from the batch. Returns the file's digest."""
        tensors = {
            f"{name}/{part}": value for name, update in updates.items() for part, value in update.tensors().items()
        }
        tensors |= {f"{name}/{part}": value for name, parts in seen.items() for part, value in parts.items()}
        return write_tensors(self._update(batch), tensors)

    def read_update(self, batch: int, matrix: str | None = None) -> tuple[dict[str, Update], dict[str, Seen]]:
        """A batch's ΔW by matrix, and what the method's state learnt from it; of one ``matrix`` or of all."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in self._tensors_of(batch, _of(matrix)).items():
            owner, part = name.rsplit("/", 1)
            parts.setdefault(owner, {})[part] = value
        seen = {
            owner: {part: value for part, value in tensors.items() if part not in PARTS}
            for owner, tensors in parts.items()
        }
        return {owner: update_from(tensors) for owner, tensors in parts.items()}, seen

    def read_keys(self, batch: int) -> dict[str, Tensor]:
        """The keys that the method remembers of a batch, by matrix, without its ΔW."""
        found = self._tensors_of(batch, lambda name: name.endswith("/keys"))
        return {name.removesuffix("/keys"): keys for name, keys in found.items()}

    def _tensors_of(self, batch: int, wanted: Callable[[str], bool] | None) -> dict[str, Tensor]:
        """Tensors of a batch's file of updates, which must be the one it wrote."""
        path = self._update(batch)
        written = self.history.batches[batch - 1].update if batch <= self.history.head else None
        if written is not None and content_digest(path) != written:
            raise SphereEditError(f"{path} is not what batch {batch} wrote; put it back from a backup")
        found = read_tensors(path, wanted)
        if strange := [name for name, value in found.items() if not value.is_floating_point()]:
            raise SphereEditError(
                f"{path} is damaged: '{strange[0]}' in it is no float tensor; put it back from a backup"
            )
        return found

    def write_checkpoint(self, batch: int, weights: Mapping[str, Tensor], states: Mapping[str, State]) -> None:
        """Store working weights and method state after a batch, together."""
        tensors = {f"weight/{name}": value for name, value in weights.items()}
        tensors |= {f"state/{name}/{key}": value for name, state in states.items() for key, value in state.items()}
        write_tensors(self._checkpoint(batch), tensors)

    def read_checkpoint(self, batch: int, matrix: str | None = None) -> tuple[dict[str, Tensor], dict[str, State]]:
        """Working weights and method state after a batch; of one ``matrix``, its weight alone."""
        weights: dict[str, Tensor] = {}
        states: dict[str, State] = {}
        wanted = None if matrix is None else f"weight/{matrix}".__eq__
        for name, value in read_tensors(self._checkpoint(batch), wanted).items():
            kind, rest = name.split("/", 1)
            if kind == "weight":
                weights[rest] = value
            else:
                owner, key = rest.rsplit("/", 1)
                states.setdefault(owner, {})[key] = value
        return weights, states

    def nearest_checkpoint(self, batch: int) -> int:
        """The last batch that led to ``batch`` whose checkpoint is there; 0 where only the original weights remain."""
        numbers = reversed(self.history.lineage(batch))
        return next((number for number in numbers if self._checkpoint(number).is_file()), 0)

    def last_checkpoint(self, batch: int, matrix: str | None = None) -> tuple[int, dict[str, Tensor], dict[str, State]]:
        """The number of the last checkpoint that led to ``batch``, and what `read_checkpoint` says of it; 0 and nothing where there is none."""
        start = self.nearest_checkpoint(batch)
        return start, *(self.read_checkpoint(start, matrix) if start else ({}, {}))

    def updates(
        self, after: int, batch: int, matrix: str | None = None
    ) -> Iterator[tuple[int, dict[str, Update], dict[str, Seen]]]:
        """The batches that lead from ``after``, 0 or a batch before it, to ``batch``, each by its number with what `read_update` says of it."""
        for number in self.history.written(batch):
            if number > after:
                yield number, *self.read_update(number, matrix)

    def thin(self, head: int) -> None:
        """Keep two checkpoints, the newest and that of the last power of two, and no file beyond the head.

        Whatever else a rollback asks for is replayed from the updates, which are small.
        """
        ranks.once(partial(self._thin, head))

    def _thin(self, head: int) -> None:
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


def facts_of(lines: Any, count: int, path: Path) -> list[Fact]:
    """Facts as a run's files describe them.

    Raises:
        SphereEditError: these describe no facts, or another number of them.
    """
    try:
        facts = [Fact.from_dict(line) for line in lines]
    except (KeyError, TypeError, AttributeError) as error:
        raise SphereEditError(
            f"{path} is damaged ({type(error).__name__}: {error}); put it back from a backup"
        ) from None
    if len(facts) != count:
        raise SphereEditError(f"{path} holds {counted(len(facts), 'fact')}, not {count}; put it back from a backup")
    return facts


def _not_as_started(path: Path) -> SphereEditError:
    return SphereEditError(
        f"{path} is not what this run was started with; put it back from a backup, or start a new run"
    )


def _refuse_links(path: Path) -> None:
    """A run folder holds its own files; through a link, others would be read, removed or overwritten."""
    with plain_errors(path, "read"):
        link = next((item for item in sorted(path.rglob("*")) if item.is_symlink()), None)
    if link is not None:
        raise SphereEditError(
            f"{link.relative_to(path)} is a link in {path}; a run holds its own files: put what it points to in its place"
        )


def read_metrics(folder: Path) -> MetricsContent:
    """The content of a run's ``metrics.json``.

    Raises:
        SphereEditError: it is not there, or damaged.
    """
    return parse_metrics(read_json(folder / METRICS), str(folder / METRICS))


def _of(matrix: str | None) -> Callable[[str], bool] | None:
    """Which tensors of an update belong to a matrix."""
    return None if matrix is None else lambda name: name.rsplit("/", 1)[0] == matrix
