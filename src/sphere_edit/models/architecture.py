"""How a model is laid out: its decoder layers, the matrices of each that can be edited, and what makes logits of the last.

A family that is well known has a row in ``FAMILIES``; any other is found by `probe`, which runs the model and looks. The rows are
the only place that knows what a family calls its parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from sphere_edit.models.products import quick_products

EXPERTS = "experts"  # the role of a layer's routed experts, which are edited as one wide matrix
WRITERS = ("down", EXPERTS)  # the roles that write an MLP's output, those of a dense MLP or shared expert first


@dataclass(frozen=True)
class Matrix:
    """A matrix of one layer that can be edited.

    Attributes:
        path: within its layer: of a module with a ``weight``, or, of experts, of a parameter with one matrix each ``[E, …]``.
        transposed: stored ``[in, out]`` (GPT-2's Conv1D; the experts of gpt-oss and Llama 4).
        experts: the matrices of all experts, side by side: ``[d_out, E · d_in]``.
        inside: of one that writes the MLP's output: this is changed on its way into the residual stream (a norm after the MLP, a
            gate that depends on the token), so that a target can be met exactly only before that: where this layer alone is edited,
            δ is added to the output of the matrix.
        factor: what the output, or with ``after`` what that norm says, is multiplied with on its way (Granite's residual multiplier).
        after: of one that is ``inside``: path, within the layer, of the norm that is all that stands between (`norms.Norm`).
            Several layers can then share a target at the last one's output.
    """

    path: str
    transposed: bool = False
    experts: bool = False
    inside: bool = False
    factor: float = 1.0
    after: str | None = None

    @property
    def alone(self) -> bool:
        """Whether no other layer can be edited for the same targets."""
        return self.inside and self.after is None

    @property
    def module(self) -> str:
        """Path, within the layer, of the module whose output the matrix makes."""
        return self.path.rpartition(".")[0] if self.experts else self.path


@dataclass(frozen=True)
class LayerParts:
    """What of one decoder layer can be edited: matrices by role, of which ``down`` and ``experts`` write into the residual stream."""

    matrices: Mapping[str, Matrix]

    @property
    def writer(self) -> str | None:
        """The role that writes the MLP's output here: ``down`` where there is one."""
        return next((role for role in WRITERS if role in self.matrices), None)


@dataclass(frozen=True)
class Architecture:
    """One decoder-only model, layer by layer.

    Attributes:
        layers: path of the list of decoder layers.
        final_norm: path of the norm between the last layer and the output embedding.
        parts: of each layer.
        logit_scale: what the logits are multiplied with (Cohere, Granite).
        logit_cap: what they are squeezed to ± of by tanh (Gemma 2).
        whole_rows: targets run whole rows through the upper layers, since these keep more of a prefix than keys and values
            (state-space and linear attention, indexers): slower.
        silent: layers that a text does not run through (cross-attention to images).
        found: how the layout is known: by a family's row, or by the probe.
    """

    layers: str
    final_norm: str
    parts: tuple[LayerParts, ...]
    logit_scale: float = 1.0
    logit_cap: float | None = None
    whole_rows: bool = False
    silent: frozenset[int] = frozenset()
    found: str = "row"

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers, first to last."""
        layers = model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def running(self, model: nn.Module, first: int = 0, last: int | None = None) -> dict[int, nn.Module]:
        """The decoder layers that a text runs through, from ``first`` to ``last`` (that included), by number."""
        end = len(self.parts) if last is None else last + 1
        layers = self.decoder_layers(model)
        return {number: layers[number] for number in range(first, end) if number not in self.silent}

    def last_layer(self, model: nn.Module) -> nn.Module:
        """The last layer that a text runs through."""
        return list(self.running(model).values())[-1]

    def matrix(self, layer: int, role: str) -> Matrix:
        """The matrix ``role`` of a layer."""
        return self.parts[layer].matrices[role]

    def module_name(self, layer: int, role: str) -> str:
        """Full path of the matrix ``role`` in ``layer``, e.g. ``model.layers.4.mlp.down_proj``."""
        return f"{self.layers}.{layer}.{self.matrix(layer, role).path}"

    def named(self, name: str) -> Matrix:
        """The matrix whose full path is ``name``."""
        return self._parts_of(name).matrices[self.role_of(name)]

    def role_of(self, name: str) -> str:
        """Its role."""
        path = name.removeprefix(f"{self.layers}.").split(".", 1)[1]
        return next(role for role, matrix in self._parts_of(name).matrices.items() if matrix.path == path)

    def _parts_of(self, name: str) -> LayerParts:
        return self.parts[int(name.removeprefix(f"{self.layers}.").split(".", 1)[0])]

    @property
    def roles(self) -> tuple[str, ...]:
        """Every role that some layer has, those of most layers first."""
        counts: dict[str, int] = {}
        for part in self.parts:
            for role in part.matrices:
                counts[role] = counts.get(role, 0) + 1
        return tuple(sorted(counts, key=lambda role: -counts[role]))

    def alike(self) -> dict[tuple[str, Matrix], list[int]]:
        """Every matrix, by role, with the layers that have it alike."""
        found: dict[tuple[str, Matrix], list[int]] = {}
        for layer, part in enumerate(self.parts):
            for role, matrix in part.matrices.items():
                found.setdefault((role, matrix), []).append(layer)
        return found

    def having(self, role: str) -> list[int]:
        """The layers that have a matrix ``role``."""
        return [layer for layer, part in enumerate(self.parts) if role in part.matrices]

    @property
    def writer(self) -> str:
        """The role that is edited by default: ``down`` where half of the layers that have either have it, else ``experts``."""
        either = [part for part in self.parts if part.writer is not None]
        return "down" if 2 * len(self.having("down")) >= len(either) else EXPERTS

    def inside(self, layer: int, role: str | None = None) -> bool:
        """Whether a target of this layer is met exactly at its MLP's output only (`Matrix.inside`); ``role``: as it is edited by default."""
        return self._writing(layer, role).inside

    def alone(self, layer: int, role: str | None = None) -> bool:
        """Whether no other layer can be edited for a target of this one (`Matrix.alone`)."""
        return self._writing(layer, role).alone

    def norm_after(self, model: nn.Module, name: str) -> nn.Module | None:
        """The norm behind the matrix ``name``, if there is one (`Matrix.after`)."""
        after = self.named(name).after
        layer = name.removeprefix(f"{self.layers}.").split(".", 1)[0]
        return None if after is None else model.get_submodule(f"{self.layers}.{layer}.{after}")

    def value_site(self, model: nn.Module, layer: int, inside: bool = False, role: str | None = None) -> nn.Module:
        """The module at whose output δ is added: the layer itself, or with ``inside`` what writes its MLP's output (``role``)."""
        if not inside:
            return self.decoder_layers(model)[layer]
        return model.get_submodule(f"{self.layers}.{layer}.{self._writing(layer, role).module}")

    def _writing(self, layer: int, role: str | None) -> Matrix:
        matrices = self.parts[layer].matrices
        chosen = next((one for one in (role, self.writer, *WRITERS) if one in WRITERS and one in matrices), None)
        return matrices[chosen] if chosen is not None else Matrix("")

    def head(self, model: Any, hidden: Tensor) -> Tensor:
        """Next-token logits ``[..., vocabulary]`` from the last layer's output ``[..., d_model]``."""
        with quick_products(hidden.device, hidden.shape[-1]):
            logits = model.get_output_embeddings()(model.get_submodule(self.final_norm)(hidden)).to(hidden.device)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        return logits if self.logit_cap is None else (logits / self.logit_cap).tanh() * self.logit_cap


@dataclass(frozen=True)
class Family:
    """A row of data: how all models of some ``config.model_type`` are laid out, every layer alike.

    Attributes:
        modules: paths, within a layer, of the matrices that can be edited, by role.
        transposed: as `Matrix.transposed`.
        post_norm: path of the norm behind the MLP (`Matrix.after`).
    """

    model_types: tuple[str, ...]
    layers: str
    final_norm: str
    modules: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({"down": "mlp.down_proj"}))
    transposed: bool = False
    post_norm: str | None = None

    def module_name(self, layer: int, role: str) -> str:
        """As `Architecture.module_name`."""
        return f"{self.layers}.{layer}.{self.modules[role]}"

    def architecture(self, model: Any) -> Architecture:
        """The layout of one model of the family.

        Raises:
            AttributeError: the model is not laid out so.
        """
        layers = model.get_submodule(self.layers)
        model.get_submodule(self.final_norm)
        for path in self.modules.values():
            layers[0].get_submodule(path)
        return replace(self.of_depth(len(layers)), logit_cap=logit_cap(model.config))

    def of_depth(self, layers: int) -> Architecture:
        """The layout of a model of so many layers."""
        matrices = {
            role: Matrix(path, self.transposed, inside=norm is not None, after=norm)
            for role, path in self.modules.items()
            for norm in [self.post_norm if role in WRITERS else None]
        }
        parts = LayerParts(MappingProxyType(matrices))
        return Architecture(self.layers, self.final_norm, (parts,) * layers)


