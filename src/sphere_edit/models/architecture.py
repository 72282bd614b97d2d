"""The model families, as data. The only place that knows what a family calls its parts.

To add a family, add a row to ``FAMILIES`` and a tiny config of it to ``tests/families.py``: the hit test (one layer,
ridge → 0, hidden state equal to v*) and the command-line test then run on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from sphere_edit.errors import SphereEditError


@dataclass(frozen=True)
class Architecture:
    """One family of decoder-only models.

    Attributes:
        model_types: ``config.model_type`` of every model the row covers.
        layers: path of the list of decoder layers.
        final_norm: path of the norm between the last layer and the output embedding.
        modules: paths, within a layer, of the matrices that can be edited, by role; ``down`` writes into the
            residual stream.
        transposed: the matrices are stored ``[in, out]`` (GPT-2's Conv1D).
        post_norm: the MLP's output is normalised before it is added to the residual stream (Gemma 2 and 3), so a
            target can only be met before that norm: δ is added to the output of ``down``, and since no other layer
            reaches that place, exactly one layer is edited.
    """

    model_types: tuple[str, ...]
    layers: str
    final_norm: str
    modules: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({"down": "mlp.down_proj"}))
    transposed: bool = False
    post_norm: bool = False

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers, first to last."""
        layers = model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def module_name(self, layer: int, role: str) -> str:
        """Full path of the matrix ``role`` in ``layer``, e.g. ``model.layers.4.mlp.down_proj``."""
        return f"{self.layers}.{layer}.{self.modules[role]}"

    def value_site(self, model: nn.Module, layer: int, inside: bool = False) -> nn.Module:
        """The module at whose output δ is added: the layer itself, or with ``inside`` its ``down`` matrix.

        Before a post-norm it is always the latter.
        """
        if inside or self.post_norm:
            return model.get_submodule(self.module_name(layer, "down"))
        return self.decoder_layers(model)[layer]

    def head(self, model: Any, hidden: Tensor) -> Tensor:
        """Next-token logits ``[..., vocabulary]`` from the last layer's output ``[..., d_model]``."""
        output = model.get_output_embeddings()
        logits = output(model.get_submodule(self.final_norm)(hidden))
        cap = getattr(model.config, "final_logit_softcapping", None)
        return logits if cap is None else (logits / cap).tanh() * cap


def _mlp(**paths: str) -> Mapping[str, str]:
    return MappingProxyType({role: f"mlp.{name}" for role, name in paths.items()})


_GATED = _mlp(down="down_proj", gate="gate_proj", up="up_proj")

FAMILIES: tuple[Architecture, ...] = (
    Architecture(("llama", "mistral", "qwen2", "qwen3"), "model.layers", "model.norm", _GATED),
    Architecture(("phi3",), "model.layers", "model.norm", _mlp(down="down_proj", gate_up="gate_up_proj")),
    Architecture(("gemma",), "model.layers", "model.norm", _GATED),
    Architecture(("gemma2", "gemma3_text"), "model.layers", "model.norm", _GATED, post_norm=True),
    Architecture(("gpt2",), "transformer.h", "transformer.ln_f", _mlp(down="c_proj", up="c_fc"), transposed=True),
    Architecture(("gptj",), "transformer.h", "transformer.ln_f", _mlp(down="fc_out", up="fc_in")),
    Architecture(
        ("gpt_neox",),
        "gpt_neox.layers",
        "gpt_neox.final_layer_norm",
        _mlp(down="dense_4h_to_h", up="dense_h_to_4h"),
    ),
)


def row_of(model_type: str, found: str = "") -> Architecture:
    """The row for a ``config.model_type``.

    Raises:
        SphereEditError: there is none; ``found`` says what the model is made of.
    """
    for row in FAMILIES:
        if model_type in row.model_types:
            return row
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise SphereEditError(
        f"model family '{model_type}' is not supported yet (supported: {known}).\n{found}\n"
        "To add it, add one row to FAMILIES in sphere_edit/models/architecture.py (the path of the decoder layers, "
        "of the final norm, and of the matrix that writes the MLP's output) and a tiny config to tests/families.py."
    )


def architecture_of(model: Any) -> Architecture:
    """The row for ``model``, by its ``config.model_type``.

    Raises:
        SphereEditError: for an unknown family, naming the modules found and how to add a row; and for a known one
            whose modules are not where the row says.
    """
    model_type = model.config.model_type
    row = row_of(model_type, _describe(model))
    try:
        for role in row.modules:
            model.get_submodule(row.module_name(0, role))
        model.get_submodule(row.final_norm)
    except AttributeError as error:
        raise SphereEditError(
            f"this '{model_type}' model is not laid out as its family usually is: {error}.\n{_describe(model)}"
        ) from None
    return row


def _describe(model: nn.Module) -> str:
    lists = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not lists:
        return "No list of layers was found in it."
    name, layers = max(lists, key=lambda item: len(item[1]))
    matrices = [path for path, m in layers[0].named_modules() if getattr(m, "weight", None) is not None]
    return f"Its longest list of layers is '{name}' ({len(layers)} layers), each with: {', '.join(matrices)}."
