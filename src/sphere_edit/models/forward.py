"""Forward passes that look inside: activations at named places, graphs to differentiate, logits where they are needed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sphere_edit.models.hooks import Stop, first_output, watched
from sphere_edit.models.loaded import LoadedModel
from sphere_edit.models.sites import Keys, entering
from sphere_edit.models.tokens import TokenBatch

_HEAD_ROWS = {"cpu": 128}  # positions whose logits exist at one time, at most; changes memory, not results
_MANY_HEAD_ROWS = 512  # on an accelerator, where each block costs the start of some kernels
_HEAD_NUMBERS = 2**25  # and fewer of a large vocabulary: so many logits, 128 MiB in float32


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Deterministic kernels on an accelerator, so that a run can be repeated bit for bit; a CPU's are anyway."""
    kept, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type == "cpu":
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the backward passes of the fused ones add up in any order
            yield
    finally:
        torch.use_deterministic_algorithms(kept, warn_only=warn)


def at(hidden: Keys, positions: Tensor) -> Tensor:
    """``hidden [B, S, d]`` at one position a row: ``[B, d]``."""
    return hidden[torch.arange(len(positions), device=hidden.device), positions.to(hidden.device)]


@torch.no_grad()
def activations(
    loaded: LoadedModel,
    batch: TokenBatch,
    inputs_of: Sequence[nn.Module] = (),
    output_of: nn.Module | None = None,
) -> tuple[list[Keys], Tensor | None]:
    """Inputs of some modules and the output of one, each ``[B, S, d]``; nothing after the last of them is computed.

    The modules must be called in the order given, ``output_of`` last.
    """
    shape = (len(batch.ids), batch.ids.shape[1])
    with loaded.quick(), watched(inputs_of, output_of, shape) as (inputs, outputs):
        loaded.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    return inputs, (outputs[0] if outputs else None)


def last_hidden(loaded: LoadedModel, batch: TokenBatch) -> Tensor:
    """Output of the last decoder layer, ``[B, S, d_model]``, before the final norm."""
    return until_last(loaded, batch, use_cache=False)


@torch.no_grad()
def until_last(loaded: LoadedModel, batch: TokenBatch, **call: Any) -> Tensor:
    """The same, with more arguments for the model; the mask covers what a cache holds too."""
    last, shape = loaded.architecture.last_layer(loaded.model), (len(batch.ids), batch.ids.shape[1])
    with loaded.quick(), watched((), last, shape) as (_, outputs):
        loaded.model(input_ids=batch.ids, attention_mask=batch.mask, **call)
    return outputs[0].to(loaded.device)


def with_cache(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The arguments by which a model reads from a cache and writes to it; transformers calls it ``cache`` since 5.24."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache, "use_cache": True}


class Graph:
    """One forward pass whose last hidden states can be differentiated, by parameters or by the outputs of modules.

    Args:
        parameters: values that stand in for the model's own parameters of these names.
        outputs_of: modules whose inputs are recorded and whose outputs are made differentiable.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        batch: TokenBatch,
        parameters: Mapping[str, Tensor] | None = None,
        outputs_of: Sequence[nn.Module] = (),
    ):
        self.inputs: list[Keys] = []  # of each module, [B, S, d_in]
        self.shifts: list[
            Tensor
        ] = []  # zeros [B, S, d] added to each module's output; a gradient by them is one by the output
        shape = (len(batch.ids), batch.ids.shape[1])
        found: list[Tensor] = []

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            self.inputs.append(entering(module, args, kwargs, shape))
            shift = output.new_zeros(*shape, output.shape[-1], requires_grad=True)
            self.shifts.append(shift)
            if output.numel() == shift.numel():
                return output + shift.view_as(output)
            rest = output.new_zeros(
                len(output) - shape[0] * shape[1], output.shape[-1]
            )  # of other experts, to be added up
            return output + torch.cat([shift.flatten(0, 1), rest])

        def stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found.append(first_output(output))
            raise Stop

        call = {"input_ids": batch.ids, "attention_mask": batch.mask, "use_cache": False}
        with ExitStack() as hooks:
            for module in outputs_of:
                hooks.callback(module.register_forward_hook(record, with_kwargs=True).remove)
            last = loaded.architecture.last_layer(loaded.model)
            hooks.callback(last.register_forward_hook(stop).remove)
            with suppress(Stop), torch.enable_grad():
                torch.func.functional_call(loaded.model, dict(parameters or {}), (), call)
        self.hidden = found[0].to(loaded.device)


def head_rows(loaded: LoadedModel) -> int:
    """Positions whose logits may exist at one time."""
    vocabulary = int(loaded.model.get_input_embeddings().weight.shape[0])
    most = _HEAD_ROWS.get(loaded.device.type, _MANY_HEAD_ROWS)
    return max(1, min(most, _HEAD_NUMBERS // vocabulary))


@torch.no_grad()
def next_token_scores(loaded: LoadedModel, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood (nats, float32) of ``targets [M]`` and the likeliest token, from ``hidden [M, d_model]``."""
    losses, likeliest, size = [], [], head_rows(loaded)
    for start in range(0, len(hidden), size):
        logits = loaded.architecture.head(loaded.model, hidden[start : start + size]).float()
        losses.append(nn.functional.cross_entropy(logits, targets[start : start + size], reduction="none"))
        likeliest.append(logits.argmax(-1))
    return torch.cat(losses), torch.cat(likeliest)
