"""The editing methods, one short file each, and the one table that lists them (`registry`)."""

from __future__ import annotations

from sphere_edit.editing.methods.alphaedit import AlphaEdit
from sphere_edit.editing.methods.base import Method
from sphere_edit.editing.methods.emmet import Emmet
from sphere_edit.editing.methods.encore import Encore
from sphere_edit.editing.methods.frugal import Frugal
from sphere_edit.editing.methods.ft import FineTune
from sphere_edit.editing.methods.locft import LocFineTune
from sphere_edit.editing.methods.lyaplock import LyapLock
from sphere_edit.editing.methods.memit import Memit, MemitSeq
from sphere_edit.editing.methods.nas import Nas
from sphere_edit.editing.methods.prune import Prune
from sphere_edit.editing.methods.rect import Rect
from sphere_edit.editing.methods.registry import (
    METHODS,
    make_method,
    register_file,
    register_installed,
    register_method,
)
from sphere_edit.editing.methods.revive import Revive
from sphere_edit.editing.methods.rome import Rome
from sphere_edit.editing.methods.ultraedit import UltraEdit
from sphere_edit.editing.methods.unedited import Unedited

METHODS.update(
    {
        method.name: method
        for method in (
            *(AlphaEdit, Memit, MemitSeq, Emmet, Rect, Prune, Rome, FineTune, UltraEdit),
            *(Encore, LyapLock, Nas, Revive, Frugal, LocFineTune, Unedited),
        )
    }
)

__all__ = ["METHODS", "Method", "make_method", "register_file", "register_installed", "register_method"]
