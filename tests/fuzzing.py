"""Inputs that are wrong at random: facts, settings, benches, runs and models. Every case follows from its seed alone.

A case ends well, or in a `SphereEditError`; `Silent` says that something was taken for another thing without a word. Anything else is
a traceback that a user would see.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import math
import random
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from conftest import fact_records
from families import FAMILIES, save_tiny
from sphere_edit import SphereEditError
from sphere_edit.bench import Bench
from sphere_edit.editing.methods import METHODS
from sphere_edit.editing.settings import make_settings, read_settings_file
from sphere_edit.editor import Editor, opened
from sphere_edit.evaluation.scores import complete_answers, score_facts
from sphere_edit.facts.fact import Fact
from sphere_edit.facts.readers import read_facts
from sphere_edit.models.loading import load_model
from sphere_edit.progress import Quiet
from sphere_edit.reporting import views
from sphere_edit.reporting.comparison import as_csv, latex, markdown, read_row
from sphere_edit.reporting.report import write_report
from sphere_edit.reporting.results import draw
from sphere_edit.reporting.series import labelled
from sphere_edit.runs.folder import RunFolder
from sphere_edit.text import Screen

QUICK: dict[str, Any] = {
    "method": "memit_seq",
    "options": {"second_moment_weight": 0.1},
    "batch_size": 2,
    "layers": [1, 2],
    "recheck": 1,
    "repair": 2,
    "targets": {"steps": 3, "lr": 0.3},
    "moments": {"sampled_tokens": 256},
    "tokens_per_batch": 256,
}
_DEPTH = 400  # of brackets in brackets: beyond what recursive readers take
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 10**6, 10**30, -(10**30), 2**63, -(2**63), 0.5, -0.5, 1e308, -1e308, 5e-324),
    *(math.nan, math.inf, -math.inf, "", " ", "{}", "{} {}", "{0}", "x", "NaN", "1e999", "[/x]", "\x00", "\x1b[31m", "\ud800"),
    *("\u202e", "é" * 30, "word " * 4000, "../../x", "/", "~", "-", "2024-13-45", [], {}, [[]], [None], [{}], {"": None}, {"str": 1}),
    *([1, 2, 3], ["a"], {"prompt": "x"}, {"a": {"a": {"a": {}}}}),
)  # fmt: skip


class Silent(AssertionError):
    """Something was taken for another thing without a word."""


def mutated(value: Any, rng: random.Random, times: int) -> Any:
    """A copy of a JSON value with some of its parts removed, exchanged, doubled, renamed or put where they do not belong."""
    root = [json.loads(json.dumps(value))]
    for _ in range(times):
        places = list(_places(root))
        holder, key = rng.choice(places)
        at = holder[key]
        match rng.randrange(8):
            case 0 if holder is not root:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[rng.choice(["", "x", key.upper(), f"{key} ", "prompt", "subject", "..", "0"])] = holder.pop(key)
            case 2 if isinstance(holder, list) and holder is not root:
                holder.insert(rng.randrange(len(holder) + 1), at)
            case 3 if isinstance(at, (int, float)) and not isinstance(at, bool):
                holder[key] = rng.choice([-at, at + 1, at * 1000, at * 10**12, float(at), str(at), at - 1, -at - 1])
            case 4 if isinstance(at, str) and at:
                cut = rng.randrange(len(at))
                holder[key] = rng.choice([at[:cut], at[cut:], at + at, at[:cut] + "{}" + at[cut:], at.upper(), [at]])
            case 5:
                other, where = rng.choice(places)
                holder[key] = json.loads(json.dumps(other[where]))
            case _:
                holder[key] = deepcopy(rng.choice(JUNK))
    return root[0]


def _places(value: Any) -> Any:
    """Every place in a tree: what holds it, and under which key."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def spoilt(data: bytes, rng: random.Random) -> bytes:
    """Bytes with a few of them flipped, cut, inserted, doubled or in another encoding."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(7):
            case 0 if out:
                out[min(at, len(out) - 1)] ^= 1 << rng.randrange(8)
            case 1:
                del out[at:]
            case 2:
                del out[at : at + rng.randrange(1, 40)]
            case 3:
                out[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 4:
                out[at:at] = rng.choice(
                    [b"[" * _DEPTH, b'{"a":' * _DEPTH, b"\x00", b'"', b",", b"\r", b"\n", b"- &a [*a, *a]\n"]
                )
            case 5:
                out[:0] = rng.choice([codecs.BOM_UTF8, codecs.BOM_UTF16_LE, b"\n\n", b"#"])
            case _:
                out = bytearray(
                    bytes(out).decode("utf-8", "replace").encode(rng.choice(["utf-16", "latin-1", "utf-8"]), "replace")
                )
    return bytes(out)


def dumped(value: Any) -> bytes:
    """A value as JSON bytes, NaN and halves of pairs too."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


