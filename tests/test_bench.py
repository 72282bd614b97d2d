"""The bench: a matrix of runs that dies and goes on, its table, and every mistake told before anything is computed."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from conftest import fact_records
from families import save_tiny
from sphere_edit import SphereEditError
from sphere_edit.bench import Bench, write_results
from sphere_edit.evaluation.intervals import difference_intervals
from sphere_edit.evaluation.scores import FactScores, PromptScore
from sphere_edit.executors import on_ray, slurm_script
from sphere_edit.progress import Quiet
from sphere_edit.reporting.comparison import Row, as_csv, latex, markdown, read_row
from sphere_edit.runs.folder import RunFolder
from test_cli import run
from test_runs import METHODS, QUICK, without_times

pytestmark = pytest.mark.usefixtures("blank_figures")

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("bench")
    model = save_tiny("llama", folder / "model")
    facts = folder / "facts.json"
    facts.write_text(json.dumps(fact_records(8)))
    return {
        "models": [str(model)],
        "data": {"own": {"source": str(facts), "limit": 6, "shuffle": True}},
        "methods": {"alphaedit": METHODS["alphaedit"], "memit": {"options": METHODS["memit"]["options"]}},
        "seeds": [0, 1],
        "settings": {**QUICK, "evaluation": {"every": 1}},
    }


def bench_of(config: dict, folder: Path) -> Bench:
    path = folder / "bench.yaml"
    folder.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(config, allow_unicode=True))
    return Bench.read(path, folder / "out")


def results(bench: Bench) -> tuple[str, list]:
    write_results(bench, Quiet())
    entries = [without_times(RunFolder.open(bench.run_folder(cell)).entries) for cell in bench.cells]
    return (bench.folder / "table.csv").read_text(), entries


class Heard(Quiet):
    """What was said."""

    def __init__(self):
        self.said: list[str] = []

    def say(self, text, style=""):
        self.said.append(text)


@pytest.fixture(scope="module")
def heard() -> Heard:
    """By the whole bench."""
    return Heard()


@pytest.fixture(scope="module")
def whole(config, heard, tmp_path_factory) -> Bench:
    bench = bench_of(config, tmp_path_factory.mktemp("whole"))
    bench.execute(heard)
    return bench


def test_every_run_of_the_matrix_is_done_and_stands_in_the_table(whole):
    assert len(whole.cells) == 2 * 2 * 2
    assert all(whole.finished(cell) for cell in whole.cells)
    assert whole.failures == {}
    written = write_results(whole, Quiet())
    assert [path.name for path in written] == ["table.md", "table.tex", "table.csv", "report.html"]
    rows = list(csv.DictReader(io.StringIO((whole.folder / "table.csv").read_text())))
    assert [(row["method"], row["variant"]) for row in rows] == [
        ("unedited", ""), ("alphaedit", "plain"), ("alphaedit", "SPHERE"), ("memit", "plain"), ("memit", "SPHERE"),
    ]  # fmt: skip
    assert {row["facts"] for row in rows} == {"12"}, "six facts of each of two seeds"
    cells = [cell for cell in whole.cells if (cell.method, cell.variant) == ("memit", "SPHERE")]
    metrics = [json.loads((whole.run_folder(cell) / "metrics.json").read_text()) for cell in cells]
    mean = sum(content["edited"]["efficacy"] for content in metrics) / 2
    assert float(rows[-1]["efficacy"]) == pytest.approx(mean)
    ratio = sum(content["edited"]["perplexity"] / content["unedited"]["perplexity"] for content in metrics) / 2
    assert float(rows[-1]["perplexity"]) == pytest.approx(ratio)
    subjects = [[fact["subject"] for fact in content["per_fact"]] for content in metrics]
    assert subjects[0] != subjects[1], "another order for each seed"
    table = (whole.folder / "table.md").read_text()
    assert "paired by fact" in table
    assert "The best variant over the best plain method" in table
    assert (whole.folder / "table.tex").read_text().count(r"\\") == 6


def test_what_runs_share_is_said_once(whole, heard):
    counts = Counter(heard.said)
    assert {count for text, count in counts.items() if text.startswith(("Facts read as", "Loading"))} == {1}
    assert sum(text.startswith("Facts read as") for text in counts) == 2, "each seed has other facts"
    assert counts["Preparing"] == len(whole.cells), "what a run does is its own"


class _Killed(BaseException):
    pass


def test_killed_three_times_and_gone_on_with_it_gives_the_same_table(config, whole, tmp_path, monkeypatch):
    append, writes = RunFolder.append, [0]

    def dying(limit):
        def call(self, *args, **kwargs):
            writes[0] += 1
            if writes[0] == limit:
                raise _Killed
            return append(self, *args, **kwargs)

        return call

    for limit in (7, 21, 33):
        bench = bench_of(config, tmp_path / "killed")
        monkeypatch.setattr(RunFolder, "append", dying(limit))
        writes[0] = 0
        with pytest.raises(_Killed):
            bench.execute(Quiet())
        monkeypatch.setattr(RunFolder, "append", append)
    last = bench_of(config, tmp_path / "killed")
    done = sum(last.finished(cell) for cell in last.cells)
    assert 0 < done < len(last.cells)
    last.execute(Quiet())
    assert results(last) == results(whole)


def test_two_processes_share_a_bench(config, tmp_path):
    bench = bench_of({**config, "seeds": [0], "methods": {"memit": config["methods"]["memit"]}}, tmp_path)
    theirs, ours = bench.cells
    with bench._claimed(theirs) as claimed:
        assert claimed
        with bench._claimed(theirs) as again:
            assert not again
        said: list[str] = []
        reporter = Quiet()
        reporter.say = lambda text, style="": said.append(text)
        bench.execute(reporter)
        assert bench.finished(ours)
        assert not RunFolder.exists(bench.run_folder(theirs))
        assert f"another process is at 1 run: {theirs.label}" in said
    bench.execute(Quiet())
    assert bench.finished(theirs)


def test_a_failed_run_is_recorded_and_passed_over_and_tried_again(config, tmp_path, monkeypatch):
    small = {**config, "seeds": [0], "methods": {"memit": config["methods"]["memit"]}}
    bench = bench_of(small, tmp_path)
    run_cell = Bench._run

    def failing(self, cell, reporter):
        if cell.variant == "plain":
            raise SphereEditError("the disk is full")
        run_cell(self, cell, reporter)

    monkeypatch.setattr(Bench, "_run", failing)
    bench.execute(Quiet())
    (name,) = bench.failures
    assert "plain" in name
    assert json.loads((bench.folder / "failures.json").read_text()) == {name: "the disk is full"}
    write_results(bench, Quiet())
    assert "memit + SPHERE" in (bench.folder / "table.md").read_text()
    monkeypatch.setattr(Bench, "_run", run_cell)
    again = bench_of(small, tmp_path)
    again.execute(Quiet())
    assert again.failures == {}
    assert all(again.finished(cell) for cell in again.cells)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"modles": ["x"]}, "there is no setting 'modles'"),
     ({"methods": ["memit", "mermit"]}, "mermit"),
     ({"methods": {"memit": {"options": {"second_moment_weight": -1}}}}, "second_moment_weight"),
     ({"settings": {"batch_sise": 3}}, "there is no setting 'batch_sise'"),
     ({"settings": {"batch_size": 0}}, "'batch_size'"),
     ({"variants": {"odd": {"sphere": {"eta": 2}}}}, "'sphere.eta'"),
     ({"variants": {"plain": {}}}, "the variant 'plain' is the one without SPHERE"),
     ({"variants": {"plain": {"sphere": {"eta": 0.3}}}}, "the variant 'plain' is the one without SPHERE"),
     ({"only": {"rect": ["plain"]}}, "'only' names 'rect'"),
     ({"only": {"memit": ["plian"]}}, "'only' names 'plian'"),
     ({"data": {"own": {"source": "nosuch.json"}}}, "there is no file 'nosuch.json'"),
     ({"data": {"own": {"source": "x.json", "limit": 0}}}, "'data.own.limit'"),
     ({"seeds": []}, "'seeds'"),
     ({"models": "smollm2"}, "'models'"),
     ({"seeds": [0, 0]}, "two runs would share the folder"),
     ({"variants": {"η 0.5": {}, "η-0.5": {}}}, "two runs would share the folder"),
     ({"settings": {"moments": {"corpus": "no.txt"}}}, "there is no corpus file 'no.txt'")],
)  # fmt: skip
def test_mistakes_are_told_before_anything_is_computed(config, tmp_path, change, message):
    with pytest.raises(SphereEditError, match=re.escape(message)) as error:
        bench_of({**config, **change}, tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_list_of_variants_means_the_usual_ones(config, tmp_path):
    """Both with SPHERE, a table would say that it changes nothing."""
    listed = bench_of({**config, "variants": ["plain", "SPHERE"]}, tmp_path)
    assert {(cell.variant, cell.settings.sphere.enabled) for cell in listed.cells} == {
        ("plain", False),
        ("SPHERE", True),
    }
    assert [cell.settings for cell in listed.cells] == [
        cell.settings for cell in bench_of(config, tmp_path / "b").cells
    ]


def test_a_truncated_file_and_a_folder_of_another_bench(config, whole, tmp_path):
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps(fact_records(3))[:-20])
    with pytest.raises(SphereEditError, match="not valid JSON"):
        bench_of({**config, "data": {"own": {"source": str(facts)}}}, tmp_path)
    (tmp_path / "b.yaml").write_text(yaml.safe_dump({**config, "seeds": [0]}))
    with pytest.raises(SphereEditError, match="holds a bench with another config"):
        Bench.read(tmp_path / "b.yaml", whole.folder)


def test_the_command(whole):
    out = run("bench", whole.folder.parent / "bench.yaml", "-o", whole.folder, "--table")
    assert "alphaedit + SPHERE" in out
    assert "table.tex" in out


def test_shipped_configs_are_valid_but_for_data_and_models_far_away(shared, tmp_path):
    for path in sorted(CONFIGS.glob("*.yaml")):
        config = yaml.safe_load(path.read_text())
        for name, about in config["data"].items():
            about.update(source=str(shared / "data" / f"{name}.json"), limit=20)
        config["settings"].pop("moments", None)  # a corpus on the hub
        cells = bench_of(config, tmp_path / path.stem).cells
        assert len(cells) == len({cell.name for cell in cells}) >= 4
        assert all(len(cell.name) < 100 for cell in cells)
    assert sorted(path.name for path in CONFIGS.iterdir()) == [
        "ablation-eta-alpha.yaml", "leads.yaml", "paper-llama3-8b.yaml", "paper-qwen2.5-7b.yaml", "quality-200.yaml",
        "quality.yaml", "smollm2-grid.yaml", "smollm2-zsre.yaml", "smollm2.yaml",
    ]  # fmt: skip


def row(method, variant, taken):
    scores = {
        (0, (f"s{n}", "{}", "x")): FactScores(
            PromptScore(1.0, 2.0 if t else 0.5, float(t)), (PromptScore(1.0, 2.0, 1.0),), ()
        )
        for n, t in enumerate(taken)
    }
    share = 100 * sum(taken) / len(taken)
    values = {"efficacy": share, "efficacy_strict": share, "generalization": 100.0, "generalization_strict": 100.0}
    values |= {"specificity": None, "perplexity": 1.5 if method == "a" else 1.2}
    label = method if variant == "plain" else f"{method} + {variant}"
    return Row("m, d", label, method, variant, len(taken), values, {"efficacy": (share - 5, share + 5)}, scores)


def test_tables_hold_the_numbers_the_best_in_bold_and_paired_improvements():
    base, better = row("a", "plain", [True, False] * 20), row("a", "SPHERE", [True, True, True, False] * 10)
    other = row("b_c", "plain", [False] * 40)
    table = markdown([base, better, other])
    assert "| a + SPHERE | 40 | **75.0 ± 5.0** |" in table
    assert "| b_c | 40 | 0.0 ± 5.0 |" in table
    assert "**1.200**" in table
    assert "100.0" in table
    assert "**100.0**" not in table, "where all are as good, none is the best"
    low, high = difference_intervals(list(base.scores.values()), list(better.scores.values()))["efficacy_strict"]
    assert f"+25.0 [{low:+.1f}, {high:+.1f}]" in table
    assert 0 < low < 25 < high, "ten facts won, none lost"
    assert "mean +25.00 %" in table, "efficacy 75 instead of 50 is half as much again, generalization the same"
    assert r"\textbf{75.0 $\pm$ 5.0}" in latex([base, better, other])
    assert r"b\_c" in latex([other])
    read = list(csv.DictReader(io.StringIO(as_csv([base, better]))))
    assert read[1]["efficacy"] == "75.0"
    assert read[1]["efficacy_low"] == "70.0"
    assert read[0]["specificity"] == ""
    with pytest.raises(ValueError, match="paired"):
        difference_intervals(list(base.scores.values()), [])


def test_a_row_of_a_run_that_is_not_finished(tmp_path):
    with pytest.raises(SphereEditError, match="is not finished"):
        read_row("g", "memit", "plain", {0: tmp_path})


@pytest.mark.parametrize("plugins", [[], ["--plugin", "/a b/ridge.py"]])
def test_a_script_for_slurm_does_the_bench(config, tmp_path, monkeypatch, plugins):
    monkeypatch.setattr("sphere_edit.executors.options", lambda: plugins)
    bench = bench_of({**config, "resources": {"cpus": 4, "gpus": 1}}, tmp_path)
    script = slurm_script(bench, tmp_path / "bench.yaml")
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/bin/sh"
    assert "#SBATCH --array=1-8" in lines
    assert "#SBATCH --cpus-per-task=4" in lines
    assert "#SBATCH --gres=gpu:1" in lines
    *_, command = lines
    words = shlex.split(command)
    assert words[:4] == ["exec", sys.executable, "-m", "sphere_edit"]
    assert words[4:] == [*plugins, "bench", str(tmp_path / "bench.yaml"), "-o", str(tmp_path / "out")]
    assert subprocess.run(["sh", "-n", script], check=False).returncode == 0


def test_what_a_run_takes_of_a_cluster_does_not_make_it_another_bench(config, tmp_path):
    bench_of(config, tmp_path).execute(Quiet(), [])
    again = bench_of({**config, "resources": {"cpus": 2}}, tmp_path)  # refused, were its config another one
    assert again.config.resources.words == "2 CPUs"


def test_mistakes_about_a_cluster(config, tmp_path, monkeypatch):
    bench_of(config, tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SphereEditError, match="--executor ray needs Ray; install it with: pip install 'sphere-edit"):
        run("bench", tmp_path / "bench.yaml", "--executor", "ray")
    with pytest.raises(SphereEditError, match="--address is that of a Ray cluster; add --executor ray"):
        run("bench", tmp_path / "bench.yaml", "--address", "auto")


@pytest.mark.slow
def test_ray_does_what_one_process_does(config, tmp_path, monkeypatch):
    """Two workers, one of which dies in the middle of its run."""
    pytest.importorskip("ray", reason="Ray is not installed (the extra 'bench')")
    small = {**config, "seeds": [0], "settings": {**config["settings"], "batch_size": 2}}
    serial = bench_of(small, tmp_path / "serial")
    serial.execute(Quiet())
    plugin = tmp_path / "sitecustomize.py"  # every worker reads it
    plugin.write_text(DYING.format(mark=str(tmp_path / "died")))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # of 15 by itself, at which workers starve beside anything else
    shared = bench_of(small, tmp_path / "shared")
    on_ray(shared, tmp_path / "shared" / "bench.yaml", None, Quiet())
    assert (tmp_path / "died").is_file(), "a worker died"
    assert shared.failures == {}
    assert all(shared.finished(cell) for cell in shared.cells)
    assert results(shared) == results(serial)


DYING = """
import importlib.util, os, sys

class Dying:
    def find_spec(self, name, path=None, target=None):
        if name != "sphere_edit.runs.commit":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            real = module.Committer.edit

            def edit(self, *args, **more):
                if self.run.history.head == 1 and not os.path.exists({mark!r}):
                    open({mark!r}, "w").close()
                    os._exit(1)
                return real(self, *args, **more)

            module.Committer.edit = edit

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Dying())
"""
