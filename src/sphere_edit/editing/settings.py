"""Every setting of a run, with its default, its meaning and its limits; what YAML files and the command line set."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sphere_edit.editing.methods import Method, make_method
from sphere_edit.editing.moments import MomentSettings
from sphere_edit.editing.presets import preset_of, read_tuned
from sphere_edit.editing.targets import TargetSettings
from sphere_edit.errors import SphereEditError
from sphere_edit.facts.fact import BadRecord, Form, chosen_forms, short
from sphere_edit.files import yaml_value
from sphere_edit.models.architecture import EXPERTS, WRITERS, Architecture
from sphere_edit.models.placement import Placement
from sphere_edit.numerics.projection import Sphere

Matrix = tuple[int, str]  # layer and role
PLACES = ("device", "device_map", "max_memory")  # the settings that may be others when a run goes on


class SphereSettings(BaseModel):
    """SPHERE on or off; what is None is the method's published default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    enabled: bool = Field(True, description="whether updates are projected at all")
    eta: float | None = Field(None, ge=0, le=1, description="η, the share of the neurons' spectrum that is principal")
    alpha: float | None = Field(None, ge=0, le=1, description="α, how much of the update along it is taken away")
    basis: str | None = Field(None, description="whose directions: 'current' weights, or 'pretrained' ones")
    project: str | None = Field(None, description="when: 'per_layer', 'after_all', or 'deployed'")

    def resolved(self, default: Sphere) -> Sphere:
        """The projection, with the method's defaults where nothing was said."""
        chosen = {name: getattr(self, name) for name in ("eta", "alpha", "basis", "project")}
        try:
            return Sphere(
                **{**default.model_dump(), **{name: value for name, value in chosen.items() if value is not None}}
            )
        except ValidationError as error:
            raise SphereEditError(first_error("sphere", error)) from None


