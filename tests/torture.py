"""Hours of what can happen to a machine and its files: kills, full disks, flipped bits, and inputs that are wrong at random.

    make torture MINUTES=60
    python tests/torture.py --minutes 1 --seed 0 --parts kills,facts
    python tests/torture.py --parts runs --only 4711            # one case again

A case follows from the seed, its part and its number. Kills come half at a file-system event, which repeats exactly, and half at an
instant. Printed at the end: cases; tracebacks (an error that is no sentence); silent differences (other results than undisturbed,
without a word); lost bytes (what was committed and is gone, or cannot be gone on with).
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from tqdm import tqdm

import conftest  # noqa: F401  # one thread, no accelerator
from conftest import fact_records
from families import save_tiny
from fuzzing import PARTS as FUZZED
from fuzzing import QUICK, Silent
from sphere_edit import SphereEditError, files
from sphere_edit.cli import app
from sphere_edit.editor import Editor, opened
from sphere_edit.progress import Quiet
from sphere_edit.runs.folder import RunFolder
from sphere_edit.trials import Trial

tqdm.monitor_interval = (
    0  # its thread may hold the bars' lock while a child is forked, which then waits for it for ever
)
_HUNG = 900  # seconds after which a child is no more waited for
_MEMORY = 24 << 30  # bytes of address space: what would take more ends in an error that is seen
_TIMES = frozenset(
    {"seconds", "time", "peak_memory", "expected_memory", "created", "inputs"}
)  # of runs that are otherwise equal
_SHARES = {"kills": 4.0, "disks": 2.0, "flips": 2.0}  # of the time; the others get one each


class Lost(AssertionError):
    """What was there is gone, or cannot be gone on with."""


@dataclass
class Tally:
    """What came of a part's cases."""

    cases: int = 0
    told: int = 0
    bad: dict[str, list[str]] = field(default_factory=lambda: {"tracebacks": [], "silent": [], "lost": []})

    def take(self, number: int, case: Callable[[], object]) -> None:
        """Do a case and note how it ended."""
        self.cases += 1
        try:
            case()
        except SphereEditError:
            self.told += 1
        except Silent as error:
            self._note("silent", number, str(error))
        except Lost as error:
            self._note("lost", number, str(error))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)
            ours = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in where if "sphere_edit" in frame.filename]
            self._note("tracebacks", number, f"{type(error).__name__}: {str(error)[:200]} at {' '.join(ours[-3:])}")

    def _note(self, kind: str, number: int, what: str) -> None:
        known = self.bad[kind]
        if not any(what.split(" at ")[-1] in line for line in known) or len(known) < 3:
            print(f"    {kind}, case {number}: {what}", flush=True)
        known.append(f"case {number}: {what}")


# --- what a command leaves behind ---------------------------------------------------------------------------------


def remains(folder: Path) -> dict[str, str]:
    """A digest of every file below a folder, without times, pages and figures: equal for what was done alike."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or path.suffix in (".lock", ".html", ".png", ".svg") or path.name == ".lock":
            continue
        found[name] = hashlib.sha256(_without_times(path)).hexdigest()
    return found


def differing(left: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Names of what is not alike. After which batches a run keeps a checkpoint goes by the clock; those that both have must be equal."""
    names = {name for name in {*left, *wanted} if left.get(name) != wanted.get(name)}
    return sorted(name for name in names if "checkpoints/" not in name or (name in left and name in wanted))


def _without_times(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix not in (".json", ".jsonl"):
        return data
    lines = data.splitlines() if path.suffix == ".jsonl" else [data]
    return b"\n".join(json.dumps(_plain(json.loads(line)), sort_keys=True).encode() for line in lines)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items() if name not in _TIMES}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def in_child(
    work: Callable[[], object], delay: float | None = None, events: int | None = None, changing: bool = False
) -> tuple[str, int]:
    """Do ``work`` in a process of its own, killed after ``delay`` seconds or at the ``events``-th event of the file system.

    Args:
        changing: only what changes a file or a folder counts, for a kill at a read leaves what one before the next change leaves.

    Returns:
        how it ended (``well``, ``told``, ``killed``, or else a traceback or that it hung), and how many events there were.
    """
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reader)
        count = [0]
        sys.addaudithook(lambda event, args: None if changing and _reads(event, args) else _tick(event, count, events))
        with Path(os.devnull).open("w") as nothing:
            sys.stdout = sys.stderr = nothing
            said = _ended(work)
        os.write(writer, json.dumps([said[-2000:], count[0]]).encode())
        os._exit(0)
    os.close(writer)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reader, "rb") as pipe:
        hung = not select.select([pipe], [], [], _HUNG)[0]
        if hung:
            os.kill(child, signal.SIGKILL)
        answer = pipe.read()
    os.waitpid(child, 0)
    if hung:
        return f"it hung for {_HUNG} s", 0
    said, count = json.loads(answer) if answer else ("killed", 0)
    return said, count


