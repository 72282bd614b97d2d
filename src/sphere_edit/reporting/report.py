"""One self-contained HTML page about one run or several, and its figures as files."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from sphere_edit._version import __version__
from sphere_edit.counting import counted, often
from sphere_edit.editing.guard import stopped
from sphere_edit.evaluation import catalogue
from sphere_edit.evaluation.catalogue import LIKELIHOOD, STRICT
from sphere_edit.files import remove_dead_temporaries, write_atomically, write_text
from sphere_edit.progress import Quiet, Reporter
from sphere_edit.reporting import plots, views, weight_plots
from sphere_edit.reporting.energy import NOTE
from sphere_edit.reporting.lights import lights
from sphere_edit.reporting.series import Series, any_known, labelled
from sphere_edit.reporting.words import by_stage, decimals, guessing, one_line, relative, short_name, with_error, yes

_NEIGHBORS_SHOWN = 200
_FACTS_SHOWN = 2000  # rows of the page's table, failures first; metrics.json has them all
_RUNS_DRAWN = 4  # runs whose matrices are drawn one by one


def write_report(
    runs: Sequence[str | Path],
    page: Path,
    figures: Path | None = None,
    reporter: Reporter | None = None,
    labels: Sequence[str] | None = None,
) -> Path:
    """Write the page about some run folders to ``page``, and its figures as PNG and SVG into the folder ``figures``.

    ``labels`` says what the runs are called. With more than four of them, figures of one run's matrices are left out.

    Raises:
        SphereEditError: a run is not there or has measured nothing yet, or the page cannot be written.
    """
    series = labelled(runs, labels)
    facts = _facts(series)
    for folder in (page.parent, *([] if figures is None else [figures])):
        remove_dead_temporaries(folder)
    shown = []
    planned = _figures(series)
    with (reporter or Quiet()).bar("report", len(planned), "figure") as advance:
        for name, caption, draw in planned:
            figure = draw()
            svg = _svg(figure, name)
            shown.append({"svg": svg[svg.index("<svg") :], "caption": caption})
            if figures is not None:
                write_text(figures / f"{name}.svg", svg)
                write_atomically(figures / f"{name}.png", partial(figure.savefig, format="png", dpi=160))
            advance(1)
    title = series[0].label if len(series) == 1 else "Runs side by side"
    content = {
        "title": f"{title}: {series[0].config.model.source.rsplit('/', 1)[-1]}",
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "version": __version__,
        "note": NOTE,
        "runs": [_run(run) for run in series],
        "metrics": _metrics(series),
        "energies": _energies(series),
        "abilities": _abilities(series),
        "figures": shown,
        "removed": _removed(series),
        "neighbors": _neighbors(series),
        "facts": facts[:_FACTS_SHOWN],
        "more_facts": max(0, len(facts) - _FACTS_SHOWN),
        "texts": [2, 4, 5] if len(series) == 1 else [2, 5, 6],  # columns of the facts that hold sentences
    }
    template = files("sphere_edit").joinpath("data/report.html.jinja").read_text("utf-8")
    html = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template).render(content)
    write_text(page, html)
    return page


def _figures(runs: Sequence[Series]) -> list[tuple[str, str, Callable[[], Figure]]]:
    """Name, caption and maker of each figure that the runs have enough for."""
    found: list[tuple[str, str, Callable[[], Figure]]] = [
        (
            "trends",
            "Energy and metrics over edits. Solid with SPHERE, dashed without. ρ: Spearman's correlation of the metric with the energy "
            "over the checkpoints; two series that both drift correlate in any case.",
            partial(plots.trends, runs),
        )
    ]
    if any(len(run.edits) > 2 for run in runs):
        caption = (
            "Change of energy against change of each metric between checkpoints: points of each run with their 95 % ellipse; filled with SPHERE, "
            "hollow without. Line, 95 % band and correlations are of all runs together."
        )
        found.append(("differences", caption, partial(plots.differences, runs)))
    if any(len(run.retention()) > 1 for run in runs):
        caption = "What is left after the last batch, by how many edits ago a fact was edited: batches in at most ten classes, with 95 % intervals."
        found.append(("retention", caption, partial(plots.retention, runs)))
    if any(len(points) > 1 for run in runs for points in run.abilities.values()):
        caption = "General ability over edits, with one standard error up and down. Dotted: what guessing would score."
        found.append(("abilities", caption, partial(plots.abilities, runs)))
    for number_, run in enumerate(runs if len(runs) <= _RUNS_DRAWN else (), 1):
        if not run.changed:
            continue
        tag = "" if len(runs) == 1 else f"-{number_}"
        name = _most_changed(run)
        short = short_name(name)
        eta = 0.5 if run.config.sphere is None else run.config.sphere.eta
        found += [
            (
                f"idea{tag}",
                f"{run.label}: neurons on the sphere of the first two principal directions and the update's strongest other one; "
                f"where the last batch pushes those of {short} that it moves most, as solved and after SPHERE"
                + ("" if run.sphere else " (which this run did not use)") + ".",
                partial(_of_last_update, run, name, eta),
            ),
            (f"heat{tag}", f"{run.label}: change of each edited matrix's energy.", partial(weight_plots.heat, run)),
            (
                f"spectrum{tag}",
                f"{run.label}: spectrum of all that was written to {short}, the matrix that changed most, and its part along the principal directions.",
                partial(_of_change, weight_plots.spectrum, run, name, eta),
            ),
            (
                f"cosines{tag}",
                f"{run.label}: cosines between neurons of {short}.",
                partial(_of_change, weight_plots.cosines, run, name),
            ),
            (
                f"neighbourhoods{tag}",
                f"{run.label}: neurons of {short} before and after in one map (t-SNE of their directions), and their density along its axes.",
                partial(_of_change, weight_plots.neighbourhoods, run, name),
            ),
        ]  # fmt: skip
    return found


def _of_last_update(run: Series, name: str, eta: float) -> Figure:
    weight, solved, written = run.last_update(name)
    (weight, solved, written), title = _of_one_expert([weight, solved, written], written, short_name(name))
    return weight_plots.idea(weight, solved, written, title, eta)


def _of_change(draw: Callable[..., Figure], run: Series, name: str, *more: float) -> Figure:
    """A figure of one matrix before and after the run."""
    before, after = run.change(name)
    matrices, title = _of_one_expert([before, after], after - before, short_name(name))
    return draw(*matrices, title, *more)


def _of_one_expert(matrices: Sequence[Tensor], change: Tensor, title: str) -> tuple[Sequence[Tensor], str]:
    """Matrices and a title; of a layer of experts ``[E, d_out, d_in]``, those of the expert that changed most."""
    if change.dim() == 2:
        return matrices, title
    number = int(change.flatten(1).norm(dim=1).argmax())
    return [matrix[number] for matrix in matrices], f"{title}, expert {number}"


def _most_changed(run: Series) -> str:
    last = run.batches[-1].matrices
    return max(last, key=lambda name: last[name]["relative_drift"])


def _run(run: Series) -> dict[str, Any]:
    ended = "finished" if run.guard is None else f"guard: {stopped(run.guard)}"
    state = ended if run.finished or run.guard is not None else "not finished: what follows is of the last evaluation"
    timings = views.Timings.of(run.batches, run.final_rechecks)
    return {
        "label": run.label,
        "about": f"{counted(run.edits[-1], 'fact')} in {counted(len(run.batches), 'batch')}, evaluated {often(len(run.edits) - 1)}; {state}",
        "lights": lights(run),
        "timings": f"Time by stage: {by_stage(timings.seconds)}",
        "settings": _settings(run),
    }


def _settings(run: Series) -> list[tuple[str, str]]:
    config, sphere = run.config, run.config.sphere
    model = config.model
    return [
        ("model", f"{model.source} ({model.family}, {model.dtype})"),
        ("weights' SHA-256", model.fingerprint),
        ("facts read as", "; ".join(run.protocols)),
        ("method", f"{run.method} {json.dumps(config.method_options)}"),
        ("SPHERE", json.dumps(sphere.model_dump()) if sphere else "off"),
        ("matrices", ", ".join(config.matrices)),
        ("statistics from", config.corpus.origin),
        *((name, json.dumps(value)) for name, value in config.settings.items() if name not in ("options", "sphere")),
        *((f"version of {name}", value) for name, value in config.versions.items()),
        ("device", config.device),
        ("started", config.created),
    ]


def _metrics(runs: Sequence[Series]) -> dict[str, Any]:
    """Two decimals of what is no percentage; a dash where a model was not evaluated."""
    metrics = catalogue.measured(catalogue.on_page(), lambda metric: any_known(runs, metric))
    rows = [
        [state.label, *(metric.said(state.values[metric.name], 2) if state.values else "–" for metric in metrics)]
        for state in views.states(runs)
    ]
    return {"columns": [metric.column for metric in metrics], "rows": rows}


def _named(run: str, name: str, runs: Sequence[Series]) -> str:
    return f"{run}, {name}" if len(runs) > 1 else name


def _energies(runs: Sequence[Series]) -> dict[str, Any]:
    columns = (
        "HE before",
        "after",
        "change",
        "‖W − W0‖/‖W0‖",
        "collateral",
        "first order, last batch",
        "change, last batch",
    )
    rows = [
        [
            _named(matrix.run, short_name(matrix.name), runs),
            f"{matrix.before:.1f}",
            f"{matrix.after:.1f}",
            relative(matrix.before, matrix.after),
            f"{matrix.drift:.3f}",
            decimals(matrix.collateral, 4),
            f"{matrix.first_order:+.2f}",
            f"{matrix.last_change:+.2f}",
        ]
        for matrix in views.matrices(runs)
    ]
    return {"columns": columns, "rows": rows}


def _abilities(runs: Sequence[Series]) -> dict[str, Any]:
    columns = ("metric", "documents", "before", "after", "edits", "guessing")
    rows = [
        [
            _named(row.run, row.task, runs),
            last.metric,
            str(last.documents),
            with_error(row.before),
            with_error(last),
            str(row.edits),
            guessing(row.before),
        ]
        for row in views.abilities(runs)
        for last in (row.after or row.before,)
    ]
    return {"columns": columns, "rows": rows}


def _removed(runs: Sequence[Series]) -> dict[str, Any]:
    columns = ("edited to", "removed in", "unedited answer", "says now", "returned", "KL", "KL, paraphrases")
    rows = [
        [
            _named(run.label, row.prompt, runs),
            row.target,
            str(row.batch),
            one_line(row.answer),
            one_line(row.said),
            "–" if row.returned is None else yes(row.returned),
            decimals(row.kl, 3),
            decimals(row.kl_paraphrases, 3),
        ]
        for run in runs
        for row in run.removed().rows
    ]
    return {"columns": columns, "rows": rows}


def _neighbors(runs: Sequence[Series]) -> dict[str, Any]:
    rows = [
        [_named(run.label, row.prompt, runs), str(row.index), one_line(row.before), one_line(row.now)]
        for run in runs
        for row in run.changed_neighbors().rows
    ]
    return {"columns": ("fact", "said before", "says now"), "rows": rows[:_NEIGHBORS_SHOWN], "all": len(rows)}


def _facts(runs: Sequence[Series]) -> list[list[str]]:
    """A line a fact: those that did not take first, then those not held strictly, then those whose answer is the least likely."""
    rows = [row for run in runs for row in views.Facts.of(run.facts(), run.batches, run.label).rows]
    rows.sort(key=lambda row: (row.holds(LIKELIHOOD), row.holds(STRICT), -row.after.rewrite.nll_right))
    return [_fact(row, len(runs) > 1) for row in rows]


def _fact(row: views.FactRow, several: bool) -> list[str]:
    before, after = row.before.rewrite, row.after.rewrite
    return [
        row.prompt,
        row.answer,
        *([row.run] if several else []),
        str(row.written[0]),
        *(one_line(score.said) for score in (before, after)),
        *(_probability(nll) for nll in (before.nll_right, after.nll_right, after.nll_other)),
        *(yes(row.holds(protocol)) for protocol in (LIKELIHOOD, STRICT)),
    ]


def _probability(nll: float) -> str:
    return f"{100 * math.exp(-nll):.1f} %"


def _svg(figure: Figure, name: str) -> str:
    """The figure as SVG, its ids told apart from those of other figures on the page."""
    text = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    figure.set_layout_engine("none")  # it is laid out by now, as it would be for a PNG
    return text.getvalue()
