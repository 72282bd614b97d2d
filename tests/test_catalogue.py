"""A metric is one row: what shows metrics shows a further one as well. And the views that tables and pages draw are plain data."""

from __future__ import annotations

import ast
import io
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import sphere_edit
from conftest import fact_records
from families import save_tiny
from sphere_edit.editor import Editor
from sphere_edit.evaluation import catalogue
from sphere_edit.evaluation.catalogue import LIKELIHOOD, STRICT, Part, Protocol
from sphere_edit.evaluation.intervals import intervals, summarise
from sphere_edit.evaluation.scores import FactScores, PromptScore
from sphere_edit.progress import Quiet
from sphere_edit.reporting import plots
from sphere_edit.reporting.comparison import as_csv, markdown, read_row
from sphere_edit.reporting.report import write_report
from sphere_edit.reporting.results import draw
from sphere_edit.reporting.series import Series
from sphere_edit.reporting.views import Batches, Evaluations, Facts, Header, Metrics, of_run
from sphere_edit.runs.folder import RunFolder
from sphere_edit.text import Screen
from test_runs import METHODS, QUICK

CLOSE = Protocol("_close", "within two nats", lambda prompt: float(prompt.nll_right <= prompt.nll_other + 2))
FIRST = Part("first", "First neighbour", lambda fact: fact.neighbors[:1], learnt=False)
ROOT = Path(sphere_edit.__file__).parent


def edited(folder: Path, name: str, model: Path) -> Path:
    """A run of four facts in two batches, evaluated after each, one of them written again."""
    options = {**QUICK, **METHODS["memit"], "evaluation": {"every": 1}, "recheck": 2}
    editor = Editor.from_pretrained(model, folder / name, reporter=Quiet(), **options)
    editor.edit(fact_records(4))
    editor.close()
    return folder / name


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> Path:
    """A run that was measured before the catalogue grew."""
    folder = tmp_path_factory.mktemp("before")
    return edited(folder, "run", save_tiny("llama", folder / "model"))


@pytest.fixture
def grown(monkeypatch):
    """The catalogue with a further protocol and a further part."""
    monkeypatch.setattr(catalogue, "PROTOCOLS", (*catalogue.PROTOCOLS, CLOSE))
    monkeypatch.setattr(catalogue, "PARTS", (*catalogue.PARTS, FIRST))


def printed(*views) -> str:
    console = Screen(width=200, file=io.StringIO())
    for view in views:
        console.print(draw(view))
    return console.file.getvalue()


def scores(*margins: float) -> FactScores:
    """A fact whose prompts' right answers are so many nats likelier than the rivals."""
    rewrite, *rest = (PromptScore(1.0, 1.0 + margin, 0.5) for margin in margins)
    return FactScores(rewrite, (rest[0],), tuple(rest[1:]))


def test_a_further_protocol_and_part_are_measured_as_the_others_are(grown):
    facts = [scores(-1, -3, -1, -3), scores(-3, 1, -3, 5)]
    found = summarise(facts)
    assert found["efficacy_close"] == 50
    assert found["generalization_close"] == 50
    assert found["specificity_close"] == 50
    assert found["first_close"] == 50
    assert found["first"] == 0
    assert found["score_close"] == pytest.approx(50)
    assert list(found) == list(intervals(facts)) == [metric.name for metric in catalogue.of_prompts()]
    assert intervals(facts)["efficacy_close"] == (0, 100)


