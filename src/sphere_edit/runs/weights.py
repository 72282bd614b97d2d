"""The weights of a run after any of its batches, put together from its folder: the original, the working and the deployed ones.

No model is loaded. Where the model itself is at hand its edited matrices give W0; otherwise W0 is what is left of the working
weights when every update is taken away, which is right up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sphere_edit.editing.batch import deployed_weight
from sphere_edit.editing.settings import make_settings
from sphere_edit.editing.statistics import load_statistics
from sphere_edit.errors import SphereEditError
from sphere_edit.numerics.projection import Sphere
from sphere_edit.runs.folder import RunFolder


@dataclass
class RunWeights:
    """W0, working and deployed weights of a run, each float32 ``[d_out, d_in]``, by matrix and batch (the last one by default).

    Attributes:
        stored: W0 of a matrix, exactly; without, it is rebuilt from the updates.
    """

    run: RunFolder
    stored: Callable[[str], Tensor] | None = None
    _originals: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        settings = make_settings(self.run.config.settings)
        self._method, self._sphere = settings.make_method(), settings.make_sphere()
        self._diagnostic, self.deployed_by = settings.diagnostic_sphere(), settings.deployed_by

    @property
    def names(self) -> list[str]:
        """The edited matrices, lowest layer first."""
        return self.run.config.matrices

    def original(self, name: str) -> Tensor:
        """W0."""
        if name not in self._originals:
            self._originals[name] = self._rebuilt(name) if self.stored is None else self.stored(name)
        return self._originals[name]

    def working(self, name: str, batch: int | None = None) -> Tensor:
        """The weight that the batch after ``batch`` starts from."""
        batch = self.run.history.head if batch is None else batch
        start, weights, _ = self.run.last_checkpoint(batch, name)
        weight = weights[name] if start else self.original(name)
        for _, updates, _ in self.run.updates(start, batch, name):
            weight = updates[name].added_to(weight)
        return weight

    def deployed(self, name: str, batch: int | None = None) -> Tensor:
        """What the model runs with, in the digits of its dtype; W0 where a matrix was not edited."""
        batch = self.run.history.head if batch is None else batch
        if name not in self.names or batch == 0:
            return self.original(name)
        original, working = self.original(name), self.working(name, batch)
        basis = working if self._diagnostic.basis == "current" else original
        deployed = deployed_weight(
            self._method, self._sphere, original, working, lambda: self._diagnostic.directions(basis)
        )
        return deployed.to(getattr(torch, self.run.config.model.dtype)).float()

    def second_moment(self, name: str) -> Tensor | None:
        """C0 of the matrix's inputs, where the run measured it.

        Raises:
            SphereEditError: it is there, and damaged.
        """
        return load_statistics(self.run.path / "statistics", [name], {name: torch.device("cpu")})[name].second_moment

    def last_batch(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """The weight before the last batch that has a ΔW, its ΔW as solved, and as the model got it.

        The run keeps what was written. SPHERE took a share α of its principal part away, which is given back here to say what was
        solved; where SPHERE was off or total (α = 1), it is applied here to show what it does. Where it acts on the deployed weights
        alone, what the model got is their difference.
        """
        history = self.run.history
        last = history.written(history.head)[-1]
        written = self.run.read_update(last, name)[0][name].dense()
        if self.deployed_by is not None:
            before = self.deployed(name, last - 1)
            return before, written, self.deployed(name, last) - before
        before = self.working(name, last) - written
        sphere = self._sphere
        if sphere is None or sphere.alpha == 1:
            return before, written, (sphere or Sphere())(written, before)
        principal = sphere.directions(self.original(name) if sphere.basis == "pretrained" else before)
        part = (written.double() @ principal) @ principal.mT
        return before, (written + sphere.alpha / (1 - sphere.alpha) * part).float(), written

    def _rebuilt(self, name: str) -> Tensor:
        head = self.run.history.head
        if self.run.nearest_checkpoint(head) == 0:
            raise SphereEditError(
                f"{self.run.path} has no checkpoint; sphere-edit edit {self.run.path} --resume makes one"
            )
        weight = self.working(name)
        total = torch.zeros_like(weight)
        for _, updates, _ in self.run.updates(0, head, name):
            total += updates[name].dense()
        return weight - total