class EvaluationSettings(BaseModel):
    """What a run measures beside facts and held-out text, and when: before the first batch, after the last, at checkpoints."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    every: int | None = Field(None, ge=1, description="evaluate after every N batches too, not only at the end")
    sample: int | None = Field(
        None, ge=1, description="at those checkpoints only so many past facts, a fixed random sample; all at the end"
    )
    generation: Literal["plain", "chat", "off"] = Field(
        "plain", description="at the end, what the model says after each prompt: as it is, or as a message in a chat"
    )
    natural: int = Field(
        0,
        ge=0,
        description="at the end, let the model go on for up to so many tokens after each prompt that an edit is to change, until it stops by "
        "itself: exact match and ROUGE-L of the whole line",
    )
    retrieval: int = Field(
        0,
        ge=0,
        description="put so many facts, found by BM25, before each prompt: for a row without editing (method none)",
    )
    texts: int = Field(0, ge=0, description="at the end, let it write about so many facts (fluency, consistency)")
    references: str | None = Field(None, description="texts (.txt, .jsonl) that say what is said of the new answers")
    tasks: tuple[str, ...] = Field((), description="general ability: tasks of lm-evaluation-harness")
    task_dir: str | None = Field(None, description="folder with task definitions, or data of the tasks that ship")
    task_limit: int | None = Field(None, ge=1, description="so many documents of each task")
    tasks_every: int | None = Field(None, ge=1, description="tasks after every N batches too, not only at the end")


class Settings(BaseModel):
    """How a run edits. Every option of the command line and of a YAML file is a field here."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: str = Field("frugal", description="editing method")
    options: dict[str, Any] = Field(default_factory=dict, description="the method's own hyperparameters")
    sphere: SphereSettings = SphereSettings()
    compensated: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of what SPHERE or RECT took away from a batch that is carried into the next (OTE–SE, arXiv:2605.26670)",
    )
    layers: tuple[int, ...] | dict[str, tuple[int, ...]] | None = Field(
        None,
        description="edited layers, or those of each role {gate: …, up: …, down: …}; by default the method's choice",
    )
    matrices: Literal["down", "experts"] | None = Field(
        None,
        description="of a mixture of experts, what is edited: each layer's shared expert or dense MLP, or its routed experts; by "
        "default the former where most layers have one",
    )
    batch_size: int = Field(100, ge=1, description="facts in one batch")
    chat: bool | None = Field(
        None,
        description="whether prompts are a user's messages in the model's own chat template, for records that do not say; by "
        "default plain text",
    )
    forms: tuple[Form, ...] | None = Field(
        None, description="both at once, [plain, chat], or one of them; the first is the one that facts are asked in"
    )
    rewordings: Literal["given", "auto"] = Field(
        "given",
        description="other prompts that a fact's target is optimised in: those in its record, or also those that the facts lend each other "
        "and a chat model writes, kept where the unedited model reads them alike",
    )
    recheck: int | None = Field(
        None,
        ge=0,
        description="before each batch, ask so many earlier facts for each of its own, and edit again with it those "
        "that are forgotten; after the last batch, ask all; by default the method's choice",
    )
    system: str | None = Field(
        None,
        description="the system prompt of chats, for records that do not say; by default the one of the model's template",
    )
    repair: int | None = Field(
        None,
        ge=0,
        description="after the last batch, take back what the edits did to ordinary text, as far as the facts do not need "
        "it, in so many steps (or one for ten facts, if that is less); by default the method's choice",
    )
    repair_metric: Literal["keys", "kfac"] = Field(
        "keys",
        description="what a repair's steps are measured in: the keys that are to be left alone, or K-FAC, these and the gradients of what "
        "the model says by the matrices' outputs",
    )
    targets: TargetSettings = TargetSettings()
    templates: int = Field(1, ge=0, description="context templates sampled for each of five openers")
    moments: MomentSettings = MomentSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    guard: bool = Field(False, description="stop before a batch after which the model would leave its safe region")
    tokens_per_batch: int = Field(4096, ge=16, description="tokens in one forward pass; changes speed and rounding")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the sampled templates and text")
    dtype: str = Field("auto", description="float32, bfloat16, float16, or the checkpoint's own")
    device: str = Field("auto", description="a PyTorch device, or the one that is there")
    device_map: str | dict[str, int | str] | None = Field(
        None,
        description="for a model larger than the device: auto, balanced, balanced_low_0 or sequential, or the place of each module by its "
        "name (an accelerator's number, cpu or disk)",
    )
    max_memory: dict[str, int | str | None] | None = Field(
        None,
        description="for a map that is found: bytes of weights at each place, {cpu: 8GB, disk: null}; a place that is not named gets none",
    )

    @model_validator(mode="after")
    def _one_choice_of_forms(self) -> Settings:
        try:
            self.default_forms()
        except BadRecord as error:
            raise ValueError(str(error)) from None
        return self

    @model_validator(mode="after")
    def _one_place(self) -> Settings:
        try:
            self.placement()
        except SphereEditError as error:
            raise ValueError(str(error)) from None
        return self

    def placement(self) -> Placement | None:
        """How the model is spread; None where it lies whole on its device."""
        if self.device_map is None:
            if self.max_memory is not None:
                raise SphereEditError("max_memory is for a device map; add device_map: auto")
            return None
        if self.device != "auto":
            raise SphereEditError("a device map says which devices; leave the device out")
        return Placement(self.device_map, self.max_memory).checked()

    def default_forms(self) -> tuple[Form, ...]:
        """The forms that facts are edited in which do not say; none where nothing was set."""
        return chosen_forms(self.chat, self.forms)

    @field_validator("layers", mode="before")
    @classmethod
    def _layer_numbers(cls, value: Any) -> Any:
        lists = list(value.values()) if isinstance(value, dict) else [value]
        plain = all(isinstance(item, (list, tuple)) and all(type(n) is int for n in item) for item in lists)
        if value is not None and not plain:
            raise ValueError("expected layer numbers such as [4, 5], or those of each role, {gate: [4], up: [5]}")
        return value

    def make_method(self) -> Method:
        """The editing method with its options."""
        return make_method(self.method, self.options)

    def make_sphere(self) -> Sphere | None:
        """The projection, or None for the plain method."""
        return self.sphere.resolved(self.make_method().sphere) if self.sphere.enabled else None

    def diagnostic_sphere(self) -> Sphere:
        """The projection whose directions are reported, for the plain method too."""
        return self.sphere.resolved(self.make_method().sphere)

    def with_resolved(self, matrices: Sequence[Matrix], device: torch.device, fast_bfloat16: bool = False) -> Settings:
        """These settings with every default spelled out, so that a run keeps them whatever later versions default to."""
        sphere = self.sphere.model_copy(update=self.diagnostic_sphere().model_dump())
        method = self.make_method()
        self._check_compensated(method)
        options = method.model_dump(mode="json")
        layers: dict[str, tuple[int, ...]] = {}
        for layer, role in matrices:
            layers[role] = (*layers.get(role, ()), layer)
        only_down = set(layers) == {"down"} and method.roles == (("down",),)
        plain = layers["down"] if only_down else layers
        given = {**method.targets, **self.targets.model_dump(exclude_unset=True)}
        targets = TargetSettings(**given).resolved(device, fast_bfloat16)
        recheck = method.recheck if self.recheck is None else self.recheck
        repair = self._resolved_repair(method)
        update = {"layers": plain, "sphere": sphere, "options": options, "targets": targets, "recheck": recheck}
        moments = self.moments.for_experts() if EXPERTS in layers else self.moments
        return self.model_copy(update={**update, "repair": repair, "moments": moments, "matrices": None})

    @property
    def deployed_by(self) -> str | None:
        """What makes the model run with other weights than are edited, in words: its method, or SPHERE over all that was changed; or None."""
        method = self.make_method()
        if type(method).deploy is not Method.deploy:
            return method.name
        if self.sphere.enabled and self.diagnostic_sphere().project == "deployed":
            return "SPHERE with project: deployed"
        return None

    def _check_compensated(self, method: Method) -> None:
        """What is taken away can be carried on where a residual is solved for, and where it is taken from the edited weights."""
        if not self.compensated:
            return
        if not method.needs.feed.at_subjects:
            raise SphereEditError(
                f"compensated is for methods that solve for optimised targets; {method.name} does not, leave it out"
            )
        if not self.sphere.enabled and type(method).finish is Method.finish:
            raise SphereEditError(
                f"{method.name} without SPHERE takes nothing away that could be carried on; set compensated: 0"
            )
        if self.deployed_by is not None:
            raise SphereEditError(
                f"{self.deployed_by} takes nothing away from the edited weights, so there is nothing to carry on; set compensated: 0"
            )

    def _resolved_repair(self, method: Method) -> int:
        """Steps of the repair, which is about the weights that are edited, so these must be those the model runs with."""
        if self.deployed_by is None:
            return method.repair if self.repair is None else self.repair
        if self.repair:
            raise SphereEditError(
                f"repair cannot follow {self.deployed_by}: the model runs with other weights than are edited; set repair: 0"
            )
        return 0

    def resolved_matrices(self, architecture: Architecture) -> tuple[Matrix, ...]:
        """The edited matrices, lowest layer first.

        Raises:
            SphereEditError: layers or roles that do not exist or repeat, or several layers where one can be edited.
        """
        method = self.make_method()
        feed = method.needs.feed
        if isinstance(self.layers, dict):
            chosen = {role: tuple(sorted(layers)) for role, layers in self.layers.items()}
            if not chosen:
                raise SphereEditError("--layers takes layer numbers for at least one role")
            if self.matrices is not None:
                raise SphereEditError(
                    f"--layers says which matrices to edit ({', '.join(chosen)}); leave out --matrices"
                )
            if bad := [role for role in chosen if role not in architecture.roles]:
                raise SphereEditError(f"this model has no '{bad[0]}' matrix; it has {', '.join(architecture.roles)}")
            if feed.at_subjects and not set(chosen) <= set(WRITERS):
                raise SphereEditError(
                    f"{method.name} edits the matrices that write the MLP's output; give --layers 4-8"
                )
        else:
            roles = next((roles for roles in method.roles if set(roles) <= set(architecture.roles)), ("down",))
            writer = self.matrices or architecture.writer
            if writer not in architecture.roles:
                raise SphereEditError(f"this model has no '{writer}' matrices; it has {', '.join(architecture.roles)}")
            roles = tuple(writer if role == "down" else role for role in roles)
            layers = _default_layers(method, architecture, roles) if self.layers is None else tuple(sorted(self.layers))
            chosen = dict.fromkeys(roles, layers)
        if EXPERTS in chosen and not method.by_experts:
            raise SphereEditError(
                f"{method.name} cannot edit routed experts: it needs a system of all inputs of a layer's experts, squared; choose another "
                "method, or matrices that are not experts (--matrices down)"
            )
        for role, layers in chosen.items():
            _check_layers(layers, architecture, role)
            alone = any(architecture.alone(layer, role) for layer in layers)
            if len(layers) > 1 and feed.one_layer(alone):
                why = f"{method.name} sets its target at an MLP's output"
                if alone:
                    why = "this model gates or changes each MLP's output"
                raise SphereEditError(
                    f"{why}, so one layer is edited and not {len(layers)}: no other layer can reach the place of the "
                    f"target; use --layers {layers[-1]}"
                )
        return tuple(sorted((layer, role) for role, layers in chosen.items() for layer in layers))