def _reads(event: str, args: tuple[Any, ...]) -> bool:
    return event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)


def _tick(event: str, count: list[int], at: int | None) -> None:
    if event == "open" or (
        event.startswith(("os.", "shutil.")) and event not in ("os.listdir", "os.scandir", "os.fwalk", "os.walk")
    ):
        count[0] += 1
        if at is not None and count[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)


def _ended(work: Callable[[], object]) -> str:
    try:
        work()
    except SphereEditError as error:
        return f"told: {error}"
    except SystemExit as error:
        return "well" if error.code in (0, None) else f"told: status {error.code}"
    except BaseException:
        return traceback.format_exc()
    return "well"


def command(*arguments: object) -> None:
    """A command of the package, in this process."""
    app([str(argument) for argument in arguments], standalone_mode=False)


# --- commands that are disturbed ----------------------------------------------------------------------------------


class World:
    """A model, facts and a finished run, and the commands that are disturbed on copies of them."""

    def __init__(self, place: Path):
        self.place, self.model, self.cache = place, save_tiny("llama", place / "model"), place / "cache"
        os.environ["SPHERE_EDIT_CACHE"] = str(self.cache)
        self.facts, self.more, self.settings = place / "facts.json", place / "more.json", place / "settings.yaml"
        self.facts.write_text(json.dumps(fact_records(5)))
        self.more.write_text(json.dumps(fact_records(2, start=8)))
        self.settings.write_text(yaml.safe_dump({**QUICK, "evaluation": {"every": 2, "generation": "off"}}))
        self.bench = place / "bench.yaml"
        matrix = {
            "models": [str(self.model)],
            "data": {"own": {"source": str(self.facts), "limit": 2}},
            "methods": ["memit"],
        }
        quick = {name: value for name, value in QUICK.items() if name not in ("method", "options")}
        self.bench.write_text(
            yaml.safe_dump({**matrix, "settings": {**quick, "repair": 0, "evaluation": {"generation": "off"}}})
        )
        self.finished = place / "finished"
        command("edit", self.model, self.facts, "-o", self.finished, "--config", self.settings)
        for name in ("report.html", "figures"):
            path = self.finished / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def work(self, name: str, at: Path) -> None:
        """A command as a user gives it; after a disturbance, as he gives it again."""
        os.environ["SPHERE_EDIT_CACHE"] = str(at / "cache")
        run = at / "run"
        match name:
            case "edit":
                command(
                    "edit",
                    self.model,
                    self.facts,
                    "-o",
                    run,
                    "--config",
                    self.settings,
                    *["--resume"] * RunFolder.exists(run),
                )
            case "more":
                waits = len(RunFolder.open(run).history.sessions) > 1
                command("edit", run, *(["--resume"] if waits else [self.more]))
            case "rollback":
                command("rollback", run, "--to", 1)
            case "remove":
                begun = bool(RunFolder.open(run).history.removed)
                command(*(("edit", run, "--resume") if begun else ("remove", run, "--fact", 2)))
            case "export" | "delta" | "lora" if not (at / "out").exists():
                form = {"export": "hf"}.get(name, name)
                command("export", run, "-o", at / "out", "--as", form, *(["--rank", 2] if form == "lora" else []))
            case "tune":
                Trial.score = property(lambda self: 0.5)  # type: ignore[method-assign,assignment]
                facts = self.facts
                command(
                    "tune",
                    self.model,
                    "--facts",
                    facts,
                    "--config",
                    self.settings,
                    "-o",
                    at / "tuned.yaml",
                    "--method",
                    "memit",
                )
            case "bench":
                command("bench", self.bench, "-o", at / "bench")

    def prepared(self, name: str, at: Path, warm: bool) -> Path:
        """A folder in which a command can be done."""
        at.mkdir(exist_ok=True)
        if name in ON_A_RUN:
            shutil.copytree(self.finished, at / "run")
        if warm or name in ON_A_RUN:
            shutil.copytree(self.cache, at / "cache")
        return at

    def left(self, name: str, at: Path) -> dict[str, str]:
        """What it leaves, to be compared."""
        if name != "tune":
            shutil.rmtree(at / "cache", ignore_errors=True)
        elif (at / "cache").exists():
            for path in (at / "cache").iterdir():
                if path.name != "tuned":
                    shutil.rmtree(path)
        return remains(at)


