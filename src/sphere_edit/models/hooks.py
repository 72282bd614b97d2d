"""Hooks that look into a running model: what modules are given and what they return, and an end to the pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from sphere_edit.models.sites import Keys, entering, folded

Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a decoder layer was called with, hidden states first


def hidden_first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    if args:
        return args, kwargs
    kwargs = dict(kwargs)
    return (kwargs.pop("hidden_states"),), kwargs


class Stop(Exception):
    """Ends a forward pass once what was asked for has been seen."""


def first_output(output: Any) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


@contextmanager
def watched(
    inputs_of: Sequence[nn.Module], output_of: nn.Module | None, shape: tuple[int, int]
) -> Iterator[tuple[list[Keys], list[Tensor]]]:
    """Record what enters some modules and the output of one while a model runs a batch of ``shape``; it stops after the last of them.

    The output ``[B, S, d]`` is a copy: some layers add to it in place (Falcon).
    """
    inputs: list[Keys] = []
    outputs: list[Tensor] = []

    def take_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(entering(module, args, kwargs, shape))
        if output_of is None and module is inputs_of[-1]:
            raise Stop

    def take_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(folded(first_output(output).detach().clone(), shape[0]))
        raise Stop

    with ExitStack() as hooks:
        for module in inputs_of:
            hooks.callback(module.register_forward_pre_hook(take_input, with_kwargs=True).remove)
        if output_of is not None:
            hooks.callback(output_of.register_forward_hook(take_output).remove)
        with suppress(Stop):
            yield inputs, outputs