# --- facts --------------------------------------------------------------------------------------------------------

_OTHERS: tuple[dict[str, Any], ...] = (
    {"requested_rewrite": {"prompt": "{} is in", "subject": "Rome", "target_new": {"str": "Paris"}, "target_true": {"str": "Italy"}}, "paraphrase_prompts": ["a {}"], "neighborhood_prompts": ["b"], "generation_prompts": ["c"], "case_id": 1},
    {"subject": "Rome", "src": "Where is Rome?", "pred": "Italy", "rephrase": "Rome is where?", "alt": "Paris", "answers": ["Italy"], "loc": "nq question: who is it", "loc_ans": "Ada", "cond": "x >> y || z"},
    {"subject": "Rome", "prompt": "Rome is in", "target_new": "Paris", "ground_truth": ["Italy"], "rephrase_prompt": "Rome lies in", "locality": {"neighborhood": [{"prompt": "Ada is", "ground_truth": "x"}]}, "portability": {"hop": [{"prompt": "p", "ground_truth": [["Tiber"]]}]}},
    {"en": {"subject": "Rome", "src": "Where is Rome?", "alt": "Paris", "loc": "a", "loc_ans": "b", "port": {"q": "x"}}, "de": {}},
)  # fmt: skip


class Facts:
    """Files of facts: read, admitted to a model, and now and then asked."""

    def __init__(self, place: Path):
        self.place = place
        self.editor = Editor.from_pretrained(
            save_tiny("llama", place / "model"), place / "run", reporter=Quiet(), **QUICK
        )

    def __call__(self, rng: random.Random) -> None:
        path = self.place / f"facts{rng.choice(['.json', '.jsonl', '.csv', '.jsonl'])}"
        path.write_bytes(self._content(path.suffix, rng))
        skip_bad = rng.random() < 0.5
        target: Any = rng.choice(["answer", "alternative"])
        more = {
            "skip": rng.choice([0, 0, 1]),
            "limit": rng.choice([None, None, 1, 2]),
            "shuffle": rng.choice([None, 1]),
        }
        given = read_facts(str(path), skip_bad=skip_bad, zsre_target=target, **more)
        given.remarks()
        for fact in given.facts:
            if Fact.from_dict(json.loads(json.dumps(fact.as_dict()))) != fact:
                raise Silent(f"a fact is not what it was once it was stored: {fact}")
        planned, _ = self.editor.check(given, skip_bad)
        if rng.random() < 0.02:
            score_facts(self.editor.loaded, complete_answers(self.editor.loaded, planned), 256, Quiet())

    def _content(self, suffix: str, rng: random.Random) -> bytes:
        records = [*fact_records(rng.choice((1, 2, 3)), rng.randrange(12)), *rng.sample(_OTHERS, rng.choice((0, 0, 1)))]
        if rng.random() < 0.3:
            records = [dict(rng.choice(_OTHERS)) for _ in records]
        changed: Any = mutated(records, rng, rng.choice((0, 1, 1, 2, 6)))
        rows = changed if isinstance(changed, list) else [changed]
        if suffix == ".csv":
            text = io.StringIO()
            names = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row)) or ["x"]
            writer = csv.writer(text)
            writer.writerow(names)
            for row in rows:
                cells = [row.get(name) for name in names] if isinstance(row, dict) else [row]
                writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
            data = text.getvalue().encode("utf-8", "surrogatepass")
        else:
            data = dumped(changed) if suffix == ".json" else b"".join(dumped(row) + b"\n" for row in rows)
        return spoilt(data, rng) if rng.random() < 0.3 else data


