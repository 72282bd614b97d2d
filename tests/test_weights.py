"""Whose tensors are whose: nothing that is handed out or handed in can change what a model runs with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import fact_records
from families import save_tiny, tiny
from sphere_edit.editing.methods import METHODS
from sphere_edit.editing.methods.base import LayerProblem
from sphere_edit.editor import Editor
from sphere_edit.models.weights import EditedWeights

families = pytest.mark.parametrize("family", ["llama", "gpt2"])  # stored as [out, in], and as [in, out]


def state_of(weights: EditedWeights, model: Any) -> dict[str, Tensor]:
    views = {"original": weights.original, "deployed": weights.deployed, "working": weights.working.__getitem__}
    found = {f"{view} {name}": read(name).clone() for view, read in views.items() for name in weights.names}
    return {**found, **{name: value.clone() for name, value in model.state_dict().items()}}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moved", [False, True])
def test_copies_are_the_callers_to_change(family, dtype, moved):
    loaded = tiny(family, dtype)
    name = loaded.architecture.module_name(1, "down")
    weights = EditedWeights(loaded.model, loaded.architecture, [name])
    given = weights.original(name) + (0.5 if moved else 0.0)
    if moved:
        weights.set(name, given)
    before = state_of(weights, loaded.model)
    for tensor in (given, weights.original(name), weights.deployed(name)):
        assert tensor.is_contiguous()
        assert tensor.dtype == torch.float32
        tensor.fill_(7.0)
    assert same(state_of(weights, loaded.model), before)
    kept = weights.snapshot()
    weights.set(name, torch.zeros_like(given))
    weights.restore(kept)
    assert same(state_of(weights, loaded.model), before)
    weights.working[name].fill_(7.0)  # forbidden, and yet it reaches neither W0 nor the model
    after = state_of(weights, loaded.model)
    assert all(torch.equal(after[part], value) for part, value in before.items() if not part.startswith("working"))


def scribbling(function):
    """The method's function, which writes into every matrix that it was given once it is done."""

    def wrapped(self, *args):
        result = function(self, *args)
        result = result.clone() if isinstance(result, Tensor) else result
        for given in args:
            several = given.values() if isinstance(given, dict) else [given]
            for item in several:
                matrix = item.weight if isinstance(item, LayerProblem) else item
                if isinstance(matrix, Tensor):
                    matrix.fill_(7.0)
        return result

    return wrapped


@families
@pytest.mark.parametrize(
    ("method", "options"),
    [("memit", {"second_moment_weight": 0.01}), ("prune", {"second_moment_weight": 0.01}), ("ft", {"lr": 5e-3})],
)
def test_a_method_that_writes_into_what_it_is_given_edits_as_one_that_does_not(
    family, method, options, tmp_path, monkeypatch
):
    model = save_tiny(family, tmp_path / "model")
    settings: dict[str, Any] = {
        "method": method,
        "options": options,
        "batch_size": 3,
        "layers": [1, 2],
        "templates": 0,
        "targets": {"steps": 3, "lr": 0.3},
        "moments": {"sampled_tokens": 256},
        "tokens_per_batch": 256,
    }

    def edited(run: str) -> dict[str, Tensor]:
        editor = Editor.from_pretrained(model, tmp_path / run, **settings)
        editor.edit(fact_records(6))
        return state_of(editor.weights, editor.model)

    expected = edited("plain")
    kind = METHODS[method]
    for name in ("solve", "descend", "finish", "deploy"):
        if hasattr(kind, name):
            monkeypatch.setattr(kind, name, scribbling(getattr(kind, name)))
    assert same(edited("scribbling"), expected)
