"""Holes in the C library's heap, handed back to the system."""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

GROWN = 128 << 20  # bytes that a process may grow by before its holes are handed back, between two parts of some work
_SECONDS = 15e-9  # of CPU time between two such times, for each byte grown by: twenty times what its page faults take


def give_back() -> None:
    """Let the system have pages of this process's heap that nothing lies on; other C libraries than glibc are left to themselves.

    glibc takes a tensor of less than 32 MB from its heap, and keeps the heap as long as anything lies above the hole
    (docs/performance.md). What is handed back costs a page fault when it is used again.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


def resident() -> int | None:
    """Bytes of memory that this process holds at present; None where the system does not tell."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


class Holes:
    """Gives them back once a process has grown by `GROWN`, and so seldom that it costs a twentieth of the time at most.

    Work is cut into parts of a bounded size, and what a part has held is a hole when it is done. The next part, of another shape, does
    not fit into it, so that the heap would grow from part to part.
    """

    def __init__(self) -> None:
        self._least, self._last = 0, -math.inf  # held since they were last given back, and when that was

    def part_done(self) -> bool:
        """Look at what is held, now that a part of some work is done. Returns whether holes were given back."""
        held, now = resident(), time.process_time()
        if held is None:
            return False
        grown = held - self._least
        due = grown > GROWN and now - self._last > grown * _SECONDS
        if due:
            give_back()
            held, self._last = resident() or held, now
        self._least = held if due else min(held, self._least)
        return due


HOLES = Holes()  # of this process, which has one heap


@cache
def _trim() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # musl
        return None
