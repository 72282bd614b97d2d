"""The benchmarks run as their docstrings say, on their smallest sizes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import fact_records
from families import save_tiny
from sphere_edit.editor import Editor
from sphere_edit.progress import Quiet
from test_runs import METHODS, QUICK

ROOT = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("command", "found"),
    [
        (["gpu.py", "--shape", "tiny", "--batch-size", "4", "--steps", "2"], "| tiny | "),
        (["scaling.py", "--batches", "3", "--batch-size", "4"], "Batch 3 against batch 2: time × "),
        (["energy.py", "--shape", "64", "80"], "64 × 80: "),
        (["projection.py", "--shape", "48", "160", "--facts", "5"], "relative difference "),
        (["families.py", "--family", "gpt2", "--steps", "3"], "| gpt2 | frugal | "),
    ],
)
def test_benchmark(command, found, tmp_path):
    environment = {**os.environ, "SPHERE_EDIT_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / command[0], *command[1:]],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert found in done.stdout
    if "projection.py" in command:
        assert float(done.stdout.split(found)[1]) < 1e-5


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("guard.py", "| limit | "),
        ("correlation.py", "| run | metric | "),
        ("compare.py", "paired by fact"),
        ("lifetime.py", "| memit | SPHERE, current | "),
        ("pareto.py", "| memit + SPHERE | 10 | 10 | "),
        ("other_text.py", "| run-True | Python source | "),
    ],
)
def test_benchmarks_that_read_runs(name, found, tmp_path):
    model = save_tiny("llama", tmp_path / "model")
    for sphere in (False, True):
        options = {**QUICK, **METHODS["memit"], "evaluation": {"every": 1}, "sphere": {"enabled": sphere}}
        editor = Editor.from_pretrained(model, tmp_path / f"run-{sphere}", reporter=Quiet(), **options)
        editor.edit(fact_records(10))
        editor.close()
    command = [sys.executable, ROOT / name, tmp_path / "run-False", tmp_path / "run-True"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert found in done.stdout
    assert name in ("lifetime.py", "other_text.py") or "memit + SPHERE" in done.stdout


def test_a_figure_of_fronts_takes_in_the_rows_of_another(tmp_path):
    model = save_tiny("llama", tmp_path / "model")
    for name in ("memit", "alphaedit"):
        editor = Editor.from_pretrained(model, tmp_path / name, reporter=Quiet(), **{**QUICK, **METHODS[name]})
        editor.edit(fact_records(10))
        editor.close()
    tables = []
    for sources in (["memit"], ["memit.csv", "alphaedit"], ["all.csv"]):
        output = tmp_path / (
            "memit.png" if sources == ["memit"] else "all.png" if "alphaedit" in sources else "again.png"
        )
        command = [sys.executable, ROOT / "pareto.py", *(tmp_path / source for source in sources), "-o", output]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert output.stat().st_size > 10_000
        tables.append(done.stdout)
    lines = tables[1].splitlines()
    assert len(lines) == 4
    assert set(tables[0].splitlines()[2:]) < set(lines), "the first run's row comes from its file as it was"
    assert tables[2] == tables[1]
