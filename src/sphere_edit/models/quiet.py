"""Keeps what transformers has to say off the screen, in the thread that asks for it and in no other."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' remarks about a model's metadata, and the bars it cannot turn off, off the user's screen.

    Only what this thread writes to stderr or logs below an error is dropped: other threads, quiet or not, are not touched.
    """
    _SILENCE.begin()
    try:
        yield
    finally:
        _SILENCE.end()


class _Silence:
    """Who is quiet at present, and what stands in for stderr as long as anybody is.

    stderr and the log belong to the whole process, so they are changed by the first quiet thread and put back by the last.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = 0  # quiet blocks in all threads
        self._here = threading.local()  # and in this one
        self._stand_in: _StandIn | None = None

    def begin(self) -> None:
        """This thread is quiet from now on."""
        with self._lock:
            if not self._open:
                self._stand_in = _StandIn(sys.stderr, self)
                sys.stderr = self._stand_in
            for handler in _handlers():
                handler.addFilter(self)  # does nothing where it is one already
            self._open += 1
        self._here.blocks = self.blocks + 1

    def end(self) -> None:
        """As `begin` found it."""
        self._here.blocks = self.blocks - 1
        with self._lock:
            self._open -= 1
            if self._open:
                return
            for handler in _handlers():
                handler.removeFilter(self)
            # whoever put something else in its place meanwhile puts back what he found, which lets everything through by then
            if self._stand_in is not None and sys.stderr is self._stand_in:
                sys.stderr = self._stand_in.stream

    @property
    def blocks(self) -> int:
        """How many quiet blocks this thread stands in."""
        return getattr(self._here, "blocks", 0)

    def filter(self, record: logging.LogRecord) -> bool:
        """A filter of the logging module: whether a record is let through."""
        return not self.blocks or record.levelno >= logging.ERROR


class _StandIn:
    """A stream that drops what quiet threads write; everything else is the stream's own."""

    def __init__(self, stream: TextIO, silence: _Silence):
        self.stream, self._silence = stream, silence

    def write(self, text: str) -> int:
        """As a stream's."""
        return len(text) if self._silence.blocks else self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _handlers() -> list[logging.Handler]:
    """transformers' own, and the process's where its records go there too."""
    logger = logging.getLogger("transformers")
    return [*logger.handlers, *(logging.getLogger().handlers if logger.propagate else ())]


_SILENCE = _Silence()
