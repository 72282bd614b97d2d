"""The page about runs: what it says is what the run folders hold, and it needs nothing but itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from matplotlib.colors import to_hex
from scipy import stats

from conftest import fact_records
from families import save_tiny
from sphere_edit import Sphere, SphereEditError
from sphere_edit.editing.methods import METHODS as ALL_METHODS
from sphere_edit.editor import Editor
from sphere_edit.evaluation.scores import FactScores, PromptScore
from sphere_edit.facts.readers import facts_from
from sphere_edit.progress import Quiet
from sphere_edit.reporting import plots, weight_plots
from sphere_edit.reporting.colours import colour_of
from sphere_edit.reporting.correlation import correlate, predictors
from sphere_edit.reporting.lights import INTACT, TAKEN, lights
from sphere_edit.reporting.neighbors import ChangedNeighbors
from sphere_edit.reporting.report import write_report
from sphere_edit.reporting.series import Series, labelled
from sphere_edit.runs.folder import RunFolder
from test_cli import run
from test_runs import METHODS, QUICK

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "<script>throw 1</script>"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """AlphaEdit with and without SPHERE, and MEMIT: six batches each, evaluated after each."""
    folder = tmp_path_factory.mktemp("runs")
    model = save_tiny("llama", folder / "model")
    facts = fact_records(12)
    facts[3] = {**facts[3], "target_new": EVIL}
    found = []
    for name, method, sphere in (("a", "alphaedit", True), ("b", "alphaedit", False), ("c", "memit", True)):
        options = {**QUICK, **METHODS[method], "evaluation": {"every": 1}, "sphere": {"enabled": sphere}}
        editor = Editor.from_pretrained(model, folder / name, reporter=Quiet(), **options)
        editor.edit(facts)
        editor.close()
        found.append(folder / name)
    return found


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    return write_report(runs, folder / "report.html", folder / "figures")


class Page(HTMLParser):
    """Tags still open, attributes that would fetch something, and the text of table cells."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)
        self.fetched += [
            value
            for name, value in attrs
            if name in ("src", "href", "xlink:href") and not (value or "").startswith(("#", "data:"))
        ]
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open[-1:]:
            self.rows[-1][-1] += data


def test_the_page_needs_nothing_but_itself_and_runs_nothing_that_a_fact_says(page):
    text = page.read_text()
    parsed = Page(text)
    assert parsed.open == []
    assert parsed.fetched == []
    assert "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []
    assert EVIL not in text
    assert any(EVIL in row for row in parsed.rows), "said, not run"


def test_facts_that_did_not_take_come_first_and_all_are_there(page, runs):
    rows = [row for row in Page(page.read_text()).rows if len(row) == 11]
    assert len(rows) == 3 * 12
    assert rows == sorted(rows, key=lambda row: (row[9] == "yes", row[10] == "yes"))
    metrics = json.loads((runs[0] / "metrics.json").read_text())
    taken = sum(
        fact["edited"]["rewrite"]["nll_right"] <= fact["edited"]["rewrite"]["nll_other"] for fact in metrics["per_fact"]
    )
    assert taken == sum(row[2] == "alphaedit + SPHERE" and row[9] == "yes" for row in rows)
    said = {(row[0], row[4], row[5]) for row in rows if row[2] == "alphaedit + SPHERE"}
    assert said == {
        (fact["prompt"].replace("{}", fact["subject"]), *(" ".join(fact[when]["rewrite"]["said"].split()) for when in ("unedited", "edited")))
        for fact in metrics["per_fact"]
    }  # fmt: skip