# --- settings and benches -----------------------------------------------------------------------------------------


def _yaml(value: Any, rng: random.Random) -> bytes:
    data = yaml.safe_dump(value, allow_unicode=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    return spoilt(data, rng) if rng.random() < 0.25 else data


class Settings:
    """Settings files: read, and resolved for a model."""

    def __init__(self, place: Path):
        self.path = place / "settings.yaml"
        self.loaded = load_model(str(save_tiny("llama", place / "model")))

    def __call__(self, rng: random.Random) -> None:
        whole = make_settings({"method": rng.choice(list(METHODS))})
        base = whole.with_resolved(whole.resolved_matrices(self.loaded.architecture), self.loaded.device).model_dump(
            mode="json"
        )
        self.path.write_bytes(_yaml(mutated(rng.choice([base, QUICK]), rng, rng.choice((0, 1, 2, 4))), rng))
        found = make_settings(read_settings_file(self.path))
        if make_settings(json.loads(json.dumps(found.model_dump(mode="json", exclude_unset=True)))) != found:
            raise Silent(f"settings are not what they were once they were stored: {found}")
        resolved = found.with_resolved(found.resolved_matrices(self.loaded.architecture), self.loaded.device)
        resolved.make_method(), resolved.make_sphere()


class Benches:
    """Bench files."""

    def __init__(self, place: Path):
        self.place = place
        facts = place / "facts.json"
        facts.write_text(json.dumps(fact_records(3)))
        self.base = {
            "models": ["model"],
            "data": {
                "own": {"source": str(facts), "limit": 2, "shuffle": True},
                "other": {"source": str(facts), "skip": 1},
            },
            "methods": {"alphaedit": {"options": {"l2": 0.1}}, "memit": {}},
            "variants": {"plain": {"sphere": {"enabled": False}}, "SPHERE": {}},
            "seeds": [0, 1],
            "only": {"memit": ["plain"]},
            "settings": QUICK,
        }

    def __call__(self, rng: random.Random) -> None:
        path = self.place / "bench.yaml"
        path.write_bytes(_yaml(mutated(self.base, rng, rng.choice((0, 1, 2, 4))), rng))
        for cell in Bench.read(path, self.place / "out").cells:
            _ = cell.name, cell.label


# --- runs ---------------------------------------------------------------------------------------------------------


class Runs:
    """Run folders with a damaged file: shown, compared, reported, and now and then gone on with."""

    def __init__(self, place: Path):
        self.place, self.whole, self.folder = place, place / "whole", place / "run"
        editor = Editor.from_pretrained(save_tiny("llama", place / "model"), self.whole, reporter=Quiet(), **QUICK)
        editor.edit(fact_records(5))
        editor.close()
        self.files = [path.relative_to(self.whole) for path in sorted(self.whole.rglob("*.json*"))]
        shutil.copytree(self.whole, self.folder)

    def __call__(self, rng: random.Random) -> None:
        inside = rng.choice([Path("config.json"), Path("journal.jsonl"), Path("metrics.json"), *self.files])
        deep = rng.random() < 0.04
        try:
            self._damage(inside, rng)
            if rng.random() < 0.7:
                self._without_hashes()
            read_everything(self.folder, self.place, deep)
            if deep:
                self._go_on(rng)
        finally:
            if deep:
                shutil.rmtree(self.folder)
                shutil.copytree(self.whole, self.folder)
            else:
                for name in (inside, Path("journal.jsonl")):
                    shutil.copyfile(self.whole / name, self.folder / name)

    def _damage(self, inside: Path, rng: random.Random) -> None:
        path = self.folder / inside
        if rng.random() < 0.15:
            path.write_bytes(spoilt(path.read_bytes(), rng))
            return
        if path.suffix == ".json":
            path.write_bytes(dumped(mutated(json.loads(path.read_bytes()), rng, rng.choice((1, 1, 2, 4)))))
            return
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
        if rng.random() < 0.8:
            at = rng.randrange(len(lines))
            lines[at] = mutated(lines[at], rng, rng.choice((1, 1, 2, 4)))
        else:
            lines = mutated(lines, rng, 1)
        path.write_bytes(b"".join(dumped(line) + b"\n" for line in (lines if isinstance(lines, list) else [lines])))

    def _without_hashes(self) -> None:
        """As a folder that was put together by hand: nothing in it says what its files should be."""
        path = self.folder / "journal.jsonl"
        lines = []
        for line in path.read_bytes().split(b"\n"):
            try:
                entry = json.loads(line)
                for name in ("inputs", "update", *(() if entry.get("event") == "facts" else ("sha256",))):
                    entry.pop(name, None)
                if entry.get("event") == "facts":
                    facts = self.folder / "facts" / f"{entry['session']:04d}.jsonl"
                    entry["sha256"] = hashlib.sha256(facts.read_bytes()).hexdigest()
                line = dumped(entry)
            except (ValueError, AttributeError, KeyError, TypeError, OSError):
                pass
            lines.append(line)
        path.write_bytes(b"\n".join(lines))

    def _go_on(self, rng: random.Random) -> None:
        with opened(self.folder, Quiet(), trust_run=rng.random() < 0.2) as editor:
            act: Callable[[], object] = rng.choice(
                [
                    lambda: editor.resume(),
                    lambda: editor.edit(fact_records(2, start=8)),
                    lambda: editor.rollback(rng.choice([0, 1])),
                    lambda: editor.evaluate(fact_records(1)),
                    lambda: editor.save_pretrained(self.folder / "exported"),
                ]
            )
            act()


def read_everything(folder: Path, place: Path, page: bool) -> None:
    """All that only reads a run, each by itself; the first that fails otherwise than in a sentence ends it."""
    screen = Screen(file=io.StringIO(), width=200)

    def shown() -> None:
        for view in views.of_run(folder, 5):
            screen.print(draw(view))

    def compared() -> None:
        for when in ("unedited", "edited"):
            rows = [read_row("g", "memit", "", {0: folder}, when)]
            _ = markdown(rows), latex(rows), as_csv(rows)

    def reported() -> None:
        if page:
            write_report([folder], place / "page.html", place / "figures", Quiet())
        series = labelled([folder])
        _ = views.states(series), views.matrices(series), views.abilities(series)
        _ = [(views.Facts.of(run.facts(), run.batches), run.retention()) for run in series]

    for act in (shown, compared, reported, lambda: RunFolder.open(folder).facts()):
        try:
            act()
        except SphereEditError:
            continue


# --- models -------------------------------------------------------------------------------------------------------


class Models:
    """Model folders whose config, tokenizer or generation settings are damaged."""

    def __init__(self, place: Path):
        self.folders = [save_tiny(family, place / family) for family in FAMILIES]
        self.place = place

    def __call__(self, rng: random.Random) -> None:
        whole = rng.choice(self.folders)
        folder = self.place / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        names = ["config.json"] * 6 + ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
        path = folder / rng.choice(names)
        data = path.read_bytes()
        path.write_bytes(spoilt(data, rng) if rng.random() < 0.1 else dumped(mutated(json.loads(data), rng, 1)))
        loaded = load_model(str(folder))
        _ = replace(loaded, source="x")


PARTS: dict[str, Callable[[Path], Callable[[random.Random], None]]] = {
    "facts": Facts,
    "settings": Settings,
    "benches": Benches,
    "runs": Runs,
    "models": Models,
}
