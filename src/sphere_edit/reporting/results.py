"""Views of a run drawn for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from sphere_edit.counting import counted
from sphere_edit.evaluation import catalogue
from sphere_edit.evaluation.catalogue import DIVERGENCE, LIKELIHOOD, PERPLEXITY, STRICT
from sphere_edit.reporting import stories, views
from sphere_edit.reporting.neighbors import ChangedNeighbors
from sphere_edit.reporting.words import (
    between,
    by_stage,
    decimals,
    guessing,
    happened,
    one_line,
    relative,
    short_name,
    span,
    times,
    with_error,
    yes,
)
from sphere_edit.text import terminal

_NEIGHBORS = 10  # rows of their table; the page has more


def make_table(title: str, *columns: str, left: Sequence[str] = (), head: bool = True) -> Table:
    """An empty table in the house's style; columns hold numbers but for those named in ``left``."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, show_header=head
    )
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right")
    return table


@singledispatch
def draw(view: views.View | stories.Timeline | stories.Story) -> Table | Text | Group:
    """A view as something that rich prints."""
    raise TypeError(f"no drawing of a {type(view).__name__}")


@draw.register
def _header(view: views.Header) -> Text:
    sphere = view.sphere
    projection = (
        f"SPHERE η {sphere['eta']:g}, α {sphere['alpha']:g}, {sphere['basis']}, {sphere['project']}"
        if sphere
        else "no SPHERE"
    )
    return Text.assemble(
        terminal(view.folder, "bold"),
        terminal(f": {view.model}, {view.method}, {projection}"),
        "\n",
        terminal(
            f"started {view.started}, layers {view.layers}, {view.statistics}; {counted(view.batches, 'batch')}, {counted(view.edited, 'fact')} edited, "
            f"{view.superseded} superseded, {view.removed} removed, {view.withdrawn} withdrawn; {view.state}"
        ),
    )


@draw.register
def _batches(view: views.Batches) -> Table:
    columns = (
        "batch",
        "facts",
        "superseded",
        "again",
        "loss before",
        "after",
        "target prob.",
        "‖ΔW‖/‖W‖",
        "‖ΔW U‖/‖ΔW‖",
    )
    table = make_table("Batches", *columns, "seconds")
    for row in view.rows:
        table.add_row(
            str(row.number) if row.stands else f"({row.number})",
            row.kind if row.kind in ("repair", "removal") else str(row.facts),
            str(row.superseded),
            str(row.again),
            decimals(row.loss_before, 2),
            decimals(row.loss_after, 3),
            decimals(row.probability, 3),
            span(row.norms),
            span(row.principal),
            f"{row.seconds:.1f}",
            style="" if row.stands else "dim",
        )
    if not all(row.stands for row in view.rows):
        table.caption = "(…): undone by a removal that went back to before it"
    return table


@draw.register
def _timings(view: views.Timings) -> Text:
    memory = f"\nPeak memory: {view.peak_memory / 1e9:.1f} GB" if view.peak_memory else ""
    return Text.assemble(terminal(f"Time by stage: {by_stage(view.seconds)}"), memory)


@draw.register
def _evaluations(view: views.Evaluations) -> Table:
    """Each part in the first two protocols, of which the second is named alone."""
    pairs = [(part, protocol) for part in catalogue.PARTS for protocol in (LIKELIHOOD, STRICT)]
    names = {
        catalogue.of_part(part, protocol): part.name if protocol is LIKELIHOOD else protocol.label
        for part, protocol in pairs
    }
    known = {name for row in view.rows for name, value in row.values.items() if value is not None}
    asked = catalogue.measured(names, lambda metric: metric.name in known)
    columns = [names[metric] for metric in asked]
    table = make_table("Evaluations", "after batch", "facts asked", *columns, PERPLEXITY.words)
    shown = [*asked, PERPLEXITY]
    for row in view.rows:
        cells = [metric.said(row.values.get(metric.name)) for metric in shown]
        table.add_row(str(row.after), str(row.facts), *cells)
    return table


@draw.register
def _metrics(view: views.Metrics) -> Table:
    if view.alone:
        return _one_model(view)
    table = make_table(view.title, "", "protocol", "before", "after", "95 % or change", left=("", "protocol"))
    whole = {catalogue.harmonic(protocol).name for protocol in catalogue.PROTOCOLS}
    for row in view.rows:
        metric, last = row.metric, row.metric.name in whole
        unknown = metric.distance or (metric.of == "texts" and row.before is None)
        before = "" if unknown else metric.said(row.before)
        beside = between(row.span) if row.span else times(row.before, row.after) if metric.ratio else ""
        title = metric.title or metric.label
        title = title if metric.unit in ("", "%") else f"{title}, {metric.unit}"
        after = metric.said(row.after)
        table.add_row(title, row.of_what, before, after, beside, style="bold" if last else "", end_section=last)
    for energy in view.energies:
        cells = (f"{energy.before:.5f}", f"{energy.after:.5f}", relative(energy.before, energy.after))
        table.add_row("Energy a pair", short_name(energy.name), *cells)
    return table