ON_A_RUN = ("more", "rollback", "remove", "export", "delta", "lora")
NAMES = ("edit", *ON_A_RUN, "tune", "bench")


class Disturbed:
    """Commands that are disturbed, given again, and compared with undisturbed ones."""

    def __init__(self, place: Path, kind: str):
        self.world, self.place, self.kind = World(place), place, kind
        self.known: dict[str, tuple[dict[str, str], float, int]] = {}

    def undisturbed(self, name: str) -> tuple[dict[str, str], float, int]:
        """What the command leaves, in how many seconds and how many events."""
        if name not in self.known:
            at = self.world.prepared(name, Path(tempfile.mkdtemp(dir=self.place)), warm=False)
            began = time.monotonic()
            said, events = in_child(lambda: self.world.work(name, at))
            seconds = time.monotonic() - began
            if said != "well":
                raise RuntimeError(f"{name} undisturbed: {said}")
            self.known[name] = self.world.left(name, at), seconds, events
            shutil.rmtree(at)
        return self.known[name]

    def __call__(self, rng: random.Random) -> None:
        name = rng.choice(NAMES)
        wanted, seconds, events = self.undisturbed(name)
        at = Path(tempfile.mkdtemp(dir=self.place))
        try:
            if self.kind == "kills":
                self.world.prepared(name, at, warm=rng.random() < 0.5)
                self._killed(name, at, rng, seconds, events)
                left = self.world.left(name, at)
            else:
                said, _ = in_child(lambda: self._full(name, at, rng))
                if said != "well":
                    raise RuntimeError(f"{name} on a full disk: {said}")
                left = json.loads((at.with_suffix(".json")).read_text())
                at.with_suffix(".json").unlink()
            if other := differing(left, wanted):
                raise Silent(f"{name}: {other[:6]} differ")
        finally:
            shutil.rmtree(at, ignore_errors=True)

    def _killed(self, name: str, at: Path, rng: random.Random, seconds: float, events: int) -> None:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            when = (
                {"delay": rng.uniform(0, seconds)} if rng.random() < 0.5 else {"events": rng.randrange(1, events + 1)}
            )
            said, _ = in_child(lambda: self.world.work(name, at), **when)  # type: ignore[arg-type]
            if said not in ("killed", "well"):
                raise (
                    Lost(f"{name} after a kill: {said}") if said.startswith("told") else RuntimeError(f"{name}: {said}")
                )
        said, _ = in_child(lambda: self.world.work(name, at))
        if said != "well":
            raise (
                Lost(f"{name} cannot be done again: {said}")
                if said.startswith("told")
                else RuntimeError(f"{name}: {said}")
            )

    def _full(self, name: str, at: Path, rng: random.Random) -> None:
        """On a disk that is full after some bytes, or where that cannot be mounted, at some write; then with room again."""
        size = int(2 ** rng.uniform(14, 20)) if name != "bench" else int(2 ** rng.uniform(14, 21))
        if name in ON_A_RUN:
            size += sum(
                p.stat().st_size + 4096 for p in (*self.world.finished.rglob("*"), *self.world.cache.rglob("*"))
            )
        mounted = _own_disk(at, size)
        self.world.prepared(name, at, warm=False)
        if not mounted:
            _fail_writes(rng.randrange(1, 60))
        said = _ended(lambda: self.world.work(name, at))
        if not said.startswith(("well", "told")):
            raise RuntimeError(f"size {size}: {said}")
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=1g", str(at)], check=True)
        os.fsync = lambda file: None  # type: ignore[assignment]
        said = _ended(lambda: self.world.work(name, at))
        if said != "well":
            raise RuntimeError(f"with room again (size {size}): {said}")
        at.with_suffix(".json").write_text(json.dumps(self.world.left(name, at)))


