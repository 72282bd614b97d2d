"""Every setting of a run, with its default, its meaning and its limits; what YAML files and the command line set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sphere_edit.editing.methods import Method, make_method
from sphere_edit.editing.moments import MomentSettings
from sphere_edit.editing.sources import TargetSettings
from sphere_edit.errors import SphereEditError
from sphere_edit.models.architecture import Architecture
from sphere_edit.numerics.projection import Sphere


class SphereSettings(BaseModel):
    """SPHERE on or off; what is None is the method's published default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    enabled: bool = True
    eta: float | None = Field(None, ge=0, le=1)
    alpha: float | None = Field(None, ge=0, le=1)
    basis: str | None = None
    project: str | None = None

    def resolved(self, default: Sphere) -> Sphere:
        """The projection, with the method's defaults where nothing was said."""
        chosen = {name: getattr(self, name) for name in ("eta", "alpha", "basis", "project")}
        try:
            return Sphere(
                **{**default.model_dump(), **{name: value for name, value in chosen.items() if value is not None}}
            )
        except ValidationError as error:
            raise SphereEditError(_first_error("sphere", error)) from None


class Settings(BaseModel):
    """How a run edits. Every option of the command line and of a YAML file is a field here."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: str = Field("alphaedit", description="editing method")
    options: dict[str, Any] = Field(default_factory=dict, description="the method's own hyperparameters")
    sphere: SphereSettings = SphereSettings()
    layers: tuple[int, ...] | None = Field(None, description="edited layers; five from 13 % of the depth by default")
    batch_size: int = Field(100, ge=1, description="facts in one batch")
    targets: TargetSettings = TargetSettings()
    templates: int = Field(1, ge=0, description="context templates sampled for each of five openers")
    moments: MomentSettings = MomentSettings()
    eval_every: int | None = Field(None, ge=1, description="evaluate after every N batches too, not only at the end")
    tokens_per_batch: int = Field(4096, ge=16, description="tokens in one forward pass; changes speed and rounding")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the sampled templates and text")
    dtype: str = Field("auto", description="float32, bfloat16, float16, or the checkpoint's own")
    device: str = Field("auto", description="a PyTorch device, or the one that is there")

    def make_method(self) -> Method:
        """The editing method with its options."""
        return make_method(self.method, self.options)

    def make_sphere(self) -> Sphere | None:
        """The projection, or None for the plain method."""
        return self.sphere.resolved(self.make_method().sphere) if self.sphere.enabled else None

    def diagnostic_sphere(self) -> Sphere:
        """The projection whose directions are reported, for the plain method too."""
        return self.sphere.resolved(self.make_method().sphere)

    def with_resolved(self, layers: tuple[int, ...]) -> Settings:
        """These settings with every default spelled out, so that a run keeps them whatever later versions default to."""
        sphere = self.sphere.model_copy(update=self.diagnostic_sphere().model_dump())
        options = self.make_method().model_dump(mode="json")
        return self.model_copy(update={"layers": layers, "sphere": sphere, "options": options})

    def resolved_layers(self, architecture: Architecture, depth: int) -> tuple[int, ...]:
        """The edited layers, lowest first.

        Raises:
            SphereEditError: layers that do not exist or repeat, or several where the family can take one.
        """
        layers = default_layers(architecture, depth) if self.layers is None else tuple(sorted(self.layers))
        if len(set(layers)) != len(layers) or not layers:
            raise SphereEditError(f"--layers takes different layer numbers, not {list(layers)}")
        if layers[0] < 0 or layers[-1] >= depth:
            raise SphereEditError(f"layers {list(layers)} do not all exist: this model has layers 0 to {depth - 1}")
        if architecture.post_norm and len(layers) > 1:
            raise SphereEditError(
                f"this family normalises each MLP's output, so one layer is edited and not {len(layers)}: no other layer "
                f"can reach the place of the target; use --layers {layers[-1]}"
            )
        return layers


def default_layers(architecture: Architecture, depth: int) -> tuple[int, ...]:
    """Five layers from 13 % of the depth (4–8 of 30), fewer in a shallow model; the last of them for a post-norm one."""
    first = min(int(0.13 * depth + 0.5), depth - 1)
    layers = tuple(range(first, max(first + 1, min(first + 5, depth - 1))))
    return layers[-1:] if architecture.post_norm else layers


def make_settings(*layers: dict[str, Any]) -> Settings:
    """Settings from nested dictionaries, later ones winning.

    Raises:
        SphereEditError: an unknown name or an impossible value, in one line.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merged(merged, layer)
    try:
        settings = Settings.model_validate(merged)
    except ValidationError as error:
        raise SphereEditError(_first_error("settings", error)) from None
    settings.diagnostic_sphere()
    return settings


def read_settings_file(path: Path) -> dict[str, Any]:
    """A YAML file of settings as a dictionary."""
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SphereEditError(f"settings file {path} cannot be read: {error}") from None
    except Exception as error:  # besides YAMLError, whatever the library's constructors stumble over
        raise SphereEditError(f"settings file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SphereEditError(f"settings file {path}: expected names and values, found {type(content).__name__}")
    return content


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for name, value in over.items():
        nested = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = _merged(result[name], value) if nested else value
    return result


def _first_error(what: str, error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"{what}: there is no setting '{name}'"
    return f"{what}: '{name}': {first['msg']}, not {first['input']!r}"