def _one_model(view: views.Metrics) -> Table:
    """A row a part, a column a protocol."""
    said = {row.metric.name: row.metric.said(row.after) for row in view.rows}
    protocols = list(dict.fromkeys(row.of_what for row in view.rows if row.metric.of == "prompts"))
    table = make_table(view.title, "", *protocols, left=("",))
    grid: dict[str, dict[str, str]] = {}
    for metric in catalogue.measured(catalogue.of_prompts(), lambda metric: metric.name in said):
        grid.setdefault(metric.title, {})[metric.of_what] = said.get(metric.name, "–")
    for title, cells in grid.items():
        table.add_row(title, *(cells.get(protocol, "–") for protocol in protocols))
    return table


@draw.register
def _abilities(view: views.Abilities) -> Table:
    columns = ("task", "metric", "documents", "before", *(("after",) if view.edited else ()), "guessing")
    table = make_table(f"General ability, {view.title}", *columns, left=("task", "metric"))
    for row in view.rows:
        after = [with_error(row.after) if row.after else "–"] if view.edited else []
        before = row.before
        table.add_row(row.task, before.metric, str(before.documents), with_error(before), *after, guessing(before))
    return table


@draw.register
def _facts(view: views.Facts) -> Table:
    columns = ("fact", "prompt", "new answer", "says now", "batch", LIKELIHOOD.label, STRICT.label)
    table = make_table(f"Facts ({len(view.rows)} of {view.total}, failures first)", *columns, left=columns[1:])
    for row in view.rows:
        said = one_line(row.after.rewrite.said)
        marks = [yes(row.holds(protocol)) for protocol in (LIKELIHOOD, STRICT)]
        shown = terminal(row.prompt), terminal(row.answer), terminal(said)
        table.add_row(str(row.index), *shown, str(row.written[0]), *marks)
    return table


@draw.register
def _neighbors(view: ChangedNeighbors) -> Table:
    columns = ("fact", "neighbour's prompt", "said before", "says now")
    shown = view.rows[:_NEIGHBORS]
    more = f", the first {len(shown)}" if len(shown) < len(view.rows) else ""
    title = f"Neighbours answered otherwise ({len(view.rows)} of {view.asked}{more})"
    table = make_table(title, *columns, left=columns[1:])
    for row in shown:
        table.add_row(str(row.index), *(terminal(one_line(text)) for text in (row.prompt, row.before, row.now)))
    return table


@draw.register
def _removed(view: stories.Removed) -> Table:
    columns = (
        "fact",
        "prompt",
        "edited to",
        "removed in",
        "unedited answer",
        "says now",
        "returned",
        "KL",
        "paraphrases",
    )
    back = sum(row.returned is True for row in view.rows)
    asked = sum(row.returned is not None for row in view.rows)
    title = f"Removed facts: {back} of {counted(asked, 'prompt')} give the unedited model's answer again"
    table = make_table(title, *columns, left=("prompt", "edited to", "unedited answer", "says now"))
    for row in view.rows:
        words = (row.prompt, row.target), (one_line(row.answer), one_line(row.said))
        shown = [[terminal(word) for word in pair] for pair in words]
        returned = "–" if row.returned is None else yes(row.returned)
        apart = decimals(row.kl, 3), decimals(row.kl_paraphrases, 3)
        table.add_row(str(row.index), *shown[0], str(row.batch), *shown[1], returned, *apart)
    return table


@draw.register
def _timeline(view: stories.Timeline) -> Table:
    return _events("History", view.events, "whole")


@draw.register
def _story(view: stories.Story) -> Group:
    answers = make_table("What the model says", "after batch", "says", STRICT.label, left=("says",))
    for answer in view.answers:
        when = "unedited" if answer.after == 0 else str(answer.after)
        new = "–" if answer.new is None else yes(answer.new)
        answers.add_row(when, terminal(one_line(answer.said)), new)
    title = f"Fact {view.index}, {view.name}: {view.state}"
    return Group(_events(title, view.events, "single"), answers)


def _events(title: str, events: Sequence[stories.Event], of: str) -> Table:
    table = make_table(title, "time (UTC)", "batch", "what happened", left=("time (UTC)", "what happened"))
    for event in events:
        said = happened(event.kind, event.about, of == "single") + ("" if event.stands else " (taken back since)")
        time = "–" if event.time is None else event.time.replace("T", " ").rstrip("Z")
        table.add_row(time, str(event.batch), terminal(said), style="" if event.stands else "dim")
    return table


def cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """The words of a table alone: its headers, and its rows."""
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    return [str(column.header) for column in table.columns], [list(row) for row in zip(*columns, strict=True)]


def trials_table(trials: Sequence[Mapping[str, Any]], title: str) -> Table:
    """What each setting came to in a calibration, the chosen one first; a trial as its summary says it."""
    by_name = {metric.name: metric for metric in catalogue.of_prompts()}
    shown = [by_name[name] for name in trials[0] if name in by_name]
    columns = ("settings", *(metric.words for metric in shown), DIVERGENCE.column, "score")
    table = make_table(f"Calibration, {title}: all facts in one batch", *columns, left=("settings",))
    for trial in trials:
        said = "; ".join(f"{name} {value}" for name, value in trial["settings"].items()) or "defaults"
        numbers = [metric.said(trial[metric.name]) for metric in shown]
        table.add_row(one_line(said), *numbers, DIVERGENCE.said(trial[DIVERGENCE.name]), f"{trial['score']:.3f}")
    return table
