"""What the page shows of a desk, in words and tables: the views and drawings of the command line, as plain strings and escaped HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from matplotlib.figure import Figure
from rich.console import Group
from rich.table import Table

from sphere_edit.counting import counted, several
from sphere_edit.errors import SphereEditError
from sphere_edit.evaluation import catalogue
from sphere_edit.evaluation.comparing import Compared, Piece
from sphere_edit.facts.fact import short
from sphere_edit.inspection import tables as inspection_tables
from sphere_edit.progress import duration
from sphere_edit.reporting import plots, views
from sphere_edit.reporting.ledger import Entry, ledger, sought
from sphere_edit.reporting.lights import lights
from sphere_edit.reporting.results import cells, draw
from sphere_edit.reporting.series import Series
from sphere_edit.reporting.stories import Timeline, stories
from sphere_edit.reporting.words import one_line, percent, yes
from sphere_edit.runs.removal import chosen, named, with_superseded
from sphere_edit.runs.summary import MetricsContent
from sphere_edit.studio.desk import Desk
from sphere_edit.studio.draft import Row, said_of
from sphere_edit.text import html, visible

Grid = tuple[list[str], list[list[str]]]  # headers and rows
_Item = TypeVar("_Item")

PAGE = 100  # facts shown at once
_CELL = 300  # characters of a cell
_NAMED = 12  # facts named where something is asked


def cell(text: str | None) -> str:
    """Foreign text as a cell shows it: on one line, not too long, with nothing in it that acts."""
    return "–" if text is None else visible(short(one_line(text), _CELL))


@dataclass(frozen=True)
class Book:
    """One page of a table, and where it stands."""

    grid: Grid
    page: int
    pages: int
    words: str


def _book(headers: list[str], items: Sequence[_Item], row: Callable[[_Item], list[str]], page: int, what: str) -> Book:
    """A page of some items; only what stands on it is made into rows."""
    pages = max(1, -(-len(items) // PAGE))
    page = min(max(1, page), pages)
    shown = [row(item) for item in items[PAGE * (page - 1) : PAGE * page]]
    return Book((headers, shown), page, pages, f"{len(items):,} {what}; page {page} of {pages}")


# --- where everything stands --------------------------------------------------------------------------------------


def status(desk: Desk) -> str:
    """The model, the run and what is at work, as HTML."""
    return f"<div class='status'>{_standing(desk)}{_at_work(desk)}</div>"


def _standing(desk: Desk) -> str:
    run = desk.run()
    if run is not None:
        words = str(draw(views.Header.of(run)))
        state = "" if desk.loaded else " <em>Its model is not loaded.</em>"
        return "".join(f"<p>{html(line)}</p>" for line in words.split("\n")) + state
    if desk.inspected is not None:
        return f"<p>{html(desk.inspected.model)} is loaded, and unedited. The first edit makes the run {html(str(desk.folder))}.</p>"
    return "<p>No model is loaded.</p>"


def _at_work(desk: Desk) -> str:
    job, parts = desk.worker.current, []
    if job is not None:
        parts.append(f"<p class='job'><b>At work: {html(job.title)}</b></p>")
        parts += [_bar(bar) for bar in list(desk.live.bars)]
    elif (last := desk.worker.last) is not None:
        ended = f"ended: {last.error}" if last.error else "done"
        parts.append(f"<p class='job'><b>{html(last.title)}: {html(ended)}</b></p>")
    if waiting := desk.worker.queue():
        parts.append(f"<p>Waiting: {html('; '.join(f'{at}. {title}' for at, title in enumerate(waiting, 1)))}</p>")
    if lines := list(desk.live.lines):
        shown = "".join(f"<li>{html(short(line, 400))}</li>" for line in lines[-8:])
        parts.append(f"<ul class='log'>{shown}</ul>")
    return "".join(parts)


def _bar(bar: Any) -> str:
    left = "" if bar.left is None else f", {duration(bar.left)} left"
    words = f"{bar.title}: {bar.done:,.0f}/{counted(int(bar.total), bar.unit)}, {bar.rate:,.1f} {several(0, bar.unit)}/s{left}"
    return f"<p>{html(words)}<br><progress max='{bar.total:g}' value='{bar.done:g}' aria-label='{html(bar.title)}'></progress></p>"


def inspected(desk: Desk) -> list[tuple[str, Grid]]:
    """What was found of the model: title and table."""
    if desk.inspected is None:
        return []
    return [(str(table.title), _shown(cells(table))) for table in inspection_tables(desk.inspected)]


def _shown(grid: Grid) -> Grid:
    headers, rows = grid
    return headers, [[cell(text) for text in row] for row in rows]


# --- facts to be edited -------------------------------------------------------------------------------------------


def drafted(desk: Desk, page: int = 1) -> Book:
    """The facts to be edited next, each with what stands against it."""
    run = desk.run()
    known = [] if run is None else run.facts()

    def shown(numbered: tuple[int, Row]) -> list[str]:
        number, row = numbered
        fact = row.fact
        words = (row.source, "", "") if fact is None else (fact.subject, fact.prompt, fact.target_new.strip())
        return [str(number), *map(cell, words), cell(said_of(row, known))]

    faults = sum(not row.usable for row in desk.draft.rows)
    headers = ["row", "subject", "prompt", "new answer", "what stands against it"]
    return _book(headers, list(enumerate(desk.draft.rows, 1)), shown, page, f"facts, {faults} with faults")


def previewed(desk: Desk) -> tuple[Grid, Grid]:
    """What the last preview found of prompts, and of ordinary text."""
    found = desk.previewed
    headers = ["", "prompt", "should say", "probability before", "then", "holds", "said before", "says then"]
    if found is None:
        return (headers, []), (["", "before", "then", "change"], [])
    rows = [
        [
            row.kind,
            *map(cell, (row.prompt, row.right)),
            percent(100 * row.before),
            percent(100 * row.after),
            yes(row.holds),
            *map(cell, (row.said_before, row.said_after)),
        ]
        for row in found.rows[: 5 * PAGE]
    ]
    _, text = cells(draw(views.Metrics.of(found.text, "")))  # type: ignore[arg-type]
    return (headers, rows), (["", "text", "before", "then", "change"], text)


# --- two models ---------------------------------------------------------------------------------------------------


def sides(found: Compared) -> tuple[list[tuple[str, str | None]], list[tuple[str, str | None]]]:
    """Both answers in spans, those marked on which they differ."""
    return _spans(found.unedited), _spans(found.edited)


def _spans(pieces: Sequence[Piece]) -> list[tuple[str, str | None]]:
    return [(visible(text, keep="\n"), "differs" if differs else None) for text, differs in pieces] or [
        ("(nothing)", None)
    ]


def says_now(found: Compared) -> str:
    """What the model says to a prompt now, and how likely that and the answers are."""
    said = f"'{cell(found.said[1])}'"
    return "; ".join([said, *(f"probability of '{cell(one.answer)}': {one.edited:.2%}" for one in found.chances)])


def chances(found: Compared) -> Grid:
    """How likely the answers are to both."""
    rows = [[cell(one.answer), f"{one.unedited:.2%}", f"{one.edited:.2%}"] for one in found.chances]
    return ["answer", "unedited", "edited"], rows


# --- a run --------------------------------------------------------------------------------------------------------


def facts(desk: Desk, which: str = "current", batch: int | None = None, text: str = "", page: int = 1) -> Book:
    """The facts of the run, those that fail first."""
    headers = ["fact", "prompt", "new answer", "says now", catalogue.STRICT.label, "state", "batch", "said before"]
    run = desk.run()
    found = [] if run is None else sought(desk.kept("ledger", lambda: ledger(run)), which, batch, text)
    return _book(headers, found, _fact, page, "facts")


def _fact(entry: Entry) -> list[str]:
    return [
        str(entry.index),
        *map(cell, (entry.prompt, entry.answer, entry.now)),
        "–" if entry.strict is None else yes(entry.strict),
        entry.state + (", forgotten" if entry.forgotten else ""),
        "–" if entry.batch is None else str(entry.batch),
        cell(entry.before),
    ]


def story(desk: Desk, fact: int) -> list[tuple[str, Grid]]:
    """What happened to a fact, what the model said of it, and its last scores: title and table."""
    (found,) = stories(desk.known_run(), str(fact))[:1]
    drawn: Any = draw(found)
    assert isinstance(drawn, Group)
    shown = [(cell(str(one.title)), _shown(cells(one))) for one in drawn.renderables if isinstance(one, Table)]
    return [*shown, *_judged(desk, fact)]


def _judged(desk: Desk, fact: int) -> list[tuple[str, Grid]]:
    """How each prompt of a fact was judged last, in every protocol; nothing where it was not."""
    found = _measured(desk)
    entry = None if found is None else next((one for one in found["per_fact"] if one["index"] == fact), None)
    if entry is None:
        return []
    (row,) = views.Facts.of([entry]).rows
    rows = []
    for part in catalogue.PARTS:
        for score in part.prompts(row.after):
            verdicts = [protocol.verdict(score) for protocol in catalogue.PROTOCOLS]
            said = ["–" if one is None else f"{one:.0%}" for one in verdicts]
            rows.append([part.label, cell(score.said), *said])
    return [
        (
            "How each of its prompts is judged",
            (["prompt for", "says", *(one.label for one in catalogue.PROTOCOLS)], rows),
        )
    ]


def _measured(desk: Desk) -> MetricsContent | None:
    """The content of ``metrics.json``, where it is of where the run stands."""
    run = desk.run()
    return None if run is None else desk.kept("metrics", run.current_metrics)


def answers(desk: Desk) -> str:
    """The three answers with their rules, as HTML."""
    try:
        found = lights(Series.read(desk.known_run().path))
    except SphereEditError as error:
        return f"<p>{html(str(error))}</p>"
    shown = "".join(
        f"<li class='light {html(one.colour)}'><b>{html(one.question)}</b> <span>{html(one.verdict)}</span> "
        f"<span>{html(one.value)}</span><small>{html(one.rule)}</small></li>"
        for one in found
    )
    return f"<ul class='lights'>{shown}</ul>"


def figure(desk: Desk) -> Figure | None:
    """Energy and metrics over the batches; None before anything was measured."""
    try:
        return plots.trends([Series.read(desk.known_run().path)])
    except SphereEditError:
        return None


def metrics(desk: Desk) -> Grid:
    """Everything that was measured after the last batch."""
    found = _measured(desk)
    if found is None:
        return ["", "protocol", "before", "after", "95 % or change"], []
    return _shown(cells(draw(views.Metrics.of(found, ""))))  # type: ignore[arg-type]


def timeline(desk: Desk) -> Grid:
    """What the run did, first to last."""
    run = desk.run()
    if run is None:
        return ["time (UTC)", "batch", "what happened"], []
    return _shown(cells(draw(Timeline.of(run))))  # type: ignore[arg-type]


def going_back(desk: Desk, to: int) -> str:
    """What a rollback would do, in sentences.

    Raises:
        SphereEditError: there is no such batch.
    """
    run = desk.known_run()
    head = run.history.head
    if not 0 <= to <= head:
        raise SphereEditError(
            f"there is no batch {to} to go back to: this run stands at batch {head}, so 0 to {head} exist"
        )
    found, known = run.history.back_to(to), run.facts()
    said = [f"Go back to {'the unedited model' if to == 0 else f'after batch {to}'}?"]
    said.append(
        f"Taken back, bit for bit: {counted(len(found.batches), 'batch')}. Withdrawn: {counted(len(found.withdrawn), 'fact')}."
    )
    said += _listed([f"{index}: {named(known[index])}" for index in found.withdrawn])
    if found.again:
        said += ["These stand again:", *_listed([f"{index}: {named(known[index])}" for index in found.again])]
    return visible("\n".join(said), keep="\n")


def taking_back(desk: Desk, fact: int) -> str:
    """What a removal would do, in sentences.

    Raises:
        SphereEditError: the fact does not stand.
    """
    run = desk.known_run()
    known = run.facts()
    gone = with_superseded(run.history, known, chosen(run.history, known, [fact]))
    said = [
        "Take this back? Its prompt is to give the unedited model's answer again; the other facts stay.",
        *_listed([f"{index}: {named(known[index])}" for index in gone]),
    ]
    if len(gone) > 1:
        said.append("A fact that superseded another one takes that one with it.")
    return visible("\n".join(said), keep="\n")


def _listed(names: Sequence[str]) -> list[str]:
    more = [f"  and {len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return [f"  {name}" for name in names[:_NAMED]] + more
