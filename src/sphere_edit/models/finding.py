"""The layout of a model that has no row, found by running it and never by its name.

One pass over a few tokens says which list of modules is that of the decoder layers, and what makes logits of the last. Then a layer
of each kind is run alone, with what it was called with: which matrices write into the residual stream, how they are stored, and
what happens to what they write. All that is claimed of a matrix was seen in numbers; what was not seen is not claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from sphere_edit.models.architecture import EXPERTS, Architecture, LayerParts, Matrix, logit_cap
from sphere_edit.models.hooks import Call, first_output, hidden_first
from sphere_edit.models.offload import home
from sphere_edit.models.one_layer import NotFound, OneLayer, Site, rounded


@torch.no_grad()
def found_layout(model: Any, ids: Sequence[int]) -> Architecture:
    """Layers, final norm, logits, and of each layer the matrices that can be edited.

    Args:
        ids: a few token ids, at least four.

    Raises:
        NotFound: what was not found.
    """
    try:
        return _found(model, ids)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise NotFound(f"looking at it ended in an error: {' '.join(str(error).split())[:300]}") from None


def _found(model: Any, ids: Sequence[int]) -> Architecture:
    try:
        trace = _Trace.of(model, ids)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise NotFound(f"a text alone does not run through it: {' '.join(str(error).split())[:300]}") from None
    path, layers = trace.decoder_layers()
    running = [layer for layer in layers if layer in trace.order]
    silent = frozenset(number for number, layer in enumerate(layers) if layer not in trace.order)
    norm = trace.final_norm(running[-1])
    calls, outputs = trace.rerun(running)
    scale, cap = _logits(model, norm, outputs[running[-1]], trace.logits)
    parts = _parts(layers, calls, outputs, trace.width)
    if not any(part.writer for part in parts):
        raise NotFound(
            f"no matrix in its layers ('{path}') writes into the residual stream in a way that can be edited"
        )
    return Architecture(path, trace.names[norm], tuple(parts), scale, cap, silent=silent, found="probe")


# --- the model as a whole -----------------------------------------------------------------------------------------------


@dataclass
class _Trace:
    """One plain pass: which modules were called, in what order, and what the output embedding was given and made of it."""

    model: Any
    ids: Tensor
    names: dict[nn.Module, str]
    order: dict[nn.Module, int] = field(default_factory=dict)  # of a module's only call
    repeated: set[nn.Module] = field(default_factory=set)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    width: int = 0

    @classmethod
    def of(cls, model: Any, ids: Sequence[int]) -> _Trace:
        head = model.get_output_embeddings()
        if head is None or getattr(head, "weight", None) is None:
            raise NotFound("it has no output embedding, so it does not predict tokens")
        row = torch.tensor([list(ids)], device=home(model.get_input_embeddings()))
        trace = cls(model, row, {module: name for name, module in model.named_modules()})

        def seen(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if module in trace.order:
                trace.repeated.add(module)
            trace.order[module] = len(trace.order)

        trace.logits = trace.run([(module, seen) for module in trace.names if module is not model])
        trace.width = head.weight.shape[1]
        return trace

    def run(self, watched: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Tensor:
        """The logits ``[1, S, V]`` of a pass with some hooks on modules' outputs."""
        with ExitStack() as hooks:
            for module, hook in watched:
                hooks.callback(module.register_forward_hook(hook).remove)
            logits: Tensor = self.model(
                input_ids=self.ids, attention_mask=torch.ones_like(self.ids), use_cache=False
            ).logits
        return logits

    def decoder_layers(self) -> tuple[str, nn.ModuleList]:
        """The longest list of modules that were called once each, one after another, and that stands in no other such list.

        Some of them may not have been called: those that look at images, in a text.
        """
        lists = {
            name: module
            for module, name in self.names.items()
            if isinstance(module, nn.ModuleList) and len(module) and self._in_turn(module)
        }
        outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
        if not outer:
            raise NotFound("no list of layers was found that a text runs through one after another")
        path = max(outer, key=lambda name: len(lists[name]))
        return path, lists[path]

    def _in_turn(self, modules: nn.ModuleList) -> bool:
        places = [self.order[module] for module in modules if module in self.order]
        return 2 * len(places) > len(modules) and not self.repeated & set(modules) and places == sorted(places)

    def final_norm(self, last: nn.Module) -> nn.Module:
        """The last module without parts between the last layer and the output embedding."""
        head = self.model.get_output_embeddings()
        between = [
            module
            for module, place in self.order.items()
            if self.order[last] < place < self.order.get(head, 0) and not any(True for _ in module.children())
        ]
        if not between:
            raise NotFound(
                "nothing was found between its last layer and its output embedding, where a norm is expected"
            )
        return max(between, key=self.order.__getitem__)

    def rerun(self, layers: Sequence[nn.Module]) -> tuple[dict[nn.Module, Call], dict[nn.Module, Tensor]]:
        """What each layer is called with, and gives back, in another pass."""
        calls: dict[nn.Module, Call] = {}
        outputs: dict[nn.Module, Tensor] = {}

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            args, kwargs = hidden_first(args, kwargs)
            calls[module] = (args[0].clone(), *args[1:]), kwargs

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            outputs[module] = first_output(output).clone()

        with ExitStack() as hooks:
            for layer in layers:
                hooks.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            self.run([(layer, after) for layer in layers])
        for layer, output in outputs.items():
            if output.shape != (*self.ids.shape, self.width):
                raise NotFound(
                    f"'{self.names[layer]}' gives {list(output.shape)} where one vector a token is expected, {[*self.ids.shape, self.width]}"
                )
        return calls, outputs


