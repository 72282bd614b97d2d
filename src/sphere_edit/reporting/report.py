"""One self-contained HTML page about one run or several, and its figures as files."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment
from matplotlib import rc_context
from matplotlib.figure import Figure

from sphere_edit._version import __version__
from sphere_edit.editing.guard import COLLATERAL, stopped
from sphere_edit.evaluation.metrics import PromptScore
from sphere_edit.files import write_atomically, write_text
from sphere_edit.progress import Quiet, Reporter
from sphere_edit.reporting import plots
from sphere_edit.reporting.energy import NOTE
from sphere_edit.reporting.results import guessing, number, one_line, percent, relative, short_name, timings, with_error
from sphere_edit.reporting.series import METRICS, Series, labelled


@dataclass(frozen=True)
class Rule:
    """One of the page's first numbers: what it asks, and up to where its answer is good (green) or in doubt (amber)."""

    question: str
    green: float
    amber: float
    wording: str
    verdicts: tuple[str, str, str]
    rising: bool = False  # whether more is better

    def light(self, value: float | None, shown: str) -> dict[str, str]:
        """The answer for a value, in colour and words."""
        if value is None or not math.isfinite(value):
            index = 2
        else:
            sign = -1 if self.rising else 1
            index = 0 if sign * value <= sign * self.green else 1 if sign * value <= sign * self.amber else 2
        colour = ("green", "amber", "red")[index]
        return {
            "question": self.question,
            "value": shown,
            "colour": colour,
            "verdict": self.verdicts[index],
            "rule": self.wording,
        }

    def unknown(self, why: str) -> dict[str, str]:
        """No answer, and why there is none."""
        return {**self.light(None, "not measured"), "colour": "", "verdict": why}


_FACTS_SHOWN = 2000  # rows of the page's table, failures first; metrics.json has them all
_RUNS_DRAWN = 4  # runs whose matrices are drawn one by one


TAKEN = Rule(
    "Did the edits take?", 90, 70, "Strict efficacy over all facts edited. Green from 90 %, amber from 70 %.",
    ("yes", "not all of them", "no"), rising=True,
)  # fmt: skip
INTACT = Rule(
    "Is the rest intact?", 1.10, 1.30, "Perplexity on held-out text, times the unedited model's. Green up to 1.10, amber up to 1.30.",
    ("yes", "it begins to suffer", "no"),
)  # fmt: skip


def _light(rule: Rule, run: Series, value: float | None, shown: str) -> dict[str, str]:
    """A rule's answer, if the run was evaluated where it stands."""
    if run.current:
        return rule.light(value, shown)
    return rule.unknown("not evaluated where the run stands" + (f"; last: {run.evaluated}" if run.evaluated else ""))


def _near(run: Series) -> dict[str, str]:
    """How far the weights have moved, by the guard's own measure, with the energy beside it."""
    matrices = run.batches[-1].matrices if run.batches else {}
    value = COLLATERAL.measured(matrices) if matrices else 0.0
    changes = [100 * (matrix["energy"] / run.energies[name] - 1) for name, matrix in matrices.items()]
    wording = (
        f"{COLLATERAL.name[0].upper()}{COLLATERAL.name[1:]}. Green up to {COLLATERAL.value / 2:g}, amber up to {COLLATERAL.value:g}, "
        f"the guard's limit. Hyperspherical energy: {max(changes, key=abs, default=0.0):+.3f} % at most."
    )
    rule = Rule(
        "Is it still near itself?", COLLATERAL.value / 2, COLLATERAL.value, wording, ("yes", "it moves away", "no")
    )
    if value is None:
        return rule.unknown("no second moments; --guard measures them")
    return rule.light(value, f"{value:.3f}")


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
    shown = []
    planned = _figures(series)
    with (reporter or Quiet()).bar("report", len(planned), "figures") as advance:
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
        if not run.batches:
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
            (f"heat{tag}", f"{run.label}: change of each edited matrix's energy.", partial(plots.heat, run)),
            (
                f"spectrum{tag}",
                f"{run.label}: spectrum of all that was written to {short}, the matrix that changed most, and its part along the principal directions.",
                partial(_of_change, plots.spectrum, run, name, eta),
            ),
            (
                f"cosines{tag}",
                f"{run.label}: cosines between neurons of {short}.",
                partial(_of_change, plots.cosines, run, name),
            ),
            (
                f"neighbourhoods{tag}",
                f"{run.label}: neurons of {short} before and after in one map (t-SNE of their directions), and their density along its axes.",
                partial(_of_change, plots.neighbourhoods, run, name),
            ),
        ]  # fmt: skip
    return found


def _of_last_update(run: Series, name: str, eta: float) -> Figure:
    return plots.idea(*run.last_update(name), short_name(name), eta)


def _of_change(draw: Callable[..., Figure], run: Series, name: str, *more: float) -> Figure:
    """A figure of one matrix before and after the run."""
    return draw(*run.change(name), short_name(name), *more)


