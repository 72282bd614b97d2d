"""Holes in the C library's heap, handed back to the system."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any


def give_back() -> None:
    """Let the system have pages of this process's heap that nothing lies on; other C libraries than glibc are left to themselves.

    glibc takes a tensor of less than 32 MB from its heap, and keeps the heap as long as anything lies above the hole
    (docs/performance.md). What is handed back costs a page fault when it is used again.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # musl
        return None
