"""Memory is told by shapes alone, before a model is loaded, and compared with what a run took."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import fact_records
from families import save_tiny
from mixtures import save_mixture
from sphere_edit.editing.settings import make_settings
from sphere_edit.editor import Editor
from sphere_edit.models import miniature
from sphere_edit.models.configuration import CAUSAL
from sphere_edit.models.finding import NotFound
from sphere_edit.models.loading import held_now, peak_memory
from sphere_edit.models.miniature import miniature_layout
from sphere_edit.models.sites import parameter_name
from sphere_edit.progress import Quiet
from sphere_edit.runs.accounting import account_of, memory_of
from sphere_edit.runs.session import Session

MOMENTS = {"sampled_tokens": 512}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    found = {family: save_tiny(family, tmp_path_factory.mktemp(family)) for family in ("llama", "gpt2")}
    return found | {"mixtral": save_mixture("mixtral", tmp_path_factory.mktemp("mixture"))}


def stages(session: Session) -> dict[str, int]:
    return {name: held["cpu"] - session.loaded.before for name, held in account_of(session).stages.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["frugal", "alphaedit", "ft", "ultraedit"])
def test_shapes_say_what_the_loaded_model_does(family, method, models):
    given = make_settings({"method": method, "device": "cpu", "moments": MOMENTS})
    sketched = Session.sketched(models[family], given, Quiet())
    assert sketched is not None
    assert all(parameter.is_meta for parameter in sketched.loaded.model.parameters())
    loaded = Session.load(models[family], given, Quiet())
    assert stages(sketched) == stages(loaded)
    assert sketched.loaded.before > 0
    assert "targets" in stages(loaded) or method in ("ft", "ultraedit")
    weights = sum(parameter.numel() * parameter.element_size() for parameter in loaded.loaded.model.parameters())
    assert min(stages(loaded).values()) > weights
    assert memory_of(loaded) == max(stages(loaded).values())


@pytest.mark.parametrize("method", ["frugal", "ft"])
def test_a_layout_that_is_found_by_running_is_told_by_a_narrow_copy(method, models):
    given = make_settings({"method": method, "device": "cpu", "moments": MOMENTS})
    sketched = Session.sketched(models["mixtral"], given, Quiet())
    loaded = Session.load(models["mixtral"], given, Quiet())
    assert loaded.loaded.architecture.found == "probe"
    assert sketched is not None
    assert all(parameter.is_meta for parameter in sketched.loaded.model.parameters())
    assert sketched.weights.names == loaded.weights.names
    assert stages(sketched) == stages(loaded)


# as large as they are: number of layers, and a few of the matrices that can be edited
LARGE: dict[str, tuple[dict[str, Any], int, dict[str, int]]] = {
    "mixtral": ({}, 32, {"experts": 32}),  # 46.7 billion parameters
    "olmo2": ({}, 32, {"down": 32, "gate": 32, "up": 32}),
    "deepseek_v3": ({"num_hidden_layers": 5}, 5, {"down": 5, "experts": 2}),
    "gpt_oss": ({"num_hidden_layers": 4}, 4, {"experts": 4}),
}


@pytest.mark.parametrize("kind", LARGE)
def test_a_large_model_without_a_row_is_laid_out_without_weights(kind):
    options, layers, roles = LARGE[kind]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options))
    before = torch.get_rng_state()
    found = miniature_layout(model, CAUSAL, trust=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert found is not None
    assert len(found.parts) == layers
    assert {role: len(found.having(role)) for role in roles} == roles
    for role in roles:
        matrix = model.get_parameter(parameter_name(found, found.module_name(layers - 1, role)))
        assert matrix.is_meta


def test_what_has_no_narrow_copy_is_told_once_it_is_loaded(models, monkeypatch):
    monkeypatch.setattr(miniature, "found_layout", refuse)
    given = make_settings({"method": "frugal", "device": "cpu"})
    assert Session.sketched(models["mixtral"], given, Quiet()) is None


def refuse(model: Any, ids: Any) -> Any:
    raise NotFound("it is not laid out so")


def test_what_lies_on_disk_is_counted_while_it_is_in_memory_only(models):
    common: dict[str, Any] = {"method": "frugal", "layers": [1], "targets": {"compute": "model"}}
    whole = Session.sketched(models["llama"], make_settings({**common, "device": "cpu"}), Quiet())
    places = {"": "cpu", "model.layers.0": "disk", "model.layers.3": "disk"}
    spread = Session.sketched(models["llama"], make_settings({**common, "device_map": places}), Quiet())
    assert whole is not None
    assert spread is not None
    layer = whole.loaded.model.get_submodule("model.layers.0")
    matrices = sum(4 * parameter.numel() for parameter in layer.parameters() if parameter.dim() > 1)
    size = sum(4 * parameter.numel() for parameter in layer.parameters())
    # two layers are away, of which one at a time comes in; a target keeps the one above it
    assert stages(whole)["loading"] - stages(spread)["loading"] == 2 * matrices - size
    assert stages(whole)["targets"] - stages(spread)["targets"] == 2 * matrices - 2 * size


def test_a_run_says_how_right_it_was(models, tmp_path):
    said: list[str] = []

    class Heard(Quiet):
        def say(self, text: str, style: str = "") -> None:
            said.append(text)

    settings: dict[str, Any] = {"targets": {"steps": 2}, "moments": MOMENTS, "recheck": 0, "repair": 0}
    editor = Editor.from_pretrained(models["llama"], tmp_path / "run", reporter=Heard(), **settings)
    editor.edit(fact_records(2))
    (line,) = [text for text in said if text.startswith("Memory: ")]
    assert " GB at most on cpu; " in line
    assert line.endswith("%)")
    record = editor.run.entries[-1]
    assert record["event"] == "finished"
    assert record["peak_memory"] > 0
    assert record["expected_memory"] == account_of(editor.session).peak["cpu"]


def test_memory_of_an_accelerator_is_what_its_own_module_counts(monkeypatch):
    """`torch.accelerator` counts from torch 2.9 on, and 2.6 is allowed; some modules count nothing."""
    device = torch.device("cuda")
    monkeypatch.setattr(torch, "get_device_module", lambda asked: SimpleNamespace(memory_allocated=lambda of: 7))
    assert held_now(device) == 7
    assert peak_memory(device) is None
    monkeypatch.setattr(torch, "get_device_module", lambda asked: SimpleNamespace(max_memory_allocated=lambda of: 9))
    assert held_now(device) == 0
    assert peak_memory(device) == 9
