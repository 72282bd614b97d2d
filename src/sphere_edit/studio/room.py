"""What the page's handlers share: the desk, once it is there, and how its answers and mistakes reach the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import gradio as gr

from sphere_edit.errors import SphereEditError
from sphere_edit.text import html

if TYPE_CHECKING:
    from types import ModuleType

    from sphere_edit.studio.desk import Desk
    from sphere_edit.studio.worker import Job

_LOOK = 0.25  # seconds between two looks at a job


class Room:
    """Makes the desk in the background, so that the page is there before the libraries that it needs."""

    def __init__(self, make: Callable[[], Desk]):
        self._desk: Future[Desk] = ThreadPoolExecutor(1, "desk").submit(make)

    @property
    def ready(self) -> bool:
        """Whether the desk is there, or could not be made."""
        return self._desk.done()

    @property
    def desk(self) -> Desk:
        """The desk, waited for."""
        return self._desk.result()

    @property
    def look(self) -> ModuleType:
        """`sphere_edit.studio.look`, which is as slow to import as the desk."""
        from sphere_edit.studio import look

        return look

    def tell(self, work: Callable[..., Any], outputs: int) -> Callable[..., Any]:
        """A handler whose first output is a notice: empty, or a mistake as a sentence; ``work`` gives the others, in a tuple."""

        def handler(*values: Any) -> Any:
            try:
                return ["", *(work(*values) or skipped(outputs))]
            except SphereEditError as error:
                return [mistake(str(error)), *skipped(outputs)]

        return handler

    def wait(
        self, start: Callable[..., Job | None], show: Callable[[Any], Any], outputs: int, quiet: bool = False
    ) -> Callable[..., Iterator[Any]]:
        """The same for a job: meanwhile the notice says what is before it; what it came to is shown (``quiet``: without mistakes)."""

        def handler(*values: Any) -> Iterator[Any]:
            try:
                job = start(*values)
                if job is None:
                    yield ["", *skipped(outputs)]
                    return
                while not job.over.wait(_LOOK):
                    yield [waiting(self.desk.worker.before(job), job.title), *skipped(outputs)]
                if job.error:
                    raise SphereEditError(job.error)
                yield ["", *show(job.result)]
            except SphereEditError as error:
                yield ["" if quiet else mistake(str(error)), *skipped(outputs)]

        return handler


def whole(value: object, what: str) -> int | None:
    """A whole number as somebody typed it; None where nothing was.

    Raises:
        SphereEditError: it is none.
    """
    text = "" if value is None else str(value).strip()
    if text and not text.isdecimal():
        raise SphereEditError(f"{what} is a whole number, not '{text[:40]}'")
    return int(text[:18]) if text else None


def skipped(count: int) -> list[Any]:
    """Outputs that stay as they are."""
    return [gr.skip() for _ in range(count)]


def mistake(text: str) -> str:
    """A sentence about what cannot be done."""
    return f"<p class='mistake' role='alert'>{lines(text)}</p>"


def good(text: str) -> str:
    """A sentence about what was done."""
    return f"<p class='good' role='status'>{lines(text)}</p>"


def waiting(before: list[str], title: str) -> str:
    """Where a job stands in the queue."""
    said = f"number {len(before)} in the queue, behind {'; '.join(before)}" if before else "at work"
    return f"<p class='waits' role='status'>{html(title)}: {html(said)}</p>"


def lines(text: str) -> str:
    """Foreign text of several lines as HTML."""
    return "<br>".join(html(line) for line in text.split("\n"))


def grid(found: Any, **more: Any) -> Any:
    """Headers and rows for a table of the page."""
    headers, rows = found
    return gr.update(value={"headers": headers, "data": rows}, **more)