def logit_cap(config: Any) -> float | None:
    """What a configuration says its logits are squeezed to ± of, by any of the names for it."""
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    caps = (getattr(config.get_text_config(), name, None) for name in names)
    return next((float(cap) for cap in caps if isinstance(cap, (int, float)) and cap > 0), None)


def _mlp(**paths: str) -> Mapping[str, str]:
    return MappingProxyType({role: f"mlp.{name}" for role, name in paths.items()})


_GATED = _mlp(down="down_proj", gate="gate_proj", up="up_proj")

FAMILIES: tuple[Family, ...] = (
    Family(("llama", "mistral", "qwen2", "qwen3"), "model.layers", "model.norm", _GATED),
    Family(("phi3",), "model.layers", "model.norm", _mlp(down="down_proj", gate_up="gate_up_proj")),
    Family(("gemma",), "model.layers", "model.norm", _GATED),
    Family(("gemma2", "gemma3_text"), "model.layers", "model.norm", _GATED, post_norm="post_feedforward_layernorm"),
    Family(("gpt2",), "transformer.h", "transformer.ln_f", _mlp(down="c_proj", up="c_fc"), transposed=True),
    Family(("gptj",), "transformer.h", "transformer.ln_f", _mlp(down="fc_out", up="fc_in")),
    Family(
        ("gpt_neox",),
        "gpt_neox.layers",
        "gpt_neox.final_layer_norm",
        _mlp(down="dense_4h_to_h", up="dense_h_to_4h"),
    ),
)


def row_of(model_type: str) -> Family | None:
    """The row for a ``config.model_type``, if there is one."""
    return next((row for row in FAMILIES if model_type in row.model_types), None)


def described(model: nn.Module) -> str:
    """What a model is made of, for the refusal of one that cannot be edited."""
    lists = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not lists:
        return "No list of layers was found in it."
    name, layers = max(lists, key=lambda item: len(item[1]))
    matrices = [path for path, m in layers[0].named_modules() if getattr(m, "weight", None) is not None]
    return f"Its longest list of layers is '{name}' ({len(layers)} layers), each with: {', '.join(matrices)}."