def _own_disk(at: Path, size: int) -> bool:
    """A small file system at a folder that this process alone sees; False where the system does not let it."""
    if os.geteuid() != 0 or ctypes.CDLL(None).unshare(0x00020000) != 0:  # CLONE_NEWNS
        return False
    steps = (["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(at)])
    return all(subprocess.run(step, capture_output=True).returncode == 0 for step in steps)


def _fail_writes(first: int) -> None:
    count = [0]

    def full(file: int) -> None:
        count[0] += 1
        if count[0] >= first:
            raise OSError(28, "No space left on device")

    os.fsync = full  # type: ignore[assignment]


class Flips:
    """One flipped bit in a file of a run: it is told, or it changes nothing that comes after."""

    def __init__(self, place: Path):
        os.environ["SPHERE_EDIT_CACHE"] = str(place / "cache")
        self.place, self.whole = place, place / "whole"
        editor = Editor.from_pretrained(save_tiny("llama", place / "model"), self.whole, reporter=Quiet(), **QUICK)
        editor.edit(fact_records(5))
        editor.close()
        self.files = [path for path in sorted(self.whole.rglob("*")) if path.is_file() and path.stat().st_size]
        self.wanted = self._goes_on(shutil.copytree(self.whole, place / "undisturbed"))

    def __call__(self, rng: random.Random) -> None:
        copy = self.place / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.whole, copy)
        path = copy / rng.choice(self.files).relative_to(self.whole)
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(data))
        if self._goes_on(copy) != self.wanted:
            raise Silent(f"a bit of {path.relative_to(copy)} changed what came after")

    def _goes_on(self, folder: Path) -> Any:
        """What comes of two more facts and a way back, which read everything that later results depend on."""
        with opened(folder, Quiet()) as editor:
            metrics = editor.edit(fact_records(2, start=8))
            editor.rollback(1)
            weights = {name: editor.weights.digest(name) for name in editor.weights.names}
        return weights, metrics["edited"], metrics["per_fact"]


# --- the whole ----------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Path], Callable[[random.Random], None]]] = {
    "kills": lambda place: Disturbed(place, "kills"),
    "disks": lambda place: Disturbed(place, "disks"),
    "flips": Flips,
    **FUZZED,
}


def torture(parts: list[str], minutes: float, seed: int = 0, only: int | None = None) -> dict[str, Tally]:
    """Do cases of some parts for so long in all; with ``only``, that case of each."""
    share = 60 * minutes / sum(_SHARES.get(part, 1.0) for part in parts)
    found = {}
    for part in parts:
        with tempfile.TemporaryDirectory(prefix="torture-") as folder:
            case = PARTS[part](Path(folder))
            tally = found[part] = Tally()
            end = time.monotonic() + share * _SHARES.get(part, 1.0)
            for number in _numbers(only, end):
                tally.take(number, partial(case, random.Random(f"{seed} {part} {number}")))
        counts = ", ".join(f"{len(cases)} {kind}" for kind, cases in tally.bad.items())
        print(f"{part}: {tally.cases} cases, {tally.told} told, {counts}", flush=True)
    return found


def _numbers(only: int | None, end: float) -> Iterator[int]:
    if only is not None:
        yield only
        return
    number = 0
    while time.monotonic() < end:
        yield number
        number += 1


def quicker() -> None:
    """No test pulls the plug, and drawing takes longer than a small run does."""
    os.fsync = lambda file: None  # type: ignore[assignment]

    def blank(self: Figure, target: Any, format: str, **options: Any) -> None:
        empty = "<svg></svg>" if format == "svg" else b"PNG"
        if hasattr(target, "write"):
            target.write(empty)
        else:
            Path(target).write_bytes(empty if isinstance(empty, bytes) else empty.encode())

    Figure.savefig = blank  # type: ignore[method-assign,assignment]


def main() -> None:
    """The command line; status 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", default=",".join(PARTS), help="some of: " + ", ".join(PARTS))
    parser.add_argument("--only", type=int, help="this case of each part alone")
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    warnings.simplefilter("ignore")
    quicker()
    assert files.cache_dir()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SPHERE_EDIT_CACHE"] = cache
        found = torture(given.parts.split(","), given.minutes, given.seed, given.only)
    total = sum(tally.cases for tally in found.values())
    bad = {kind: sum(len(tally.bad[kind]) for tally in found.values()) for kind in ("tracebacks", "silent", "lost")}
    print(
        f"{total} cases: {bad['tracebacks']} tracebacks, {bad['silent']} silent differences, {bad['lost']} losses (seed {given.seed})"
    )
    sys.exit(any(bad.values()))


if __name__ == "__main__":
    main()
