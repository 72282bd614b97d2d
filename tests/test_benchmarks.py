"""The benchmarks run as their docstrings say, on their smallest sizes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("command", "found"),
    [
        (["gpu.py", "--shape", "tiny", "--batch-size", "4", "--steps", "2"], "| tiny | "),
        (["scaling.py", "--batches", "3", "--batch-size", "4"], "Batch 3 against batch 2: time × "),
        (["projection.py", "--shape", "48", "160", "--facts", "5"], "relative difference "),
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
