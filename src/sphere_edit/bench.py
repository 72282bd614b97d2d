"""A matrix of runs from one file: models × data × methods × variants × seeds, run by run, resumable, and its table."""

from __future__ import annotations

import gc
import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from sphere_edit.counting import counted
from sphere_edit.editing.settings import Settings, first_error, make_settings, read_settings_file
from sphere_edit.editor import Editor
from sphere_edit.errors import SphereEditError
from sphere_edit.facts.corpus import read_passages
from sphere_edit.facts.readers import FactSet, read_facts
from sphere_edit.files import plain_errors, write_json, write_text
from sphere_edit.models.loading import full_name
from sphere_edit.progress import Once, Reporter, duration
from sphere_edit.reporting.comparison import UNEDITED, Row, as_csv, latex, markdown, read_row
from sphere_edit.reporting.report import write_report
from sphere_edit.runs.folder import RunFolder
from sphere_edit.tuning import calibrate

_VARIANTS: dict[str, dict[str, Any]] = {"plain": {"sphere": {"enabled": False}}, "SPHERE": {}}


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(_Strict):
    """Which facts of a source."""

    source: str = Field(description="as for sphere-edit edit")
    skip: int = Field(0, ge=0, description="leave out the first N facts")
    limit: int | None = Field(None, ge=1, description="take N facts")
    shuffle: bool = Field(False, description="in a random order, another one for each seed")
    skip_bad: bool = Field(False, description="leave out records that cannot be used")
    target: str = Field("answer", pattern="^(answer|alternative)$", description="what a ZsRE record is edited to")


class Resources(_Strict):
    """What one run takes of a cluster."""

    cpus: float = Field(1, gt=0, description="cores of one run, on a cluster")
    gpus: float = Field(0, ge=0, description="GPUs of one run, on a cluster; half of one is 0.5")

    @property
    def words(self) -> str:
        """For the screen."""
        return _many(self.cpus, "CPU") + (f" and {_many(self.gpus, 'GPU')}" if self.gpus else "")


def _many(amount: float, unit: str) -> str:
    return f"{amount:g} {unit}" if amount == 1 else f"{amount:g} {unit}s"