def test_neighbours_that_are_answered_otherwise_are_named_with_what_is_said(runs, page):
    wanted = []
    for folder in runs:
        facts = RunFolder.open(folder).facts()
        for fact in json.loads((folder / "metrics.json").read_text())["per_fact"]:
            for number, neighbor in enumerate(facts[fact["index"]].neighbors):
                before, after = (fact[side]["neighbors"][number] for side in ("unedited", "edited"))
                if before["accuracy"] == 1 and after["accuracy"] < 1:
                    wanted.append((neighbor.prompt, str(fact["index"]), *(" ".join(one["said"].split()) for one in (before, after))))  # fmt: skip
    assert wanted, "or the test could not fail"
    found = [(row[0].split(", ", 1)[1], *row[1:]) for row in Page(page.read_text()).rows if len(row) == 4]
    assert found == wanted
    first = next(folder for folder in runs if Series.read(folder).changed_neighbors().rows)
    changed = Series.read(first).changed_neighbors()
    said = " ".join(run("show", first, "--facts", 1).split())
    assert f"Neighbours answered otherwise ({len(changed.rows)} of {changed.asked}" in said
    assert "Neighbours answered otherwise" not in run("show", first, "--facts", 0)


def test_what_became_of_neighbours_stands_beside_the_second_answer(runs):
    before, after = (Series.read(runs[0]).metrics["specificity_strict"][at] for at in (0, -1))
    took, intact, _ = lights(Series.read(runs[0]))
    assert intact.beside == f"strict specificity {before:.1f} % → {after:.1f} %"
    assert intact.words.endswith(f"{intact.value}; {intact.beside})")
    assert took.words.endswith(f"(strict efficacy {took.value})")


def test_series_are_what_the_run_measured(runs):
    series = Series.read(runs[0])
    metrics = json.loads((runs[0] / "metrics.json").read_text())
    assert series.edits == [0, 2, 4, 6, 8, 10, 12]
    assert series.metrics["efficacy"][-1] == metrics["edited"]["efficacy"]
    assert series.metrics["perplexity"][0] == metrics["unedited"]["perplexity"]
    totals = [sum(matrix["total"] for matrix in metrics[when]["energy"].values()) for when in ("unedited", "edited")]
    assert series.judged("efficacy") == [None, *series.metrics["efficacy"][1:]]
    assert series.judged("perplexity") == series.metrics["perplexity"]
    assert series.energy[0] == 0
    assert series.energy[-1] == pytest.approx(totals[1] / totals[0] - 1)
    name = "model.layers.2.mlp.down_proj"
    before, after = series.change(name)
    assert float((after - before).norm() / before.norm()) == pytest.approx(
        series.batches[-1].matrices[name]["relative_drift"], rel=1e-3
    )
    assert [one.label for one in labelled([runs[0], runs[0]])] == ["alphaedit + SPHERE (a)"] * 2


def test_figures_draw_the_series_and_a_method_has_one_colour(runs):
    series = labelled(runs)
    figure = plots.trends(series)
    energy = figure.axes[0].get_lines()
    for line, one in zip(energy, series, strict=True):
        assert list(line.get_xdata()) == one.edits
        assert list(line.get_ydata()) == pytest.approx([100 * value for value in one.energy])
        assert to_hex(line.get_color()).upper() == colour_of(one.method)
        assert line.get_linestyle() == ("-" if one.sphere else "--")
    assert len({colour_of(method) for method in ALL_METHODS}) == len(ALL_METHODS)
    heat = weight_plots.heat(series[0]).axes[0].collections[0].get_array()
    last = series[0].batches[-1].matrices
    expected = [100 * (last[name]["energy"] / series[0].energies[name] - 1) for name in series[0].energies]
    assert list(heat[:, -1]) == pytest.approx(expected, rel=1e-4)
    steps = [len(points.get_offsets()) for points in plots.differences(series).axes[3].collections[:3]]
    assert sum(steps) >= 12


def test_cosines_and_spectrum_draw_what_they_say():
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(12, 20, generator=generator)
    after = before.clone()
    after[4] += 1
    images = [axis.images[0].get_array() for axis in weight_plots.cosines(before, after, "x").axes if axis.images]
    rows = before / before.norm(dim=1, keepdim=True)
    assert sorted(images[0].flatten()) == pytest.approx(sorted((rows @ rows.T).flatten().tolist()), abs=1e-5)
    torch.testing.assert_close(torch.tensor(images[2]), torch.tensor(images[1] - images[0]))
    figure = weight_plots.spectrum(before, after, "x")
    ours, changed = figure.axes[0].get_lines()
    assert list(ours.get_ydata()) == pytest.approx(torch.linalg.svdvals(before.double()).tolist(), rel=1e-6)
    assert len(changed.get_ydata()) == 1, "a change of rank one"
    share = figure.axes[1].get_lines()[0].get_ydata()
    assert 0 < share[-1] <= 100