def _logits(model: Any, norm: nn.Module, hidden: Tensor, logits: Tensor) -> tuple[float, float | None]:
    """By what the output embedding's numbers are multiplied, and to what they are squeezed; `probe.check_head` says whether that is all."""
    plain, said = model.get_output_embeddings()(norm(hidden)).double(), logits.double()
    if plain.shape != said.shape:
        raise NotFound("its logits are not what its output embedding makes of the vector before it")
    cap = logit_cap(model.config)
    if cap is not None:  # undone where it has squeezed little
        small = (said / cap).abs() < 0.9
        plain, said = plain[small], cap * (said[small] / cap).atanh()
    scale = float((plain * said).sum() / plain.square().sum())
    return (1.0 if not abs(scale - 1) > 1e-3 else rounded(scale, 6)), cap


# --- layer by layer -------------------------------------------------------------------------------------------------------


def _parts(
    layers: nn.ModuleList, calls: Mapping[nn.Module, Call], outputs: Mapping[nn.Module, Tensor], width: int
) -> list[LayerParts]:
    """Of each layer what can be edited; of layers of one kind the first and the last are looked at, and all where these two differ."""
    kinds: dict[str, list[int]] = {}
    for number, layer in enumerate(layers):
        if layer in calls:
            kinds.setdefault(_kind(layer), []).append(number)
    found: dict[int, list[Site]] = {number: [] for number, layer in enumerate(layers) if layer not in calls}

    def look(number: int) -> list[Site]:
        if number not in found:
            layer = layers[number]
            found[number] = OneLayer(layer, calls[layer], outputs[layer], width).sites()
        return found[number]

    for numbers in kinds.values():
        first, last = look(numbers[0]), look(numbers[-1])
        for number in numbers[1:-1]:
            found[number] = first if first == last else look(number)
    mixers = not any(
        not site.mixer for sites in found.values() for site in sites
    )  # nothing but mixers: state-space models
    return [_chosen(found[number], mixers) for number in range(len(layers))]


def _kind(layer: nn.Module) -> str:
    return repr([(name, type(m).__name__, *(tuple(p.shape) for p in m.parameters(False))) for name, m in layer.named_modules()])  # fmt: skip


def _chosen(sites: Sequence[Site], mixers: bool) -> LayerParts:
    matrices: dict[str, Matrix] = {}
    plain = [site for site in sites if not site.matrix.experts and site.mixer == mixers]
    if plain:
        best = max(reversed(plain), key=lambda site: (not site.matrix.inside, site.width))
        matrices = {"down": best.matrix, **dict(best.relatives)}
    routed = [site for site in sites if site.matrix.experts]
    if routed:
        matrices[EXPERTS] = routed[-1].matrix
    return LayerParts(MappingProxyType(matrices))
