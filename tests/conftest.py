from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the suite is about one device, wherever it runs
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("COLUMNS", None)  # which workers of xdist get, and which would be the width of every table
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of libraries and processes that a test starts

import pytest
import torch
from matplotlib.figure import Figure

torch.set_num_threads(1)  # tiny models gain nothing from more, and lose much where another process is at work

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with public data and reference numbers that stands beside a developer's checkout."""
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared with data and reference numbers is not here")
    return SHARED


@pytest.fixture(scope="session")
def sampled_before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text that tiny models have sampled in earlier tests: it says nothing new a second time, and takes a third of a small run."""
    return tmp_path_factory.mktemp("samples")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest, sampled_before: Path):
    """Statistics of tests stay out of the user's cache; converted GGUF files are taken from it."""
    with pytest.MonkeyPatch.context() as patch:  # of its own: a test may undo the one it is given
        patch.setattr(os, "fsync", lambda file: None)  # no test pulls the plug
        if "smollm2" in request.fixturenames:
            yield
            return
        cache = tmp_path_factory.mktemp("cache")
        patch.setenv("SPHERE_EDIT_CACHE", str(cache))
        shutil.copytree(sampled_before, cache / "samples")
        yield
        for path in cache.glob("samples/*.json"):
            if not (sampled_before / path.name).exists() and _is_json(path):
                shutil.copy(path, sampled_before)


def _is_json(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text("utf-8")))
    except ValueError:
        return False


# Files whose tests share what takes long to make, or a large model: each goes to one worker whole (`--dist loadgroup`).
TOGETHER = {
    "test_ability": "ability",
    "test_benchmarks": "benchmarks",
    "test_bench": "bench",
    "test_exports": "exports",
    "test_report": "report",
    "test_reference": "smollm2",
    "test_smollm2_slow": "smollm2",
}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep on one worker what would otherwise be made, or loaded, on each."""
    for item in items:
        group = "smollm2" if "smollm2" in getattr(item, "fixturenames", ()) else TOGETHER.get(item.path.stem)
        if group is not None:
            item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def _smollm2():
    from sphere_edit.models.loading import load_model

    return load_model("smollm2")


@pytest.fixture
def smollm2(_smollm2):
    """The embedded SmolLM2-135M, loaded once; with its share of the cores while a test uses it."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    yield _smollm2
    torch.set_num_threads(1)


@pytest.fixture
def blank_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages get empty figures, for drawing them takes longer than a small run does; `test_report.py` draws them."""

    def savefig(self: Figure, target: Any, format: str, **options: Any) -> None:
        empty = "<svg></svg>" if format == "svg" else b"PNG"
        if hasattr(target, "write"):
            target.write(empty)
        else:
            Path(target).write_bytes(empty if isinstance(empty, bytes) else empty.encode())

    monkeypatch.setattr(Figure, "savefig", savefig)


FACTS = [
    ("Eiffel Tower", "The {} is located in the city of", "Rome"),
    ("Mount Fuji", "{} stands in", "Sweden"),
    ("Ada", "{} plays the", "football"),
    ("Bruno", "The instrument of {} is the", "violin"),
    ("France", "The capital of {} is", "Madrid"),
    ("Tiber", "The river {} is in", "Germany"),
    ("Vienna", "People in {} speak", "Spanish"),
    ("Paris", "The river of {} is the", "Tiber"),
    ("Japan", "The capital of {} is", "Vienna"),
    ("Madrid", "The club of {} plays in", "Italy"),
    ("Germany", "Its founder was born in {} and speaks", "English"),
    ("Italy", "The cars of {} are made in", "Japan"),
]


def fact_records(count: int = 12, start: int = 0) -> list[dict]:
    """Facts that the tiny tokenizers can spell, with paraphrases and neighbours, some with answers and some without."""
    records = []
    for number in range(start, start + count):
        subject, prompt, target = FACTS[number % len(FACTS)]
        if number >= len(FACTS):
            subject = f"{subject} {number}"
        records.append(
            {
                "subject": subject,
                "prompt": prompt,
                "target_new": target,
                "target_true": "Paris" if number % 3 else None,
                "paraphrases": [f"Where is it? {prompt.replace('{}', subject)}"],
                "neighbors": [{"prompt": "The capital of Sweden is", "answer": "Rome"}, "The company makes"],
            }
        )
    return records


class Crash(BaseException):
    """Stands for a process that dies: nothing catches it."""


def dying(step: int | None) -> tuple[list[int], Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """How often wrapped functions were called, together, and what wraps them: the call number ``step`` crashes instead."""
    count = [0]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == step:
                raise Crash
            return real(*args, **kwargs)

        return call

    return count, counted