def test_one_map_of_neurons_before_and_after_is_the_same_each_time_and_shows_what_moved():
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(30, 16, generator=generator)
    after = before.clone()
    after[7] = -before[7]
    maps = []
    for _ in range(2):
        axis, top, right = weight_plots.neighbourhoods(before, 3 * after, "x").axes
        maps.append([torch.tensor(points.get_offsets().data) for points in axis.collections])
        assert [len(density.get_lines()) for density in (top, right)] == [2, 2]
    torch.testing.assert_close(maps[0], maps[1], rtol=0, atol=0)
    moved = (maps[0][0] - maps[0][1]).norm(dim=1)
    assert int(moved.argmax()) == 7, "lengths do not matter, the neuron that turned does"
    assert float(moved[7]) > 10 * float(moved.median())


def test_the_page_does_not_take_one_state_of_a_run_for_another(tmp_path):
    """Rolled back to where it was not evaluated, a run shows no scores and no colour; gone on, its unedited row is that of all its facts."""
    model = save_tiny("llama", tmp_path / "model")
    options = {**QUICK, **METHODS["memit"], "evaluation": {"generation": "off"}}
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=Quiet(), **options)
    editor.edit(fact_records(4))
    metrics = editor.edit(fact_records(3, start=6))
    whole = Series.read(tmp_path / "run")
    assert whole.current
    for name in ("efficacy", "specificity", "perplexity"):
        assert whole.metrics[name][0] == pytest.approx(metrics["unedited"][name]), name
    first = next(entry for entry in editor.run.entries if entry["event"] == "unedited")["summary"]
    assert first != {name: metrics["unedited"][name] for name in first}, "or the test could not fail"
    write_report([tmp_path / "run"], tmp_path / "run" / "report.html", tmp_path / "run" / "figures")
    head = editor.run.history.head
    editor.rollback(head)
    assert (tmp_path / "run" / "report.html").is_file()
    editor.rollback(2)
    assert not (tmp_path / "run" / "report.html").exists()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["after"] == 2, (
        "the end of the first call was evaluated"
    )
    assert Series.read(tmp_path / "run").current
    editor.rollback(1)
    assert not (tmp_path / "run" / "metrics.json").exists()
    editor.close()
    back = Series.read(tmp_path / "run")
    assert not back.current
    page = write_report([tmp_path / "run"], tmp_path / "again.html", tmp_path / "figures").read_text()
    assert page.count("not evaluated where the run stands") == 2
    (edited,) = (row for row in Page(page).rows if row and "edited (not evaluated)" in row[0])
    assert set(edited[1:]) == {"–"}, "what was not evaluated is not said to be infinite"


@pytest.mark.parametrize(
    ("rule", "value", "colour"),
    [(TAKEN, 95, "green"), (TAKEN, 80, "amber"), (TAKEN, 20, "red"), (TAKEN, None, "red"),
     (INTACT, 1.05, "green"), (INTACT, 1.2, "amber"), (INTACT, 3, "red"), (INTACT, float("nan"), "red")],
)  # fmt: skip
def test_lights_follow_their_rules(rule, value, colour):
    assert rule.light(value, "x").colour == colour


def test_the_command_and_its_mistakes(runs, tmp_path):
    assert "report.html" in run("report", runs[0], "-o", tmp_path / "report.html")
    assert (tmp_path / "figures" / "trends.png").stat().st_size > 10_000
    with pytest.raises(SphereEditError, match="is not a run folder"):
        run("report", tmp_path)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [1200, 500])
