"""What one decoder layer writes into the residual stream, seen by running it alone with parts of it changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from sphere_edit.errors import SphereEditError
from sphere_edit.models.architecture import Matrix
from sphere_edit.models.hooks import Call, first_output
from sphere_edit.models.norms import Norm
from sphere_edit.models.offload import hold, shared_maps

_LARGEST_COPY = 4 << 30  # bytes of a float32 copy of one layer; a larger one is looked at in its own numbers
_TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 3e-2, torch.bfloat16: 6e-2}
_QUIET = 0.1  # times the tolerance: what counts as no change at all


class NotFound(SphereEditError):
    """What could not be found, in words that complete "its layout was not understood: …"."""


@dataclass(frozen=True)
class Site:
    """A matrix that writes into the residual stream, and its relatives; `mixer`: it is the one that brings other tokens in."""

    matrix: Matrix
    width: int
    mixer: bool
    relatives: tuple[tuple[str, Matrix], ...] = ()


class OneLayer:
    """A layer run alone, with what it was called with, in float32 where memory allows."""

    def __init__(self, layer: nn.Module, call: Call, output: Tensor, width: int):
        self.width = width
        size = 4 * sum(parameter.numel() for parameter in layer.parameters())
        self.dtype = torch.float32 if size <= _LARGEST_COPY and output.dtype != torch.float64 else output.dtype
        fetched = any(parameter.is_meta for parameter in layer.parameters())
        same = self.dtype == output.dtype and not fetched
        self.layer = layer if same else copy.deepcopy(layer, shared_maps(layer)).to(self.dtype)
        hold(self.layer)
        self.args, self.kwargs = _cast(call, self.dtype)
        self.tolerance = _TOLERANCES.get(self.dtype, 1e-3)
        self.names = {module: name for name, module in self.layer.named_modules()}
        self.token = output.shape[1] // 2
        self.inputs: dict[nn.Module, Tensor] = {}
        self.outputs: dict[nn.Module, Tensor] = {}
        self.order: list[nn.Module] = []
        self.clean = self.run(dict.fromkeys(self._looked_at(), self._record))
        reproduced = _relative(self.clean.to(output.dtype), output[0])
        if not reproduced <= _TOLERANCES.get(output.dtype, 1e-3):
            raise NotFound(
                f"a layer run again with the same arguments gives something else (relative difference {reproduced:.1e}), so that its "
                "layers depend on more than these"
            )

    def _looked_at(self) -> list[nn.Module]:
        return [module for module in self.names if _weight(module) is not None or _stacked(module)]

    def _record(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found = first_output(output)
        given = next((value for value in args if isinstance(value, Tensor) and value.is_floating_point()), None)
        if given is not None and isinstance(found, Tensor):
            self.inputs[module], self.outputs[module] = given.clone(), found.clone()
            self.order.append(module)

    def run(
        self, hooks: Mapping[nn.Module, Callable[..., Any]], start: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """The layer's output ``[S, d]``, with hooks on modules' outputs and another beginning."""
        hidden = self.args[0].clone()
        with ExitStack() as stack:
            for module, hook in hooks.items():
                stack.callback(module.register_forward_hook(hook).remove)
            output = self.layer(hidden if start is None else start(hidden), *self.args[1:], **self.kwargs)
        return first_output(output)[0].clone()

    def with_output(
        self,
        module: nn.Module,
        change: Callable[[Tensor], Tensor],
        hooks: Mapping[nn.Module, Callable[..., Any]] = MappingProxyType({}),
    ) -> Tensor:
        """The layer's output when what a module says at the token is changed, with other hooks."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            rows = first_output(output).clone()
            flat = rows.view(-1, rows.shape[-1])
            flat[self.token] = change(flat[self.token])
            return (rows, *output[1:]) if isinstance(output, tuple) else rows

        return self.run({module: hook, **hooks})

    def sites(self) -> list[Site]:
        """Every matrix that writes into the residual stream, in the order in which they are called."""
        mixing = self._mixing()
        first = next((module for module in self.order if module in mixing), None)
        found = []
        for place, module in enumerate(self.order):
            if self.order.count(module) > 1 or not self._says_rows(module):
                continue
            before = first is not None and place < self.order.index(first)  # attention's own: queries, keys, values
            site = self._site(module, local=module not in mixing, before=before, mixer=module is first)
            if site is not None:
                found.append(site)
        return found

    def _says_rows(self, module: nn.Module) -> bool:
        """Whether a module says a row for each token; or each expert of it does, one after another, to be added up (Llama 4)."""
        experts = len(next(module.parameters(recurse=False))) if _stacked(module) else 1
        return self.outputs[module].numel() in (self.clean.numel(), experts * self.clean.numel())

    def _mixing(self) -> set[nn.Module]:
        """Modules whose input at the token moves with what the layer was given one token before."""
        moved: dict[nn.Module, Tensor] = {}

        def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            moved[module] = next(a for a in args if isinstance(a, Tensor) and a.is_floating_point()).clone()

        def start(hidden: Tensor) -> Tensor:
            hidden[:, self.token - 1] += _noise(hidden.shape[-1], hidden) * hidden.abs().mean()
            return hidden

        self.run(dict.fromkeys(self.order, record), start)
        quiet = _QUIET * self.tolerance
        return {
            module
            for module, now in moved.items()
            if now.shape == self.inputs[module].shape
            and _relative(self._at(now), self._at(self.inputs[module])) > quiet
        }

    def _at(self, rows: Tensor) -> Tensor:
        """A module's numbers at the token, be its rows ``[1, S, d]`` or ``[S, d]``."""
        return rows.reshape(-1, rows.shape[-1])[min(self.token, rows.numel() // rows.shape[-1] - 1)]

    def _site(self, module: nn.Module, local: bool, before: bool, mixer: bool) -> Site | None:
        matrix = self._stored(module)
        if matrix is None:
            return None
        said = self._at(self.outputs[module])
        delta = _noise(self.width, said) * self.clean[self.token].norm() / self.width**0.5
        moved = self.with_output(module, lambda at: at + delta) - self.clean
        move = moved[self.token].clone()
        moved[self.token] = 0
        size = float(move.norm())
        if size < _QUIET * self.tolerance * float(delta.norm()) or float(moved.norm()) > self.tolerance * size:
            return None  # it reaches nothing, or other tokens: keys and values
        factor = float(move @ delta / delta.square().sum())
        exact = _relative(move, factor * delta) < self.tolerance
        if before and not (exact and local):
            return None
        if not exact or (abs(factor - 1) > self.tolerance and not self._constant(module, delta, factor)):
            changed = replace(matrix, inside=True, **self._norm_after(module, delta))
        else:
            changed = replace(matrix, factor=self._plain(factor))
        return Site(changed, self.inputs[module].shape[-1], mixer, () if matrix.experts else self._relatives(module))

    def _plain(self, factor: float) -> float:
        return 1.0 if abs(factor - 1) < self.tolerance else rounded(factor)

    def _norm_after(self, module: nn.Module, delta: Tensor) -> dict[str, Any]:
        """The norm that is given what ``module`` says, or a sum with it, and whose own output reaches the residual stream; and its factor."""
        given: dict[nn.Module, Tensor] = {}

        def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor) and args[0].numel() == self.clean.numel():
                given[module] = self._at(args[0]).clone()

        others = [other for other, name in self.names.items() if name and other is not module]
        self.run(dict.fromkeys(others, record))
        before, said = dict(given), self._at(self.outputs[module])
        self.with_output(module, lambda at: at + delta, dict.fromkeys(others, record))
        for norm in before:
            fed = _relative(given[norm] - before[norm], delta) < self.tolerance
            if fed and Norm.of(norm, self.width, said) is not None:
                moved = self.with_output(norm, lambda at: at + delta) - self.clean
                factor = float(moved[self.token] @ delta / delta.square().sum())
                moved[self.token] -= factor * delta
                plain = float(moved.norm()) < self.tolerance * abs(factor) * float(delta.norm())
                if plain and self._constant(norm, delta, factor):
                    return {"after": self.names[norm], "factor": self._plain(factor)}
        return {}

    def _constant(self, module: nn.Module, delta: Tensor, factor: float) -> bool:
        """Whether another token's output is multiplied with the same: a gate that depends on the token is no factor."""
        kept, self.token = self.token, self.token + 1
        try:
            move = (self.with_output(module, lambda at: at + delta) - self.clean)[self.token]
        finally:
            self.token = kept
        return abs(float(move @ delta / delta.square().sum()) / factor - 1) < self.tolerance

    def _stored(self, module: nn.Module) -> Matrix | None:
        """How the matrix of a module lies, told by what its output is made of; None if it is not one whose rows write one channel each."""
        path = self.names[module]
        weight = _weight(module)
        if weight is not None:
            rows, said = self.inputs[module], self.outputs[module]
            bias = getattr(module, "bias", None)
            plain = said - bias if isinstance(bias, Tensor) else said
            for transposed in (False, True):
                matrix = weight if transposed else weight.T
                fits = rows.shape[-1] == matrix.shape[0] and plain.shape[-1] == matrix.shape[1]
                if fits and _relative(rows @ matrix, plain) < self.tolerance:
                    return Matrix(path, transposed)
            return None
        for name, stacked in module.named_parameters(recurse=False):
            for axis in (1, 2):
                if stacked.dim() == 3 and stacked.shape[axis] == self.width and self._writes(module, stacked, axis):
                    return Matrix(f"{path}.{name}", transposed=axis == 2, experts=True)
        return None

    def _writes(self, module: nn.Module, stacked: nn.Parameter, axis: int) -> bool:
        """Whether a slice of a 3-D parameter along ``axis`` writes the channel of its number, and no other."""
        channel, said = self.width // 2, torch.empty(0)
        kept = stacked.data.clone()

        def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            nonlocal said
            said = first_output(output).clone().reshape(-1, self.width)

        try:
            stacked.data.select(axis, channel).mul_(-1)
            self.run({module: record})
        finally:
            stacked.data.copy_(kept)
        change = (said - self.outputs[module].reshape(-1, self.width)).square().sum(0)
        own = float(change[channel])
        return own > 0 and float(change.sum()) - own <= self.tolerance**2 * own

    def _relatives(self, module: nn.Module) -> tuple[tuple[str, Matrix], ...]:
        """Matrices beside one that writes, in the same part of the layer, whose outputs are all that it is given."""
        home = self.names[module].rpartition(".")[0]
        inner = self.inputs[module].shape[-1]
        beside = [
            other
            for other in self.order[: self.order.index(module)]
            if _weight(other) is not None
            and self.names[other].rpartition(".")[0] == home
            and self.outputs[other].shape[-1] in (inner, 2 * inner)
            and self.order.count(other) == 1
        ]
        reading = [(other, self._read(other, module)) for other in beside]
        fed = [(other, doubled) for other, doubled in reading if doubled is not None]
        stored = [(other, doubled, self._stored(other)) for other, doubled in fed]
        known = [(other, doubled, matrix) for other, doubled, matrix in stored if matrix is not None]
        if len(known) == 1:
            other, _, matrix = known[0]
            joint = self.outputs[other].shape[-1] == 2 * inner
            return (("gate_up" if joint else "up", matrix),)
        if len(known) == 2 and [doubled for _, doubled, _ in known].count(True) == 1:
            return tuple(
                ("up" if doubled else "gate", matrix) for _, doubled, matrix in sorted(known, key=lambda k: k[1])
            )
        return ()

    def _read(self, other: nn.Module, module: nn.Module) -> bool | None:
        """Whether ``module``'s input at the token doubles with what ``other`` says there; None if it does not move at all."""
        now = torch.empty(0)

        def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            nonlocal now
            now = args[0].clone()

        def double(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return 2 * output

        self.run({other: double, module: record})
        before, after = self._at(self.inputs[module]), self._at(now)
        if _relative(after, before) < _QUIET * self.tolerance:
            return None
        return _relative(after, 2 * before) < self.tolerance


def _weight(module: nn.Module) -> Tensor | None:
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point() else None


def _stacked(module: nn.Module) -> bool:
    """Whether a module keeps several matrices in one parameter, as experts do."""
    return sum(parameter.dim() == 3 for parameter in module.parameters(recurse=False)) >= 2


def _cast(item: Any, dtype: torch.dtype) -> Any:
    if isinstance(item, Tensor):
        return item.to(dtype) if item.is_floating_point() else item
    if isinstance(item, (tuple, list)) and type(item) in (tuple, list):
        return type(item)(_cast(part, dtype) for part in item)
    if type(item) is dict:
        return {name: _cast(part, dtype) for name, part in item.items()}
    return item


def _noise(size: int, like: Tensor) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(size)).to(like.device, like.dtype)


def _relative(first: Tensor, second: Tensor) -> float:
    if first.shape != second.shape:
        return float("inf")
    return float((first.double() - second.double()).norm() / second.double().norm().clamp_min(1e-12))


def rounded(number: float, digits: int = 4) -> float:
    """Without the last digits, in which rounding shows."""
    return float(f"{number:.{digits}g}")
