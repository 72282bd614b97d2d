"""Settings that come with a model: published ones, chosen by what it is and never by what it is called, or those found by tuning."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from sphere_edit.files import cache_dir


@dataclass(frozen=True)
class Preset:
    """The known settings of one model, by method; they come before anything a user sets."""

    name: str
    model: dict[str, Any]  # what its config says
    methods: dict[str, dict[str, Any]]
    origin: str = "published"  # or chosen: found here

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
            row.get("origin", "published"),
        )
        for row in rows
    )


def preset_of(config: Any, method: str) -> Preset | None:
    """The preset for a model, by its transformers ``config``, that says something of ``method``."""
    return next((preset for preset in presets() if preset.fits(config) and method in preset.methods), None)


def tuned_file(fingerprint: str, method: str) -> Path:
    """Where the settings that ``sphere-edit tune`` found for a model, known by the hash of its weights, are kept."""
    return cache_dir() / "tuned" / f"{fingerprint[:32]}-{method}.json"


def read_tuned(fingerprint: str, method: str) -> dict[str, Any] | None:
    """The settings found for this model and method, if it was ever tuned on this machine."""
    try:
        found: dict[str, Any] = json.loads(tuned_file(fingerprint, method).read_text("utf-8"))["settings"]
    except (OSError, ValueError, KeyError):  # never tuned, or damaged
        return None
    return found
