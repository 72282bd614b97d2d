"""Published settings of the models that papers report on, chosen by what a model is and never by what it is called."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml


@dataclass(frozen=True)
class Preset:
    """The published settings of one model, by method; they come before anything a user sets."""

    name: str
    model: dict[str, Any]  # what its config says
    methods: dict[str, dict[str, Any]]

    def fits(self, config: Any) -> bool:
        """Whether a transformers config describes this model."""
        return all(getattr(config, key, None) == value for key, value in self.model.items())


@cache
def presets() -> tuple[Preset, ...]:
    """All of them, from ``data/presets.yaml``."""
    rows = yaml.safe_load((files("sphere_edit") / "data" / "presets.yaml").read_text("utf-8"))
    return tuple(
        Preset(
            row["name"],
            row["model"],
            {method: group["settings"] for group in row["methods"] for method in group["names"]},
        )
        for row in rows
    )


def preset_of(config: Any, method: str) -> Preset | None:
    """The preset for a model, by its transformers ``config``, that says something of ``method``."""
    return next((preset for preset in presets() if preset.fits(config) and method in preset.methods), None)