def test_the_page_in_a_browser(page, tmp_path, width):
    """No console message, no sideways scrolling, and the filter filters."""
    probe = """<script>
      document.getElementById("filter").value = "throw 1"; document.getElementById("filter").dispatchEvent(new Event("input"));
      const left = [...document.querySelectorAll("#facts tr")].filter(row => !row.hidden).length;
      document.title = [innerWidth, document.documentElement.scrollWidth, left].join(" ");
    </script></body>"""
    copy = tmp_path / "page.html"
    copy.write_text(page.read_text().replace("</body>", probe))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
    ]
    command = [
        CHROMIUM,
        *options,
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},900",
        "--dump-dom",
        copy.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    inner, scroll, left = map(int, re.search(r"<title>(.*?)</title>", done.stdout)[1].split())
    assert scroll <= inner <= width
    assert left == 1 + 3, "the heading, and one fact in each of three runs"
    assert "CONSOLE" not in done.stderr


def test_correlation_is_spearmans_and_drift_alone_is_not_taken_for_more_than_it_is():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, generator=generator).tolist()
    y = (torch.tensor(x) + torch.randn(40, generator=generator)).tolist()
    found = correlate([None, *x], [1.0, *y])
    assert found.rho == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found.p < 0.01
    assert found.points == 40
    assert correlate([1.0, 1, 1, 1, 1], [1.0, 2, 3, 4, 5]) is None
    # two random walks that know nothing of one another: their differences do not correlate, and p is about uniform
    chances, levels = [], []
    for seed in range(60):
        generator.manual_seed(seed)
        walks = torch.randn(2, 30, generator=generator).cumsum(1).tolist()
        chances.append(correlate(*walks, differences=True, draws=200).p)
        levels.append(correlate(*walks, block=1, draws=200).p)
    assert sum(p < 0.05 for p in chances) <= 8
    assert sum(p < 0.05 for p in levels) >= 20, "what a permutation point by point would have said of the levels"


def test_predictors_are_those_of_the_journal(runs):
    series = Series.read(runs[0])
    found = predictors(series)
    last = series.batches[-1].matrices.values()
    assert found["drift"][-1] == max(matrix["relative_drift"] for matrix in last)
    assert found["collateral"][-1] == pytest.approx(sum(matrix["collateral_ratio"] for matrix in last))
    assert found["drift"][0] == found["collateral"][0] == found["energy"][0] == 0
    assert [len(values) for values in found.values()] == [7] * 4


def test_the_last_update_is_told_as_solved_and_as_written(runs):
    """SPHERE's share is given back where it was taken, and shown where it was not."""
    name = "model.layers.2.mlp.down_proj"
    for folder, sphere in ((runs[0], True), (runs[1], False)):
        weight, solved, written = Series.read(folder).last_update(name)
        stored, _ = RunFolder.open(folder).read_update(6)
        assert torch.equal(written if sphere else solved, stored[name].dense())
        principal = Sphere(eta=0.5).directions(weight)
        ratio = float((written.double() @ principal).norm() / (solved.double() @ principal).norm())
        assert ratio == pytest.approx(0.5, abs=1e-3)
        rest = (written - solved).double()
        assert float((rest - rest @ principal @ principal.T).norm()) < 1e-5
    figure = weight_plots.idea(weight, solved, written, "x")
    assert "‖ΔW U‖" in figure.axes[0].get_title()


@pytest.mark.parametrize(("index", "count"), [(0, 0), (0, 2), (1, 1), (-1, 1)])
def test_neighbours_in_damaged_results_are_told(index, count):
    score = PromptScore(1.0, 2.0, 1.0)
    scores = FactScores(score, (), (score,) * count).as_dict()
    entry = {"index": index, "unedited": scores, "edited": scores}
    facts = facts_from(
        [{"subject": "Ada", "prompt": "{} is in", "target_new": "Rome", "neighbors": ["Bo is in"]}]
    ).facts
    with pytest.raises(SphereEditError, match=f"neighbours of fact {index} are not the run's"):
        ChangedNeighbors.of([entry], facts)