def _default_layers(method: Method, architecture: Architecture, roles: Sequence[str]) -> tuple[int, ...]:
    """The method's own choice among the layers that have all roles; the last of them where one layer is edited."""
    having = [layer for layer in architecture.having(roles[0]) if all(layer in architecture.having(r) for r in roles)]
    layers = tuple(having[place] for place in method.default_layers(len(having)))
    return (
        layers[-1:]
        if method.needs.feed.one_layer(any(architecture.inside(layer, roles[0]) for layer in layers))
        else layers
    )


def _check_layers(layers: tuple[int, ...], architecture: Architecture, role: str) -> None:
    depth, having = len(architecture.parts), architecture.having(role)
    if len(set(layers)) != len(layers) or not layers:
        raise SphereEditError(f"--layers takes different layer numbers, not {list(layers)}")
    if layers[0] < 0 or layers[-1] >= depth:
        raise SphereEditError(f"layers {list(layers)} do not all exist: this model has layers 0 to {depth - 1}")
    if lacking := sorted(set(layers) - set(having)):
        other = architecture.parts[lacking[0]].writer
        hint = "" if other is None else f"; it has '{other}' (--layers {other}:{lacking[0]})"
        raise SphereEditError(f"layer {lacking[0]} has no '{role}' matrix, which layers {having} have{hint}")


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
        raise SphereEditError(first_error("settings", error)) from None
    settings.diagnostic_sphere()
    return settings