def _most_changed(run: Series) -> str:
    last = run.batches[-1].matrices
    return max(last, key=lambda name: last[name]["relative_drift"])


def _run(run: Series) -> dict[str, Any]:
    config, last = run.config, {key: values[-1] for key, values in run.metrics.items()}
    strict, after, before = last["efficacy_strict"], last["perplexity"], run.metrics["perplexity"][0]
    ratio = after / before if after and before else None
    sphere = config.sphere
    return {
        "label": run.label,
        "about": f"{run.edits[-1]} facts in {len(run.batches)} batches, evaluated {len(run.edits) - 1} times; "
        + (
            f"guard: {stopped(run.guard)}"
            if run.guard is not None
            else "finished"
            if run.finished
            else "not finished: what follows is of the last evaluation"
        ),
        "lights": [
            _light(TAKEN, run, strict, percent(strict)),
            _light(INTACT, run, ratio, "not finite" if ratio is None else f"× {ratio:.3f}"),
            _near(run),
        ],
        "timings": f"Time by stage: {timings([*run.batches, *run.final_rechecks])}",
        "settings": [
            ("model", f"{config.model.source} ({config.model.family}, {config.model.dtype})"),
            ("weights' SHA-256", config.model.fingerprint),
            ("facts read as", "; ".join(run.protocols)),
            ("method", f"{run.method} {json.dumps(config.method_options)}"),
            ("SPHERE", json.dumps(sphere.model_dump()) if sphere else "off"),
            ("matrices", ", ".join(config.matrices)),
            ("statistics from", config.corpus.origin),
            *((name, json.dumps(value)) for name, value in config.settings.items() if name not in ("options", "sphere")),
            *((f"version of {name}", value) for name, value in config.versions.items()),
            ("device", config.device),
            ("started", config.created),
        ],
    }  # fmt: skip


def _metrics(runs: Sequence[Series]) -> dict[str, Any]:
    rows = []
    for run in runs:
        edited = "edited" if run.current else f"edited ({run.evaluated or 'not evaluated'})"
        for name, index in (("unedited", 0), (edited, -1)):
            values = {key: series[index] for key, series in run.metrics.items()}
            if index == -1 and not (run.current or run.evaluated):
                values = dict.fromkeys(values)
            cells = [percent(value) for key, value in values.items() if key not in ("perplexity", "divergence")]
            rows.append([f"{run.label}, {name}", *cells, number(values["perplexity"]), number(values["divergence"])])
    return {"columns": [label.removesuffix(", %") for label in METRICS.values()], "rows": rows}


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
    rows = []
    for run in runs:
        for name, batch in run.batches[-1].matrices.items() if run.batches else ():
            before, collateral = run.energies[name], batch["collateral_ratio"]
            rows.append(
                [
                    f"{run.label}, {short_name(name)}" if len(runs) > 1 else short_name(name),
                    f"{before:.1f}",
                    f"{batch['energy']:.1f}",
                    relative(before, batch["energy"]),
                    f"{batch['relative_drift']:.3f}",
                    "–" if collateral is None else f"{collateral:.4f}",
                    f"{batch['first_order']:+.2f}",
                    f"{batch['energy_change']:+.2f}",
                ]
            )
    return {"columns": columns, "rows": rows}


def _abilities(runs: Sequence[Series]) -> dict[str, Any]:
    columns = ("metric", "documents", "before", "after", "edits", "guessing")
    rows = []
    for run in runs:
        for task, points in run.abilities.items():
            before, (edits, after) = points[0][1], points[-1]
            rows.append(
                [
                    f"{run.label}, {task}" if len(runs) > 1 else task,
                    after["metric"],
                    str(after["documents"]),
                    with_error(before),
                    with_error(after),
                    str(edits),
                    guessing(before),
                ]
            )
    return {"columns": columns, "rows": rows}


def _facts(runs: Sequence[Series]) -> list[list[str]]:
    found: list[tuple[tuple[bool, bool, float], list[str]]] = []
    for run in runs:
        for fact in run.facts():
            before, after = (PromptScore(**fact[when]["rewrite"]) for when in ("unedited", "edited"))
            cells = [
                fact["prompt"].replace("{}", fact["subject"]),
                fact["target_new"].strip(),
                *([run.label] if len(runs) > 1 else []),
                str(fact["batch"]),
                *(one_line(score.said) for score in (before, after)),
                *(_probability(nll) for nll in (before.nll_right, after.nll_right, after.nll_other)),
                "yes" if after.prefers else "no",
                "yes" if after.correct else "no",
            ]
            found.append(((after.prefers, after.correct, -after.nll_right), cells))
    return [cells for _, cells in sorted(found, key=lambda item: item[0])]


def _probability(nll: float) -> str:
    return f"{100 * math.exp(-nll):.1f} %"


def _svg(figure: Figure, name: str) -> str:
    """The figure as SVG, its ids told apart from those of other figures on the page."""
    text = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
