"""The editing methods, one short file each, and the one table that lists them."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from sphere_edit.editing.methods.alphaedit import AlphaEdit
from sphere_edit.editing.methods.base import Method
from sphere_edit.editing.methods.emmet import Emmet
from sphere_edit.editing.methods.encore import Encore
from sphere_edit.editing.methods.frugal import Frugal
from sphere_edit.editing.methods.ft import FineTune
from sphere_edit.editing.methods.lyaplock import LyapLock
from sphere_edit.editing.methods.memit import Memit, MemitSeq
from sphere_edit.editing.methods.nas import Nas
from sphere_edit.editing.methods.prune import Prune
from sphere_edit.editing.methods.rect import Rect
from sphere_edit.editing.methods.revive import Revive
from sphere_edit.editing.methods.rome import Rome
from sphere_edit.editing.methods.ultraedit import UltraEdit
from sphere_edit.errors import SphereEditError

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        *(AlphaEdit, Memit, MemitSeq, Emmet, Rect, Prune, Rome, FineTune, UltraEdit),
        *(Encore, LyapLock, Nas, Revive, Frugal),
    )
}


def make_method(name: str, options: dict[str, Any]) -> Method:
    """The method ``name`` with its hyperparameters; unknown names and values are told as such."""
    if name not in METHODS:
        raise SphereEditError(f"there is no method '{name}'; choose one of {', '.join(METHODS)}")
    kind = METHODS[name]
    try:
        return kind(**options)
    except ValidationError as error:
        first = error.errors()[0]
        fields = ", ".join(kind.model_fields)
        where = ".".join(map(str, first["loc"]))
        raise SphereEditError(f"{name}: option '{where}': {first['msg']} (options: {fields})") from None


__all__ = ["METHODS", "Method", "make_method"]