def placed(settings: Settings, places: Mapping[str, Any]) -> Settings:
    """The same settings for a model in another place: on a device, or spread by a map; what is None was not said.

    Raises:
        SphereEditError: these do not go together.
    """
    said = {name: value for name, value in places.items() if value is not None}
    if not said:
        return settings
    kept = {name: value for name, value in settings.model_dump(exclude_unset=True).items() if name not in PLACES}
    if set(said) == {"max_memory"} and settings.device_map is not None:
        said["device_map"] = settings.device_map
    return make_settings(kept, said)


def with_preset(given: Settings, config: Any, fingerprint: str) -> tuple[Settings, str | None]:
    """Settings over those that come with a model, and what these are: tuned on this machine, or published; None where there are none.

    Only what was said counts as given: a default gives way. The length of a target's steps belongs to a rule, and does not go with another.

    Args:
        config: the model's transformers config, by which published settings are found.
        fingerprint: the hash of its weights, by which tuned ones are.
    """
    said = given.model_dump(exclude_unset=True)
    if (known := read_tuned(fingerprint, given.method)) is not None:  # which somebody has asked for
        origin = "tuned for this model"
    elif (preset := preset_of(config, given.method)) is not None:
        known, origin = preset.methods[given.method], f"{preset.origin} for {preset.name}"
    else:
        return given, None
    if targets := known.get("targets"):
        rule = targets.get("rule", given.make_method().targets.get("rule", "adam"))
        if said.get("targets", {}).get("rule", rule) != rule:
            known = {**known, "targets": {name: value for name, value in targets.items() if name != "lr"}}
    return make_settings(known, said), origin


def read_settings_file(path: Path) -> dict[str, Any]:
    """A YAML file of settings as a dictionary."""
    try:
        content = yaml_value(path.read_text("utf-8"))
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
    if isinstance(over.get("layers"), dict):  # which say which matrices, too
        result.pop("matrices", None)
    for name, value in over.items():
        # layers by role are one choice: what one source of settings says replaces what another said
        nested = isinstance(value, dict) and isinstance(result.get(name), dict) and name != "layers"
        result[name] = _merged(result[name], value) if nested else value
    return result


def first_error(what: str, error: ValidationError) -> str:
    """What pydantic found wrong first, in one line."""
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"{what}: there is no setting '{short(name)}'"
    given = repr(first["input"])
    return f"{what}: '{name}': {first['msg'].removeprefix('Value error, ')}, not {short(given)}"


def read_layers(text: str) -> list[int] | dict[str, list[int]]:
    """The layers of a command line: '4-8', '4,6', or by role, each of which holds until the next one: 'gate:11-15,up:18-24,30'."""
    layers: dict[str, list[int]] = {}
    role = ""
    for part in text.split(","):
        match = re.fullmatch(r"\s*(?:([a-z_]+)\s*:)?\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None:
            raise SphereEditError(f"--layers takes numbers such as 4-8, 4,6,8 or gate:11-15,up:18-24, not '{text}'")
        role = match[1] or role
        first, last = int(match[2]), int(match[3] or match[2])
        layers.setdefault(role, []).extend(range(first, last + 1))
    if "" in layers and len(layers) > 1:
        raise SphereEditError(f"--layers '{text}': name the role of the first layers too, as in gate:11-15,up:18-24")
    return layers.get("", layers)