def test_a_further_row_is_in_every_place_that_shows_metrics(grown, before, tmp_path):
    run = edited(tmp_path, "run", before.parent / "model")
    metrics = json.loads((run / "metrics.json").read_text())
    own = [fact["edited"]["rewrite"] for fact in metrics["per_fact"]]
    share = 100 * sum(prompt["nll_right"] <= prompt["nll_other"] + 2 for prompt in own) / len(own)
    low, high = metrics["intervals"]["edited"]["efficacy_close"]
    assert metrics["edited"]["efficacy_close"] == share
    assert low <= share <= high
    assert {"efficacy_close", "first_strict"} <= set(metrics["retention"][0]) & set(metrics["unedited"])
    table = printed(Metrics.of(metrics, "all"))
    said = f"{share:.1f} %"
    assert re.search(rf"Efficacy +within two nats .*{re.escape(said)} +{low:.1f}–{high:.1f}", table)
    assert re.search(r"First neighbour +per token", table)
    assert "within two nats" in printed(Metrics.of({"edited": metrics["edited"]}, "one model"))
    page = write_report([run], tmp_path / "report.html").read_text()
    columns = re.findall("<th>(.*?)</th>", page[page.index("Metrics, after") :])
    place = columns.index("Efficacy, within two nats")
    (row,) = re.findall(r"<tr><td>memit \+ SPHERE, edited</td>(.*?)</tr>", page)
    assert re.findall("<td>(.*?)</td>", row)[place - 1] == said, "the first column has no name and another tag"
    labels = [axis.get_ylabel() for axis in plots.trends([Series.read(run)]).axes]
    assert {"Efficacy, within two nats, %", "First neighbour, %"} <= set(labels)
    rows = [read_row("g", "memit", "SPHERE", {0: run}), read_row("g", "memit", "plain", {0: before})]
    assert "| Efficacy, within two nats |" in markdown(rows)
    assert ",efficacy_close,efficacy_close_low,efficacy_close_high," in as_csv(rows)


def test_a_run_from_before_the_catalogue_grew_is_shown_and_says_nothing_of_what_it_did_not_measure(
    grown, before, tmp_path
):
    shown = printed(*of_run(before, 4))
    assert "Efficacy" in shown
    assert "within two nats" not in shown
    page = write_report([before], tmp_path / "report.html").read_text()
    assert "Efficacy, within two nats" in page
    series = Series.read(before)
    assert set(series.metrics["efficacy_close"]) == {None}
    assert None not in series.metrics["efficacy"]


def test_portability_is_shown_where_facts_have_such_prompts_and_counts_in_no_score(before, tmp_path):
    metrics = json.loads((before / "metrics.json").read_text())
    assert metrics["edited"]["portability"] is None
    for view in (Metrics.of(metrics, "all"), Metrics.of({"edited": metrics["edited"]}, "one"), *of_run(before, 2)):
        assert "ortability" not in printed(view)
    for without in (write_report([before], tmp_path / "without.html").read_text(), markdown([row_of(before)])):
        assert "ortability" not in without
    records = fact_records(4)
    for record in records[:2]:
        hop = {"group": "hop", "prompt": f"The country of {record['subject']} is", "answers": ["Sweden", "Svea"]}
        record["portability"] = [hop, {"group": "hop", "prompt": "No answer to this is"}]
    editor = Editor.from_pretrained(
        before.parent / "model", tmp_path / "run", reporter=Quiet(), **{**QUICK, **METHODS["memit"]}
    )
    found = editor.edit(records)
    editor.close()
    for when in ("unedited", "edited"):
        own = [fact[when]["portability"] for fact in found["per_fact"]]
        assert [len(prompts) for prompts in own] == [1, 1, 0, 0]
        prefers = [prompt["nll_right"] <= prompt["nll_other"] for prompts in own for prompt in prompts]
        assert found[when]["portability"] == 50 * sum(prefers)
        assert found[when]["portability_generated"] is not None
        three = [found[when][name] for name in ("efficacy", "generalization", "specificity")]
        assert found[when]["score"] == pytest.approx(0 if 0 in three else 3 / sum(1 / part for part in three))
    assert {fact["unedited"]["portability"][0]["also"] for fact in found["per_fact"][:2]} <= {True, False}
    assert re.search(r"Portability +strict", printed(*of_run(tmp_path / "run", 2)))
    assert re.search(
        r"portability .*strict", printed(Evaluations.of(RunFolder.open(tmp_path / "run").history.evaluations))
    )
    assert "<th>Portability</th>" in write_report([tmp_path / "run", before], tmp_path / "with.html").read_text()
    assert "| Portability |" in markdown([row_of(tmp_path / "run")])


