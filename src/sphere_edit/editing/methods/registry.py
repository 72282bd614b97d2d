"""The table of editing methods, and how a method from outside the package comes into it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from sphere_edit.editing.ingredients import Ingredient, Needs
from sphere_edit.editing.methods.base import JointMethod, LayerwiseMethod, Method
from sphere_edit.editing.sources import Source
from sphere_edit.editing.targets import TargetSettings
from sphere_edit.errors import SphereEditError
from sphere_edit.facts.shapes import FORMATS
from sphere_edit.numerics.projection import Sphere
from sphere_edit.plugins import installed, run_file

METHODS: dict[str, type[Method]] = {}  # filled by the package's own methods on import, and by `register_method`

_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_DEPTHS = (1, 2, 12, 32, 100)  # of models for which the default layers are tried

Kind = TypeVar("Kind")


def register_method(kind: Kind) -> Kind:
    """Make a method known to every command; to be used as a class's decorator.

        @register_method
        class Mine(LayerwiseMethod):
            "…"

    The same class once more, as when a file or a notebook cell is run again, takes the place of the first.

    Args:
        kind: a class derived from `LayerwiseMethod` or `JointMethod`, or from one of the methods.

    Raises:
        SphereEditError: it is no method, or something about it could not work; in a sentence.
    """
    label = getattr(kind, "__qualname__", repr(kind))
    if not (isinstance(kind, type) and issubclass(kind, (LayerwiseMethod, JointMethod))):
        raise SphereEditError(
            f"{label} is no editing method: expected a class derived from LayerwiseMethod or JointMethod"
        )
    if (why := _what_it_lacks(kind) or _what_clashes(kind) or _what_fails(kind)) is not None:
        raise SphereEditError(f"{label} cannot be registered as a method: {why}")
    METHODS[kind.name] = kind
    return kind


def register_file(path: Path) -> list[str]:
    """Run a file that registers methods or formats, because the user named it; the methods' names.

    Raises:
        SphereEditError: it does not run, or registers nothing.
    """
    module = run_file(path)
    names = [name for name, kind in METHODS.items() if kind.__module__ == module.__name__]
    if not names and module.__name__ not in {place for place, _ in FORMATS}:
        raise SphereEditError(
            f"the plugin {path} registers nothing: put @register_method before a method's class, or @register_format(…) before a "
            "function that reads a record"
        )
    return names


def register_installed() -> None:
    """Register what installed packages offer.

    Raises:
        SphereEditError: one of them cannot be imported or registered.
    """
    for origin, kind in installed():
        try:
            register_method(kind)
        except SphereEditError as error:
            raise SphereEditError(f"{origin}: {error}") from None


def make_method(name: str, options: dict[str, Any]) -> Method:
    """The method ``name`` with its hyperparameters; unknown names and values are told as such."""
    if name not in METHODS:
        register_installed()
    if name not in METHODS:
        raise SphereEditError(
            f"there is no method '{name}'; choose one of {', '.join(METHODS)}. One from elsewhere needs its code: name the file, "
            "sphere-edit --plugin FILE.py COMMAND …, or install its package"
        )
    kind = METHODS[name]
    try:
        return kind(**options)
    except ValidationError as error:
        first = error.errors()[0]
        fields = ", ".join(kind.model_fields)
        where = ".".join(map(str, first["loc"]))
        raise SphereEditError(f"{name}: option '{where}': {first['msg']} (options: {fields})") from None


def _what_it_lacks(kind: type[Method]) -> str | None:
    """What is missing of what every method says about itself."""
    if inspect.isabstract(kind):
        return f"it leaves out {', '.join(sorted(kind.__abstractmethods__))}"
    name, paper = getattr(kind, "name", None), getattr(kind, "paper", None)
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        return f"'name: ClassVar[str]' must be a word of small letters, digits, - and _, such as 'mine', not {name!r}"
    if not (isinstance(paper, str) and paper):
        return "'paper: ClassVar[str]' must say where it comes from, in any words"
    if not isinstance(getattr(kind, "sphere", None), Sphere):
        return "'sphere: ClassVar[Sphere]' must be the Sphere that goes with it by default, such as Sphere()"
    if not kind.__doc__:
        return "it has no docstring, whose first sentence is what `sphere-edit methods` says of it"
    return None


def _what_clashes(kind: type[Method]) -> str | None:
    """What has its name already."""
    known = METHODS.get(kind.name)
    if known is not None and not _same(known, kind):
        return (
            f"there is a method '{kind.name}' already ({known.__module__}.{known.__qualname__}); give it another name"
        )
    return None


def _what_fails(kind: type[Method]) -> str | None:
    """What does not work of the method with its default options."""
    try:
        method = kind()
        TargetSettings(**kind.targets)
        needs = method.needs
    except ValidationError as error:
        first = error.errors()[0]
        return f"its defaults do not work: '{'.'.join(map(str, first['loc']))}': {first['msg']}"
    except SphereEditError as error:
        return str(error)
    if not isinstance(needs, Needs):
        return f"'needs' must be Needs(feed, ingredients), not {needs!r}"
    asked = "objective" if isinstance(method, JointMethod) else "layer"
    if getattr(needs.feed.source, asked) is getattr(Source, asked):
        shape = "moves all matrices at once" if isinstance(method, JointMethod) else "solves one matrix after another"
        return f"it {shape}, and {type(needs.feed).__name__} makes no problems of that kind"
    if method.forgets and "keys" not in [row.name for row in needs.ingredients]:
        return "it has 'forget', which is asked with earlier keys, so its needs must name EarlierKeys()"
    for row in needs.ingredients:
        if (why := _what_fails_of(row)) is not None:
            return why
    if bad := [depth for depth in _DEPTHS if not _in_model(kind.default_layers(depth), depth)]:
        return f"'default_layers' gives {list(kind.default_layers(bad[0]))} for a model of {bad[0]} layers"
    return None


def _what_fails_of(row: object) -> str | None:
    """What is wrong with an ingredient: what it is, or that another one has its name."""
    if not isinstance(row, Ingredient):
        return f"an ingredient must be derived from Ingredient, not {row!r}"
    name, words = getattr(row, "name", None), getattr(row, "words", None)
    if not (isinstance(name, str) and _NAME.fullmatch(name) and isinstance(words, str) and words):
        return (
            f"the ingredient {type(row).__qualname__} needs a 'name', a word of small letters, and 'words' for people"
        )
    known = [other for kind in METHODS.values() for other in kind().needs.ingredients if other.name == name]
    if known and not _same(type(known[0]), type(row)):
        return f"there is an ingredient '{name}' already ({type(known[0]).__module__}.{type(known[0]).__qualname__})"
    return None


def _in_model(layers: tuple[int, ...], depth: int) -> bool:
    return len(layers) > 0 and all(0 <= layer < depth for layer in layers)


def _same(one: type, other: type) -> bool:
    """Whether one class is the other, or the same place's code run again."""
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)
