"""What is drawn anew on every tab whenever the run, the facts or the worker have changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from sphere_edit.errors import SphereEditError


class Refreshed:
    """Components that follow the desk: each group is drawn by a function of some inputs."""

    def __init__(self) -> None:
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self._groups: list[tuple[int, int, Callable[..., Sequence[Any]]]] = []

    def add(self, draw: Callable[..., Sequence[Any]], inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """``draw`` gives the outputs, from the values of the inputs."""
        self._groups.append((len(inputs), len(outputs), draw))
        self.inputs += inputs
        self.outputs += outputs

    def values(self, given: Sequence[Any]) -> list[Any]:
        """All outputs, from the values of all inputs; what cannot be read just now stays as it is."""
        found: list[Any] = []
        rest = list(given)
        for inputs, outputs, draw in self._groups:
            own, rest = rest[:inputs], rest[inputs:]
            try:
                found += draw(*own)
            except SphereEditError:
                found += [gr.skip() for _ in range(outputs)]
        return found

    def skipped(self) -> list[Any]:
        """All outputs as they are."""
        return [gr.skip() for _ in self.outputs]