def row_of(run: Path):
    return read_row("g", "memit", "SPHERE", {0: run})


def test_names_of_metrics_stand_in_the_catalogue_alone():
    names = {metric.name for metric in catalogue.over_checkpoints()} - {"score", catalogue.PERPLEXITY.name}
    for path in sorted(ROOT.rglob("*.py")):
        if path.name == "catalogue.py":
            continue
        said = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        fields = {"portability"} if path.parent.name == "facts" else set()  # of records, which have it too
        assert not (names - fields) & {word for word in said if isinstance(word, str)}, path


def test_every_metric_has_one_name_and_one_label():
    metrics = [*catalogue.over_checkpoints(), *catalogue.TEXTS]
    for told in (lambda metric: metric.name, lambda metric: metric.label):
        assert len({told(metric) for metric in metrics}) == len(metrics)
    assert set(catalogue.on_page()) | set(catalogue.compared()) <= set(metrics)
    strict = catalogue.of_part(catalogue.EFFICACY, STRICT)
    assert (strict.words, strict.heading, strict.column) == (
        "strict efficacy",
        "Efficacy, strict, %",
        "Efficacy, strict",
    )
    assert (catalogue.DIVERGENCE.words, catalogue.DIVERGENCE.column) == ("KL", "KL, nats")
    assert strict.said(None) == "–"
    assert strict.said(99.25) == "99.2 %"
    assert catalogue.PERPLEXITY.said(None) == "not finite"
    assert catalogue.DIVERGENCE.said(0.05123) == "0.0512"


def test_views_are_plain_data_and_nothing_that_draws_is_imported_there(before):
    found = list(of_run(before, 3))
    assert [type(view).__name__ for view in found] == [
        "Header", "Batches", "Timings", "Evaluations", "Metrics", "Facts",
    ]  # fmt: skip
    for view in found:
        assert json.loads(json.dumps(asdict(view), allow_nan=False)), view
    for name in ("reporting/views.py", "reporting/lights.py", "evaluation/catalogue.py"):
        assert not re.search(
            r"import (rich|jinja2|matplotlib)|from (rich|jinja2|matplotlib)", (ROOT / name).read_text()
        )


def test_a_view_of_facts_knows_who_wrote_them_and_has_failures_first(before):
    run = RunFolder.open(before)
    *_, facts = of_run(before, 3)
    assert (len(facts.rows), facts.total) == (3, 4)
    again = {index for batch in run.history.batches for index in batch.rewritten}
    assert again, "or the test could not fail"
    everything = Facts.of(json.loads((before / "metrics.json").read_text())["per_fact"], run.history.batches)
    for row in everything.rows:
        expected = [batch.number for batch in run.history.batches if row.index in batch.members]
        assert list(row.written) == expected
    assert {row.index for row in everything.rows if len(row.written) > 1} == again
    order = [(row.holds(LIKELIHOOD), row.holds(STRICT), row.index) for row in everything.rows]
    assert order == sorted(order)
    assert everything.rows[:3] == facts.rows


def test_what_a_user_named_is_drawn_as_it_is(before):
    header = replace(Header.of(RunFolder.open(before)), folder="[bold]run", model="[red]model")
    assert printed(header).startswith("[bold]run: [red]model, memit, SPHERE η ")


def test_batches_that_have_no_targets_or_changed_nothing_have_dashes(before):
    batch = RunFolder.open(before).history.batches[0]
    matrices = {name: {**matrix, "update_norm": 0.0} for name, matrix in batch.matrices.items()}
    blank = batch.model_copy(update={"targets": dict.fromkeys(batch.targets), "matrices": matrices, "kind": "repair"})
    cells = printed(Batches.of([blank])).split("\n")[4].split()
    assert cells[:2] == ["1", "repair"]
    assert cells[4:7] == ["–", "–", "–"]
    assert cells[8] == "–"
    assert math.isfinite(float(cells[9]))
