"""A model that is spread by accelerate is edited as one that lies whole in memory: to the bit, and with the same words where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import fact_records
from families import save_tiny
from mixtures import save_mixture
from sphere_edit import tuning
from sphere_edit.editing.problem import Kept, Statistics
from sphere_edit.editing.settings import make_settings, placed
from sphere_edit.editing.statistics import load_statistics
from sphere_edit.editor import Editor, opened
from sphere_edit.errors import SphereEditError
from sphere_edit.files import write_tensors
from sphere_edit.models import loading
from sphere_edit.models.offload import Stored
from sphere_edit.models.placement import Placement, read_map, read_memory
from sphere_edit.models.pretrained import skeleton
from sphere_edit.progress import Quiet
from sphere_edit.runs.session import Session
from test_cli import invoked

COMMON: dict[str, Any] = {
    "batch_size": 3,
    "templates": 0,
    "targets": {"steps": 6, "lr": 0.5},
    "moments": {"sampled_tokens": 512},
    "tokens_per_batch": 256,
}
BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h", "qwen3_moe": "model.layers"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    found = {family: save_tiny(family, tmp_path_factory.mktemp(family)) for family in ("llama", "gpt2")}
    return found | {"qwen3_moe": save_mixture("qwen3_moe", tmp_path_factory.mktemp("mixture"))}


def on_disk(family: str) -> dict[str, str]:
    """A map that puts every second block on disk."""
    return {"": "cpu", f"{BLOCKS[family]}.1": "disk", f"{BLOCKS[family]}.3": "disk"}


def weights(editor: Editor) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in Stored(editor.model).items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("family", BLOCKS)
def test_a_spread_model_is_edited_as_a_whole_one(family, models, tmp_path):
    places, facts = on_disk(family), fact_records(9)

    def begun(run: str, **more: Any) -> Editor:
        return Editor.from_pretrained(models[family], tmp_path / run, reporter=Quiet(), **COMMON, **more)

    whole, spread = begun("whole"), begun("spread", device_map=places)
    original = weights(whole)
    lying = [name for name, parameter in spread.model.named_parameters() if parameter.is_meta]
    assert lying, "some of it is not in memory"
    assert same(weights(spread), original)
    assert spread.loaded.fingerprint == whole.loaded.fingerprint
    expected, found = whole.edit(facts[:6]), spread.edit(facts[:6])
    assert [name for name, parameter in spread.model.named_parameters() if parameter.is_meta] == lying
    assert found["unedited"] == expected["unedited"]
    assert found["edited"] == expected["edited"]
    assert same(weights(spread), weights(whole))
    assert not same(weights(spread), original)
    assert spread.generate("Ada lives in") == whole.generate("Ada lives in")
    whole.close()
    spread.close()

    # each goes on as the other was, and gives the same files
    with opened(tmp_path / "whole", Quiet(), device_map=places) as one, opened(tmp_path / "spread", Quiet()) as other:
        assert one.run.config.settings["device_map"] is None
        assert other.run.config.settings["device_map"] == places
        assert any(parameter.is_meta for parameter in other.model.parameters())
        assert one.edit(facts[6:])["edited"] == other.edit(facts[6:])["edited"]
        assert same(weights(one), weights(other))
        one.save_pretrained(tmp_path / "of-spread")
    with opened(tmp_path / "spread", Quiet(), device="cpu") as other:
        assert not any(parameter.is_meta for parameter in other.model.parameters())
        other.save_pretrained(tmp_path / "of-whole")
        assert files(tmp_path / "of-spread") == files(tmp_path / "of-whole")
    with opened(tmp_path / "whole", Quiet(), device_map=places) as one:
        one.rollback(0)
        assert same(weights(one), original)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ft", "alphaedit", "rect", "memit"])
def test_other_methods_too(method, models, tmp_path):
    """Fine-tuning differentiates by the edited matrices, and a repair too; the others have statistics and states of their own."""
    edited = []
    for run, places in (("whole", None), ("spread", on_disk("llama"))):
        editor = Editor.from_pretrained(
            models["llama"], tmp_path / run, reporter=Quiet(), method=method, device_map=places, repair=2, **COMMON
        )
        editor.edit(fact_records(6))
        edited.append(weights(editor))
    assert same(*edited)


def test_bfloat16_targets_of_a_spread_model(models, tmp_path):
    """The copy in other numbers fetches what is offloaded from the same files."""
    edited = []
    for run, places in (("whole", None), ("spread", on_disk("llama"))):
        settings = {**COMMON, "targets": {"steps": 2, "compute": "bfloat16"}, "recheck": 0, "repair": 0}
        editor = Editor.from_pretrained(
            models["llama"], tmp_path / run, reporter=Quiet(), device_map=places, **settings
        )
        editor.edit(fact_records(3))
        edited.append(weights(editor))
    assert same(*edited)


def bones(models: dict[str, Path], family: str) -> Any:
    return skeleton(str(models[family]), "AutoModelForCausalLM", dtype=torch.float32)


@pytest.mark.parametrize("family", BLOCKS)
def test_what_is_no_block_stays_in_memory(family, models):
    model = bones(models, family)
    size = {name: 4 * parameter.numel() for name, parameter in model.named_parameters()}
    blocks = [name for name in size if name.startswith(f"{BLOCKS[family]}.")]
    block = sum(size[name] for name in blocks) // 4
    rest = sum(size.values()) - 4 * block
    room = rest + int(3.5 * block)  # of which one block's is kept free, to run those that are on disk
    found = Placement("auto", {"cpu": room, "disk": None}).resolved(model, "it")
    places = [found[f"{BLOCKS[family]}.{number}"] for number in range(4)]
    assert places == ["cpu", "cpu", "disk", "disk"]
    assert {place for name, place in found.items() if not name.startswith(BLOCKS[family])} == {"cpu"}
    assert set(Placement("auto", {"cpu": 10**9}).resolved(model, "it").values()) == {"cpu"}
    with pytest.raises(SphereEditError, match="do not fit max_memory; give more, or let decoder layers lie on disk"):
        Placement("auto", {"cpu": room}).resolved(model, "it")
    with pytest.raises(SphereEditError, match="do not fit max_memory"):
        Placement("auto", {"cpu": rest - 1, "disk": None}).resolved(model, "it")


def test_a_given_map_covers_the_model(models):
    model = bones(models, "llama")
    found = Placement({"": "cpu", "model.layers.2": "disk"}).resolved(model, "it")
    assert found.pop("model.layers.2") == "disk"
    assert set(found.values()) == {"cpu"}
    assert {"lm_head", "model.embed_tokens", "model.norm", "model.layers.0", "model.layers.3"} <= found.keys()
    with pytest.raises(SphereEditError, match="names 'model.layers.7', and 'it' has no module of this name"):
        Placement({"": "cpu", "model.layers.7": "disk"}).resolved(model, "it")
    with pytest.raises(SphereEditError, match="of 'it' has no place for 'lm_head.weight'"):
        Placement({"model": "cpu"}).resolved(model, "it")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"device_map": "gpu"},
            "device_map is auto, balanced, balanced_low_0, sequential, or the place of each module",
        ),
        ({"device_map": {}}, "the device map is empty"),
        ({"device_map": "auto", "device": "cpu"}, "a device map says which devices; leave the device out"),
        ({"max_memory": {"cpu": "1GB"}}, "max_memory is for a device map; add device_map: auto"),
        ({"device_map": {"": "cpu"}, "max_memory": {"cpu": "1GB"}}, "not for one that is given"),
        ({"device_map": "auto", "max_memory": {"cpu": "1 pound"}}, "max_memory takes sizes such as 20GB"),
        ({"device_map": "auto", "max_memory": {"cpu": None}}, "a size for each place, and none for disk"),
        ({"device_map": "auto", "max_memory": {"disk": None}}, "gives no memory to compute in"),
    ],
)
def test_nonsense_is_told_in_a_sentence(settings, said):
    with pytest.raises(SphereEditError, match=said):
        make_settings(settings)


def test_the_command_line(models, tmp_path):
    assert read_map("auto") == "auto"
    assert read_memory("0=20GB, cpu=2GB,disk") == {"0": "20GB", "cpu": "2GB", "disk": None}
    for text in ("cpu=1GB,cpu=2GB", "=1GB", ""):
        with pytest.raises(SphereEditError, match="--max-memory takes a size for each place"):
            read_memory(text)
    given = tmp_path / "map.yaml"
    given.write_text("'': cpu\nmodel.layers.1: disk\n")
    assert read_map(str(given)) == {"": "cpu", "model.layers.1": "disk"}
    given.write_text("- cpu")
    with pytest.raises(SphereEditError, match="expected names of modules and their places"):
        read_map(str(given))
    with pytest.raises(SphereEditError, match="--device-map takes auto, .* and 'gpu' cannot be read as one"):
        read_map("gpu")


def test_a_run_may_go_on_elsewhere(models, tmp_path):
    """Where its model lies is no setting that a run keeps; a device takes the map's place."""
    at_rest = make_settings({"device_map": "auto", "max_memory": {"cpu": "1GB"}, "seed": 3})
    moved = placed(at_rest, {"device": "cpu", "device_map": None, "max_memory": None})
    assert (moved.device, moved.device_map, moved.max_memory, moved.seed) == ("cpu", None, None, 3)
    assert placed(at_rest, {"device": None}) is at_rest
    assert placed(at_rest, {"max_memory": {"cpu": "2GB"}}).placement() == Placement("auto", {"cpu": "2GB"})
    with pytest.raises(SphereEditError, match="leave the device out"):
        placed(at_rest, {"device": "cpu", "device_map": "auto"})


