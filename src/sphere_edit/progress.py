"""Progress and messages: one small interface, silent or drawn with rich."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from sphere_edit.counting import counted, several
from sphere_edit.text import Screen, terminal, visible

Advance = Callable[[float], None]
_EVERY = 60  # seconds between lines of a long task where no bar is drawn, as in a log


class Reporter(Protocol):
    """Where long work says how far it is."""

    def say(self, text: str, style: str = "") -> None:
        """One line for the user, as it is: no markup in it."""

    def bar(self, title: str, total: float, unit: str) -> AbstractContextManager[Advance]:
        """A bar over ``total`` units, of which ``unit`` names one, as in "fact"; the context's value advances it."""


class Quiet:
    """Says nothing."""

    def say(self, text: str, style: str = "") -> None:
        """Say nothing."""

    @contextmanager
    def bar(self, title: str, total: float, unit: str) -> Iterator[Advance]:
        """Draw nothing."""
        yield lambda amount: None


class Once:
    """Passes everything on to another reporter, but no sentence twice.

    A sentence is a line that is not indented and has no style: it tells of what was given, the facts and the model, which several runs may
    share. What runs tell of themselves, headings, steps and warnings, is said each time.
    """

    def __init__(self, reporter: Reporter):
        self._reporter = reporter
        self._said: set[str] = set()

    def say(self, text: str, style: str = "") -> None:
        """One line, if it is not a sentence that was said before."""
        sentence = not style and not text.startswith(" ")
        if sentence and text in self._said:
            return
        self._said.add(text)
        self._reporter.say(text, style)

    def bar(self, title: str, total: float, unit: str) -> AbstractContextManager[Advance]:
        """The other's bar."""
        return self._reporter.bar(title, total, unit)


def duration(seconds: float) -> str:
    """How long something takes, in the unit one would say it in."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return terminal(f"{speed:,.1f} {several(0, task.fields['unit'])}/s" if speed else "", "dim")


class RichReporter:
    """Bars with rate and time left on a terminal; one line a finished task everywhere."""

    def __init__(self, console: Console | None = None):
        self.console = console or Screen(stderr=True)

    def say(self, text: str, style: str = "") -> None:
        """Print one line."""
        self.console.print(terminal(text, style))

    @contextmanager
    def bar(self, title: str, total: float, unit: str) -> Iterator[Advance]:
        """Draw a bar while the work runs, and leave a line with amount, time and rate; where no bar is seen, a line a minute."""
        started = told = time.monotonic()
        columns = (
            TextColumn("  {task.description:<28}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[units]}", markup=False),
            _Rate(),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            number = progress.add_task(visible(title), total=total, unit=unit, units=several(int(total), unit))
            task = progress.tasks[0]

            def advance(amount: float) -> None:
                nonlocal told
                progress.advance(number, amount)
                now = time.monotonic()
                if progress.disable and now - told >= _EVERY and 0 < task.completed < total:
                    told = now
                    left = duration((now - started) * (total / task.completed - 1))
                    self.say(f"  {title:<28} {task.completed:>9,.0f} of {counted(int(total), unit)}, about {left} left")

            yield advance
            done = task.completed
        seconds = time.monotonic() - started
        rate = f"{done / seconds:,.1f} {several(0, unit)}/s" if seconds > 0.05 else ""
        line = terminal(f"  {title:<28} {done:>9,.0f} {several(int(done), unit):<7} {seconds:6.1f} s  ")
        self.console.print(line.append(rate, "dim"))
