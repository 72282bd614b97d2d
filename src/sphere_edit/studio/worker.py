"""One thing at a time: jobs in a queue, the thread that does them, and what they say of themselves meanwhile."""

from __future__ import annotations

import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition, Event, Thread
from typing import Any

from sphere_edit.errors import SphereEditError
from sphere_edit.progress import Advance, Reporter

_LINES = 60  # that are kept of what a job says
_ROOM = 100  # jobs that may wait


@dataclass
class Bar:
    """Work that knows its end."""

    title: str
    total: float
    unit: str
    done: float = 0.0
    began: float = field(default_factory=time.monotonic)

    @property
    def rate(self) -> float:
        """Units a second; 0 before there are any."""
        seconds = time.monotonic() - self.began
        return self.done / seconds if seconds > 0 else 0.0

    @property
    def left(self) -> float | None:
        """Seconds to the end at this rate; None before there is one."""
        return (self.total - self.done) / self.rate if self.rate else None


class Live:
    """A reporter whose lines and bars can be looked at from elsewhere; another one gets them too."""

    def __init__(self, also: Reporter):
        self.also, self.muted = also, False
        self.lines: deque[str] = deque(maxlen=_LINES)
        self.bars: list[Bar] = []

    def say(self, text: str, style: str = "") -> None:
        """Keep a line."""
        if not self.muted:
            self.lines.append(text)
            self.also.say(text, style)

    @contextmanager
    def bar(self, title: str, total: float, unit: str) -> Iterator[Advance]:
        """Keep a bar while its work runs."""
        bar = Bar(title, total, unit)
        self.bars.append(bar)
        try:
            with self.also.bar(title, total, unit) as advance:

                def both(amount: float) -> None:
                    bar.done += amount
                    advance(amount)

                yield both
        finally:
            self.bars.remove(bar)


@dataclass
class Job:
    """Something to be done.

    Attributes:
        writes: whether it changes the run or the model; only one such job may be at work or wait.
        error: what went wrong, in a sentence.
    """

    title: str
    work: Callable[[], Any]
    writes: bool
    over: Event = field(default_factory=Event)
    result: Any = None
    error: str = ""

    def do(self) -> None:
        """Do it; whatever goes wrong is kept as a sentence, and what nobody foresaw is shown on the terminal too."""
        try:
            self.result = self.work()
        except SphereEditError as error:
            self.error = str(error)
        except Exception as error:  # the page must go on
            traceback.print_exc(file=sys.stderr)
            self.error = f"{self.title} failed ({type(error).__name__}: {error}); the terminal has more"
        finally:
            self.over.set()


class Worker:
    """Does jobs, one after another, in a thread of its own."""

    def __init__(self, live: Live):
        self.live, self.done = live, 0
        self.current: Job | None = None
        self.last: Job | None = None  # that is over, of those that write
        self._waiting: deque[Job] = deque()
        self._changed = Condition()
        Thread(target=self._run, name="studio", daemon=True).start()

    def submit(self, title: str, work: Callable[[], Any], writes: bool = False) -> Job:
        """Put a job at the queue's end.

        Raises:
            SphereEditError: it writes, and so does another one that is not over; or too many wait.
        """
        job = Job(title, work, writes)
        with self._changed:
            other = next((one for one in (self.current, *self._waiting) if one is not None and one.writes), None)
            if writes and other is not None:
                raise SphereEditError(
                    f"'{other.title}' is at work, here or in another tab; wait for it, or stop it first"
                )
            if len(self._waiting) >= _ROOM:
                raise SphereEditError(f"{_ROOM} questions wait already; come back when some are answered")
            self._waiting.append(job)
            self._changed.notify()
        return job

    def before(self, job: Job) -> list[str]:
        """What is done before a job that waits, in order; nothing for one at work."""
        with self._changed:
            waiting = list(self._waiting)
            if job not in waiting:
                return []
            ahead = waiting[: waiting.index(job)]
            return [one.title for one in ([] if self.current is None else [self.current]) + ahead]

    def queue(self) -> list[str]:
        """What waits, in order."""
        with self._changed:
            return [job.title for job in self._waiting]

    @property
    def writing(self) -> bool:
        """Whether a job that writes is at work or waits."""
        with self._changed:
            return any(job is not None and job.writes for job in (self.current, *self._waiting))

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                self.current = job = self._waiting.popleft()
            if job.writes:
                self.live.lines.clear()
            job.do()
            with self._changed:
                self.current, self.done = None, self.done + 1
                self.last = job if job.writes else self.last