def test_statistics_and_states_may_stay_in_memory_and_visit_the_device(tmp_path):
    """``meta`` stands for a device that is not the CPU: what is asked for by name comes there, what is stored does not."""
    device = torch.device("meta")
    for kept in (Kept({"system": torch.eye(3)}, device), Statistics({"second_moment": torch.eye(3)}, device)):
        (name,) = kept
        assert kept[name].device == device
        assert [value.device.type for value in kept.values()] == ["cpu"]
        assert {**kept}[name].device.type == "cpu", "a checkpoint writes what lies there"
    assert kept.second_moment is not None
    assert kept.second_moment.device == device
    made: list[int] = []

    def make() -> torch.Tensor:
        made.append(1)
        return torch.ones(2)

    assert kept.made("it", make).device == kept.made("it", make).device == device
    assert made == [1]
    here = Statistics(second_moment=torch.eye(3))
    assert here["second_moment"] is here.second_moment, "without a device nothing is copied"
    assert here.factor is here.factor

    folder = tmp_path / "second_moment"
    write_tensors(folder / "a.safetensors", {"second_moment": torch.eye(3)})
    away = load_statistics(tmp_path, ["a"], {"a": device}, away=True)["a"]
    assert (away["second_moment"].device, next(iter(away.values())).device.type) == (device, "cpu")
    assert next(iter(load_statistics(tmp_path, ["a"], {"a": device})["a"].values())).device == device


