"""Holes in the C library's heap, handed back to the system."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any


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


@cache
def _trim() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # musl
        return None
