"""A loaded model and how it is edited: what planning, tuning and the editor share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from sphere_edit.editing.batch import Solver
from sphere_edit.editing.ingredients import Ingredient, SecondMoment
from sphere_edit.editing.problem import Statistics
from sphere_edit.editing.settings import Settings, with_preset
from sphere_edit.editing.sources import Source
from sphere_edit.editing.statistics import load_statistics
from sphere_edit.editing.targets import TargetSettings
from sphere_edit.models.loading import LoadedModel, fast_bfloat16, load_model, sketch
from sphere_edit.models.weights import EditedWeights
from sphere_edit.progress import Reporter


class Session:
    """A model in memory, the settings it is edited with, spelled out, and its edited matrices.

    Attributes:
        given: the settings as they were given, with a preset's where there is one.
        settings: these with every default spelled out.
        preset: where settings that were not given came from, in words; None for the method's defaults.
        layers: of each edited matrix.
    """

    def __init__(self, loaded: LoadedModel, given: Settings, preset: str | None, reporter: Reporter):
        self.loaded, self.given, self.preset, self.reporter = loaded, given, preset, reporter
        self.method, self.sphere = given.make_method(), given.make_sphere()
        matrices = given.resolved_matrices(loaded.architecture)
        faster = loaded.dtype == torch.float32 and fast_bfloat16(loaded.device)
        self.settings = given.with_resolved(matrices, loaded.device, faster)
        self.layers = [layer for layer, _ in matrices]
        names = [loaded.architecture.module_name(layer, role) for layer, role in matrices]
        self.weights = EditedWeights(loaded.model, loaded.architecture, names)

    @classmethod
    def load(cls, model: str | Path, given: Settings, reporter: Reporter, trust_remote_code: bool = False) -> Session:
        """Load a model, and take a preset's settings for it where nothing else was given."""
        loaded = load_model(model, given.device, given.dtype, trust_remote_code, reporter, given.placement())
        session = cls(loaded, *with_preset(given, loaded.model.config, loaded.fingerprint), reporter)
        if session.preset is not None:
            kept = "; what you set stays" if given.model_fields_set - {"method"} else ""
            reporter.say(f"Settings of {given.method}: {session.preset}{kept}")
        return session

    @classmethod
    def sketched(
        cls, model: str | Path, given: Settings, reporter: Reporter, trust_remote_code: bool = False
    ) -> Session | None:
        """The same without weights, to be counted and not to be run; None where the layout is not known without them."""
        loaded = sketch(model, given.device, given.dtype, trust_remote_code, given.placement())
        if loaded is None:
            return None
        return cls(loaded, *with_preset(given, loaded.model.config, loaded.fingerprint), reporter)

    @property
    def depth(self) -> int:
        """How many decoder layers the model has."""
        return len(self.loaded.architecture.parts)

    def statistics(self, folder: Path) -> dict[str, Statistics]:
        """What was measured before the first batch, as it lies in ``folder``; of a model that is spread in CPU memory."""
        devices = {name: weight.device for name, weight in self.weights.working.items()}
        elsewhere = any(device.type != "cpu" for device in devices.values())
        return load_statistics(folder, self.weights.names, devices, self.loaded.placement is not None and elsewhere)

    @property
    def ingredients(self) -> tuple[Ingredient, ...]:
        """What is measured and computed beside keys and residuals: what the method needs, and C0 for the guard."""
        needs = self.method.needs
        missing = self.settings.guard and needs.get(SecondMoment) is None
        return (*needs.ingredients, SecondMoment()) if missing else needs.ingredients

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        return int(self.loaded.model.get_input_embeddings().weight.shape[0])

    @property
    def would_calibrate(self) -> bool:
        """Whether nothing is known of this model, nor said, so that a calibration (`tune`) comes before the first edit."""
        said = self.given.model_fields_set & {"layers", "options", "targets"}
        return self.method.calibrated and self.preset is None and not said

    def with_tuned(self) -> Session:
        """The same by the settings that `tune` has found for this model since it was loaded."""
        settled = with_preset(self.given, self.loaded.model.config, self.loaded.fingerprint)
        return Session(self.loaded, *settled, self.reporter)

    def make_source(
        self,
        templates: Sequence[str],
        targets: TargetSettings,
        statistics: Mapping[str, Statistics] | None = None,
        kind: Callable[..., Source] | None = None,
    ) -> Source:
        """What makes the method's problems, or another ``kind`` of it, with what its ingredients give it."""
        feed = self.method.needs.feed
        source = (kind or feed.source)(
            self.loaded, self.weights, self.layers, templates, feed, targets, self.settings.tokens_per_batch
        )
        for row in self.ingredients:
            row.equip(source, statistics or {})
        return source

    def make_solver(self, source: Source, statistics: Mapping[str, Statistics]) -> Solver:
        """What writes a batch with these settings."""
        diagnostic = self.settings.diagnostic_sphere()
        return Solver(
            self.weights,
            source,
            self.method,
            self.sphere,
            diagnostic,
            statistics,
            self.reporter,
            self.settings.compensated,
            self.settings.repair_metric == "kfac",
        )