def test_places_of_another_machine_are_told_before_anything_is_fetched(models):
    for settings, said in (
        ({"device_map": {"": 7}}, "the device map names '7', which is not there"),
        ({"device_map": {"": "meta"}}, "the device map names 'meta', which is not there"),
        ({"device_map": "auto", "max_memory": {"9": "1GB"}}, "max_memory names '9', which is not there"),
    ):
        for open_model in (Session.load, Session.sketched):
            with pytest.raises(SphereEditError, match=said):
                open_model("no/such-model", make_settings(settings), Quiet())


def told(*args: object) -> str:
    """What a command says on stdout, which a chat is asked one prompt of."""
    return invoked(*args, typed="Ada lives in\n").stdout


@pytest.fixture
def spread_yaml(tmp_path) -> Path:
    path = tmp_path / "places.yaml"
    path.write_text("'': cpu\nmodel.layers.1: disk\nmodel.layers.3: disk\n")
    return path


@pytest.fixture
def lying(monkeypatch) -> list[int]:
    """How many parameters of each model that is loaded are not in memory."""
    counts: list[int] = []
    real = loading.prepare

    def prepare(model: Any, *more: Any) -> Any:
        counts.append(sum(parameter.is_meta for parameter in model.parameters()))
        return real(model, *more)

    monkeypatch.setattr(loading, "prepare", prepare)
    return counts


def test_every_command_that_opens_a_model_takes_a_map(models, tmp_path, spread_yaml, lying, blank_figures):
    facts = tmp_path / "facts.jsonl"
    facts.write_text("".join(json.dumps(record) + "\n" for record in fact_records(6)))
    edit = ("edit", models["llama"], facts, "--method", "ultraedit", "--batch-size", 3)
    for name in ("whole", "parts"):
        config = tmp_path / "quick.yaml"
        config.write_text("templates: 0\nevaluation: {generation: 'off'}\n")
        told(*edit, "--config", config, "-o", tmp_path / name)
    lying.clear()
    where = ("--device-map", spread_yaml)

    def both(*command: object) -> None:
        """A command does the same on the whole model and on a spread one."""
        whole, spread = (
            [str(part).replace("RUN", str(tmp_path / name)) for part in command] for name in ("whole", "parts")
        )
        first, second = told(*whole), told(*spread, *where)
        assert second.replace("parts", "whole") == first
        assert lying[0] == 0 < lying[1], "the second was spread"
        lying.clear()

    both("eval", models["llama"], facts)
    both("eval", "RUN", facts)
    both("chat", "RUN", "--side-by-side")
    both("export", "RUN", "-o", "RUN-export")
    both("export", "RUN", "--as", "delta", "-o", "RUN-delta")
    both("apply", "RUN-delta", models["llama"], "-o", "RUN-applied")
    for export in ("export", "applied"):
        assert files(tmp_path / f"whole-{export}") == files(tmp_path / f"parts-{export}") != {}
    told("verify", tmp_path / "parts", *where)
    told("verify", tmp_path / "parts-export", "--against", tmp_path / "parts", *where)
    with pytest.raises(SphereEditError, match="add --against RUN"):
        told("verify", tmp_path / "parts-export", *where)
    lying.clear()
    both("remove", "RUN", "--fact", "1")
    both("rollback", "RUN", "--to", "1")
    with opened(tmp_path / "whole", Quiet()) as one, opened(tmp_path / "parts", Quiet()) as other:
        assert same(weights(one), weights(other))


def test_inspect_and_tune_take_a_map(models, tmp_path, spread_yaml, lying, monkeypatch):
    found = told("inspect", models["llama"], "--device-map", spread_yaml)
    assert "down" in found
    assert lying[-1] > 0
    seen: list[Any] = []
    monkeypatch.setattr(tuning, "tune", lambda loaded, *more: seen.append(loaded) or stop())
    with pytest.raises(SphereEditError, match="seen"):
        told("tune", models["llama"], "--device-map", spread_yaml)
    assert seen[0].placement is not None


def stop() -> None:
    raise SphereEditError("seen")