class BenchConfig(_Strict):
    """What is compared. ``methods`` and ``variants`` are settings by name; a later one wins: settings, method, variant, seed."""

    models: tuple[str, ...] = Field(min_length=1)
    data: dict[str, DataConfig] = Field(min_length=1)
    methods: dict[str, dict[str, Any]] = Field(min_length=1)
    variants: dict[str, dict[str, Any]] = Field(default=dict(_VARIANTS), min_length=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    settings: dict[str, Any] = Field(default_factory=dict, description="of every run")
    only: dict[str, tuple[str, ...]] = Field(default_factory=dict, description="variants of a method, where not all")
    resources: Resources = Field(Resources(), exclude=True, description="of one run on a cluster; changes no result")

    @field_validator("methods", "variants", mode="before")
    @classmethod
    def _named(cls, value: Any, info: ValidationInfo) -> Any:
        """A list of names stands for names without settings of their own, and of the default variants for these."""
        known = _VARIANTS if info.field_name == "variants" else {}
        plain = isinstance(value, list) and all(isinstance(name, str) for name in value)
        return {name: known.get(name, {}) for name in value} if plain else value

    @field_validator("variants")
    @classmethod
    def _plain(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Tables call the variant ``plain`` by its method's name alone."""
        sphere = value.get("plain", _VARIANTS["plain"]).get("sphere")
        if not isinstance(sphere, dict) or sphere.get("enabled") is not False:
            raise ValueError("the variant 'plain' is the one without SPHERE: plain: {sphere: {enabled: false}}")
        return value


@dataclass(frozen=True)
class Cell:
    """One run of the matrix."""

    model: str
    data: str
    method: str
    variant: str
    seed: int
    settings: Settings

    @property
    def name(self) -> str:
        """Its folder within the bench."""
        parts = (Path(self.model).name, self.data, self.method, self.variant, str(self.seed))
        return "--".join(re.sub(r"[^\w.]+", "-", part).strip("-") for part in parts)

    @property
    def label(self) -> str:
        """What it is called on a screen."""
        return f"{self.method} {self.variant}, {self.data}, {Path(self.model).name}, seed {self.seed}"


class Bench:
    """The runs that a file asks for, and the folder they go to.

    Raises:
        SphereEditError: the file has an unknown name or an impossible value, or facts that cannot be read; nothing is computed then.
    """

    def __init__(self, config: BenchConfig, folder: Path):
        self.config, self.folder = config, folder
        self.failures: dict[str, str] = {}  # why runs failed, by name; each is tried again when the bench is
        self.cells = _cells(config)
        names: dict[str, Cell] = {}
        for cell in self.cells:
            twin = names.setdefault(cell.name, cell)
            if twin is not cell:
                raise SphereEditError(
                    f"bench: two runs would share the folder {cell.name}: {twin.label} ({twin.model}) and {cell.label} "
                    f"({cell.model}); give them other names, or models in a bench of their own"
                )
        self._facts: dict[tuple[str, int], FactSet] = {}
        for cell in self.cells:
            self.facts(cell)
        for source in {c for cell in self.cells if (c := cell.settings.moments.corpus) is not None}:
            read_passages(source)
        stored = folder / "bench.json"
        with plain_errors(stored, "read"):
            if stored.is_file() and json.loads(stored.read_text("utf-8")) != self._as_stored():
                raise SphereEditError(f"{folder} holds a bench with another config; choose another folder")

    @classmethod
    def read(cls, path: Path, folder: Path | None = None) -> Bench:
        """The bench of a YAML file; by default in ``runs/<the file's name>``."""
        try:
            config = BenchConfig.model_validate(read_settings_file(path))
        except ValidationError as error:
            raise SphereEditError(first_error(str(path), error)) from None
        return cls(config, folder or Path("runs") / path.stem)

    def _as_stored(self) -> dict[str, Any]:
        data = {f"{name}, seed {seed}": facts.sha256 for (name, seed), facts in self._facts.items()}
        return json.loads(json.dumps({"config": self.config.model_dump(mode="json"), "data": data}))

    def facts(self, cell: Cell) -> FactSet:
        """A run's facts."""
        key = cell.data, cell.seed
        if key not in self._facts:
            about = self.config.data[cell.data]
            self._facts[key] = read_facts(
                about.source,
                limit=about.limit,
                skip_bad=about.skip_bad,
                zsre_target="alternative" if about.target == "alternative" else "answer",
                skip=about.skip,
                shuffle=cell.seed if about.shuffle else None,
            )
        return self._facts[key]

    def short_label(self, cell: Cell) -> str:
        """What tells a run from the others of this bench."""
        many = (
            (cell.data, self.config.data),
            (Path(cell.model).name, self.config.models),
            (f"seed {cell.seed}", self.config.seeds),
        )
        variant = "" if cell.variant == "plain" else f" + {cell.variant}"
        return ", ".join([cell.method + variant, *(name for name, all_ in many if len(all_) > 1)])

    def run_folder(self, cell: Cell) -> Path:
        """Where a run lives."""
        return self.folder / "runs" / cell.name

    def finished(self, cell: Cell) -> bool:
        """Whether a run has nothing left to do."""
        folder = self.run_folder(cell)
        return RunFolder.exists(folder) and RunFolder.open(folder).history.finished

    def execute(self, reporter: Reporter, cells: Sequence[Cell] | None = None) -> None:
        """Do every run that is not finished (or those of some ``cells``), one after another; a run that fails is recorded and passed over.

        Several processes may do so in one folder at the same time: each takes the next run that no other is at.
        """
        write_json(self.folder / "bench.json", self._as_stored())
        asked = self.cells if cells is None else cells
        todo = [cell for cell in asked if not self.finished(cell)]
        self.record([cell for cell in asked if cell not in todo])  # an earlier process may have died before it did
        spent: list[float] = []
        reporter = Once(reporter)  # runs share their facts and models
        elsewhere: list[str] = []
        for cell in todo:
            with self._claimed(cell) as ours:
                if not ours:
                    elsewhere.append(cell.label)
                if not ours or self.finished(cell):
                    continue
                done = sum(map(self.finished, self.cells))
                left = ""
                if spent:
                    left = f", about {duration(sum(spent) / len(spent) * (len(self.cells) - done))} left"
                reporter.say(f"Run {done + 1} of {len(self.cells)}{left}: {cell.label}", "bold magenta")
                began = time.monotonic()
                try:
                    self._run(cell, reporter)
                    spent.append(time.monotonic() - began)
                except Exception as error:  # a night of runs must not end with one of them
                    self.failures[cell.name] = " ".join(str(error).split())
                    reporter.say(f"failed, and passed over: {self.failures[cell.name]}", "red")
                gc.collect()
                self.record([cell])
        if elsewhere:
            reporter.say(f"another process is at {counted(len(elsewhere), 'run')}: {'; '.join(elsewhere)}")

    @contextmanager
    def _claimed(self, cell: Cell) -> Iterator[bool]:
        """Whether a run is ours to do meanwhile; it is not where another process is at it."""
        path = self.folder / "claims" / f"{cell.name}.lock"
        with plain_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(str(path))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                yield False
                return
        try:
            yield True
        finally:
            lock.release()

    def record(self, cells: Sequence[Cell]) -> None:
        """Set down how some runs ended, beside what other processes have set down."""
        path = self.folder / "failures.json"
        with plain_errors(path):
            (self.folder / "claims").mkdir(parents=True, exist_ok=True)
        with FileLock(str(self.folder / "claims" / "failures.lock")):
            recorded = json.loads(path.read_text("utf-8")) if path.is_file() else {}
            for cell in cells:
                recorded.pop(cell.name, None)
                if cell.name in self.failures:
                    recorded[cell.name] = self.failures[cell.name]
            write_json(path, recorded)

    def _run(self, cell: Cell, reporter: Reporter) -> None:
        folder = self.run_folder(cell)
        if RunFolder.exists(folder):
            editor = Editor.open(folder, reporter)
        else:
            editor = Editor.from_pretrained(cell.model, folder, cell.settings, reporter)
        try:
            if editor.run is None:
                given, skip_bad = self.facts(cell), self.config.data[cell.data].skip_bad
                calibrate(editor, given, skip_bad)
                editor.edit(given, skip_bad)
            else:
                editor.resume()
        finally:
            editor.close()


def _cells(config: BenchConfig) -> list[Cell]:
    """Every run, in the order of the file: by model, data, seed, then methods and their variants side by side."""
    for method, variants in config.only.items():
        for unknown in [method] if method not in config.methods else [v for v in variants if v not in config.variants]:
            raise SphereEditError(f"bench: 'only' names '{unknown}', which stands neither in methods nor in variants")
    found = []
    for model in config.models:
        for data in config.data:
            for seed in config.seeds:
                for method, own in config.methods.items():
                    for variant in config.only.get(method, tuple(config.variants)):
                        settings = make_settings(
                            {"method": method}, config.settings, own, config.variants[variant], {"seed": seed}
                        )
                        found.append(Cell(full_name(model), data, method, variant, seed, settings))
    return found


def write_results(bench: Bench, reporter: Reporter) -> list[Path]:
    """The table of every finished run as markdown, LaTeX and CSV, and the page about them with its figures."""
    done = [cell for cell in bench.cells if bench.finished(cell)]
    if not done:
        raise SphereEditError(f"{bench.folder}: no run is finished, so there is nothing to compare")
    rows: list[Row] = []
    for cells in _groups(done):
        first = cells[0]
        group = f"{Path(first.model).name}, {first.data}"
        rows.append(read_row(group, first.method, first.variant, {c.seed: bench.run_folder(c) for c in cells}))
        if not any(row.group == group and row.method == UNEDITED for row in rows):
            every = {c.seed: bench.run_folder(c) for c in done if (c.model, c.data) == (first.model, first.data)}
            rows.insert(len(rows) - 1, read_row(group, UNEDITED, "", every, "unedited"))
    written = []
    for name, text in (("table.md", markdown(rows)), ("table.tex", latex(rows)), ("table.csv", as_csv(rows))):
        write_text(bench.folder / name, text)
        written.append(bench.folder / name)
    runs = {bench.run_folder(cell): bench.short_label(cell) for cell in done}
    page, figures = bench.folder / "report.html", bench.folder / "figures"
    written.append(write_report(list(runs), page, figures, reporter, list(runs.values())))
    return written


def _groups(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Runs that differ in their seed alone, together."""
    found: dict[tuple[str, str, str, str], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.model, cell.data, cell.method, cell.variant), []).append(cell)
    return list(found.values())
