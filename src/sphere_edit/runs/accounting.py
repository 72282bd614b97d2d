"""What an edit holds in memory, by device and by stage: told by the shapes of a model alone, with or without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sphere_edit.editing.ingredients import SecondMoment, Shape
from sphere_edit.editing.repair import TEXT_TOKENS
from sphere_edit.models.configuration import text_config
from sphere_edit.models.forward import head_rows
from sphere_edit.models.placement import Place, place_of
from sphere_edit.models.products import KERNELS
from sphere_edit.models.sites import module_of
from sphere_edit.models.stored import joins_experts
from sphere_edit.runs.session import Session

_DIRECTIONS = 0.4  # of a matrix's smaller side, SPHERE's principal directions at η = 0.5 of random neurons
_READ = 0.25  # of the positions that a target's rows run again, those whose logits are read
_KL_ROWS = 1 / 40  # and those that are compared with the unedited model's
_DIAGNOSED = (
    12 * 8
)  # bytes a number of the matrix whose energies are compared before and after: a dozen of its size in float64
_HOLES = 128 << 20  # bytes that earlier work has left unused in the C library's heap, at most (docs/performance.md)
_KERNEL = 600_000  # bytes of what oneDNN compiles for one shape of a product, and keeps (docs/performance.md)


@dataclass(frozen=True)
class Account:
    """Bytes that are expected on each device at each stage, what the process held before included.

    Attributes:
        stages: by name, bytes by device.
    """

    stages: Mapping[str, Mapping[str, int]]

    @property
    def peak(self) -> dict[str, int]:
        """The most on each device."""
        devices = {device for held in self.stages.values() for device in held}
        return {device: max(held.get(device, 0) for held in self.stages.values()) for device in sorted(devices)}

    def fullest(self, device: str) -> str:
        """The stage that takes most there."""
        return max(self.stages, key=lambda stage: self.stages[stage].get(device, 0))


def account_of(session: Session) -> Account:
    """The account of an edit by a session's settings."""
    books = _Books(session)
    stages = {"loading": books.weights(), "reading ordinary text": books.reading(), "each batch": books.batch()}
    if session.method.needs.feed.at_subjects:
        stages["targets"] = books.targets()
    if session.settings.repair:
        stages["repair"] = books.repair()
    stages["evaluation"] = books.evaluation()
    return Account({stage: dict(held) for stage, held in stages.items()})


def memory_of(session: Session) -> int:
    """Bytes that an edit adds to what the process holds without any model, on all devices together."""
    return sum(account_of(session).peak.values()) - session.loaded.before


