"""The editing methods as tables: what each needs, its hyperparameters, its source; and the models with presets."""

from __future__ import annotations

from rich.table import Table

from sphere_edit.editing.methods import METHODS, register_installed
from sphere_edit.editing.methods.base import Method
from sphere_edit.editing.presets import presets
from sphere_edit.reporting.results import make_table


def method_tables() -> list[Table]:
    """What ``sphere-edit methods`` prints."""
    register_installed()
    listed = _left("Methods", "method", "what it does", "needs", "edits by default", "with SPHERE")
    options = _left("Options (options: {…} in a settings file)", "method", "option", "default", "meaning")
    papers = _left("Sources", "method", "source")
    known = _left("Models with settings of their own, taken unless you set others", "model", "recognised by", "methods")
    for name, kind in METHODS.items():
        method = kind()
        listed.add_row(
            name,
            _summary(kind),
            ", ".join([method.needs.feed.words, *(row.words for row in method.needs.ingredients)]),
            _edits(kind),
            _sphere(kind),
        )
        for field, about in kind.model_fields.items():
            default = getattr(method, field)
            options.add_row(name, field, _plain(getattr(default, "value", default)), about.description or "")
        papers.add_row(name, kind.paper)
    for preset in presets():
        shape = ", ".join(f"{key} {value}" for key, value in preset.model.items())
        known.add_row(preset.name, shape, ", ".join(preset.methods))
    return [listed, options, papers, known]


def _left(title: str, *columns: str) -> Table:
    return make_table(title, *columns, left=columns)


def _summary(kind: type[Method]) -> str:
    """The first sentence of the docstring, which is the method's equation or its idea."""
    first = (kind.__doc__ or "").split("\n\n")[0].split("\n    Source")[0]
    return " ".join(first.replace("``", "").split())


def _edits(kind: type[Method]) -> str:
    layers = kind.default_layers(32)
    span = str(layers[0]) if len(layers) == 1 else f"{layers[0]}–{layers[-1]}"
    return f"{' and '.join(kind.roles[0])}, {'layer' if len(layers) == 1 else 'layers'} {span} of 32"


def _sphere(kind: type[Method]) -> str:
    sphere = kind.sphere
    return f"η {sphere.eta}, α {sphere.alpha}, {sphere.basis}, {sphere.project}"


def _plain(value: object) -> str:
    if value is None:
        return "off"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