class _Books:
    """Sizes that the stages have in common. Every figure is bytes."""

    def __init__(self, session: Session):
        self.session, self.settings, loaded = session, session.settings, session.loaded
        self.loaded, self.model, self.main = loaded, loaded.model, str(loaded.device)
        self.number = loaded.dtype.itemsize
        self.shapes = [Shape.of(weight) for weight in session.weights.working.values()]
        self.matrices = [weight.numel() for weight in session.weights.working.values()]
        layers = loaded.architecture.running(loaded.model)
        self.layer_widths = {number: _width(layer, loaded.model) for number, layer in layers.items()}
        self.layer_sizes = {number: _size(layer) for number, layer in layers.items()}
        self.vocabulary = int(loaded.model.get_input_embeddings().weight.shape[0])
        self.lowest, self.highest = min(session.layers), max(session.layers)

    def weights(self) -> dict[str, int]:
        """The model as it is placed, with W0 and the masters beside the edited matrices, and what the process held before."""
        held: dict[str, int] = {}
        kept = {id(parameter) for parameter in self._never_offloaded()}
        for name, parameter in self.model.named_parameters():
            place = place_of(name, getattr(self.model, "hf_device_map", None) or {"": self.main})
            where = self.main if place == "disk" else _named(place)
            if place != "disk" or id(parameter) in kept:
                held[where] = held.get(where, 0) + parameter.numel() * parameter.element_size()
        masters = sum(numbers * (self.number + 4) for numbers in self.matrices)
        beside = masters + self._one_offloaded() + self._put_together()
        return _sum(held, {self.main: self.loaded.before}, self._here(beside))

    def run(self) -> dict[str, int]:
        """What a run holds throughout: weights, statistics and states, the weights before the batch, SPHERE's directions.

        And a copy of the model in bfloat16, where targets are found in one.
        """
        rows, shapes = self.session.ingredients, self.shapes
        kept = sum(row.memory(shapes) + row.state(shapes) for row in rows) + 4 * sum(self.matrices)
        directions = sum(8 * _DIRECTIONS * min(out, inner) * inner for out, inner in shapes)
        copy = 2 * sum(parameter.numel() for parameter in self.model.parameters()) if self._copied else 0
        return _sum(self.weights(), self._here(kept + directions + copy + self._kernels() + self._holes()))

    def reading(self) -> dict[str, int]:
        """Ordinary text before the first batch: second moments in two halves, and what a pass leaves for them."""
        squares = [shape.square for shape in self.shapes]
        if not any(isinstance(row, SecondMoment) for row in self.session.ingredients):
            return _sum(self.weights(), self._here(self._passing()))
        entering = self.settings.tokens_per_batch * sum(inner for _, inner in self.shapes) * self.number
        first = 4 * sum(squares) + entering + self._passing()
        return _sum(self.weights(), self._here(2 * 8 * sum(squares) + max(first, 40 * max(squares))))

    def batch(self) -> dict[str, int]:
        """Solving, growing what the method remembers, and measuring what was done, one matrix after another."""
        rows = self.session.method.needs.ingredients
        most = max((row.scratch(shape) for row in rows for shape in self.shapes), default=0)
        return _sum(self.run(), self._here(max(most, _DIAGNOSED * max(self.matrices))))

    def targets(self) -> dict[str, int]:
        """The upper layers' graph of a chunk of facts, and the logits that are read."""
        tokens = self.settings.targets.tokens_on(self.loaded.device)
        logits = self.vocabulary * tokens * (2 * self._computing * (_READ + _KL_ROWS) + 5 * 4 * _KL_ROWS)
        return _sum(self.run(), self._here(self._graph(*self._in_targets) + logits))

    def repair(self) -> dict[str, int]:
        """Change, momentum, gradients and values of every matrix, what its keys say, a graph, and logits of some positions."""
        held = 8 * 4 * sum(self.matrices) + sum(4 * shape.square for shape in self.shapes)
        return _sum(self.run(), self._here(held + self._graph(*self._in_repair) + 6 * 4 * 64 * self.vocabulary))

    def evaluation(self) -> dict[str, int]:
        """Passes over whole batches, with the logits of a block of positions."""
        logits = 4 * 4 * head_rows(self.loaded) * self.vocabulary
        return _sum(self.run(), self._here(self._passing() + logits))

    # --- parts ----------------------------------------------------------------------------------------------------

    def _here(self, size: float) -> dict[str, int]:
        """Bytes where the model computes."""
        return {self.main: int(size)}

    def _passing(self) -> float:
        """What one layer has at one time, in a pass without gradients over a full batch."""
        return self.settings.tokens_per_batch * max(self.layer_widths.values()) * self.number

    def _kept(self, tokens: int, first: int) -> int:
        """What the layers from ``first`` on keep of so many tokens for the way back."""
        return tokens * self._computing * sum(width for layer, width in self.layer_widths.items() if layer >= first)

    def _graph(self, tokens: int, first: int) -> int:
        """That, and those of the layers that are offloaded."""
        away = (size for layer, size in self.layer_sizes.items() if layer >= first and self._is_offloaded(layer))
        return self._kept(tokens, first) + sum(away)

    @property
    def _in_targets(self) -> tuple[int, int]:
        """Tokens whose way back is kept while targets are found, and the first layer of that way."""
        return self.settings.targets.tokens_on(self.loaded.device), self.highest + 1

    @property
    def _in_repair(self) -> tuple[int, int]:
        """The same of a repair."""
        return 2 * min(TEXT_TOKENS, self.settings.tokens_per_batch), self.lowest

    @property
    def _copied(self) -> bool:
        """Whether targets and the repair compute in a copy of the model."""
        used = self.session.method.needs.feed.at_subjects or self.settings.repair
        return bool(used) and self.settings.targets.compute == "bfloat16" and self.loaded.dtype != torch.bfloat16

    @property
    def _computing(self) -> int:
        """Bytes of a number of these."""
        return 2 if self._copied else self.number

    def _never_offloaded(self) -> list[nn.Parameter]:
        edited = [module_of(self.model, self.loaded.architecture, name) for name in self.session.weights.names]
        vectors = [parameter for parameter in self.model.parameters() if parameter.dim() < 2]
        return [*vectors, *(parameter for module in edited for parameter in module.parameters())]

    def _put_together(self) -> int:
        """On a CPU, the pages of files that hold experts one by one, beside the parameters that transformers copies them into."""
        if self.loaded.device.type != "cpu" or not joins_experts(self.model):
            return 0
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if p.dim() == 3)

    def _kernels(self) -> float:
        """On a CPU, what is compiled for products, in the model's own numbers and in those of a copy: a stream has more shapes than are kept."""
        kinds = 2 if self._copied else 1
        return _KERNEL * KERNELS * kinds if self.loaded.device.type == "cpu" else 0

    def _holes(self) -> float:
        """On a CPU, holes in the C library's heap, of parts of the work that are done: not more than one of them held."""
        if self.loaded.device.type != "cpu":
            return 0
        graphs = [self._kept(*self._in_repair)] if self.settings.repair else []
        graphs += [self._kept(*self._in_targets)] if self.session.method.needs.feed.at_subjects else []
        return min(_HOLES, max([self._passing(), *graphs]))

    def _is_offloaded(self, layer: int) -> bool:
        places = getattr(self.model, "hf_device_map", None) or {}
        return bool(places) and place_of(f"{self.loaded.architecture.layers}.{layer}.", places) == "disk"

    def _one_offloaded(self) -> int:
        """The largest layer that comes in for its own step."""
        return max((size for layer, size in self.layer_sizes.items() if self._is_offloaded(layer)), default=0)


def _sum(*parts: Mapping[str, int]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in parts:
        for device, size in part.items():
            total[device] = total.get(device, 0) + size
    return total


def _named(place: Place) -> str:
    return str(torch.device(place)) if isinstance(place, int) else place


def _size(layer: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in layer.parameters())


def _width(layer: nn.Module, model: Any) -> int:
    """Numbers of a token in a layer: what goes into each of its matrices and what comes out; of experts, into as many as a token has."""
    chosen, total = _chosen(model), 0
    for parameter in layer.parameters():
        if parameter.dim() >= 2:
            total += sum(parameter.shape[-2:]) * (chosen if parameter.dim() == 3 else 1)
    return total


def _chosen(model: Any) -> int:
    """How many experts a token has; 1 where there are none."""
    config = text_config(model)
    names = ("num_experts_per_tok", "top_k", "moe_k")
    return next((int(k) for name in names if (k := getattr(config, name, None))), 1)
