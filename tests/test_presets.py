"""Published settings are taken for the models they were published for, and give way to whatever a user says."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig

from families import save_tiny
from sphere_edit.editing import presets as presets_module
from sphere_edit.editing import settings as settings_module
from sphere_edit.editing.ingredients import SecondMoment
from sphere_edit.editing.methods import METHODS
from sphere_edit.editing.presets import Preset, preset_of, presets
from sphere_edit.editing.settings import Settings, make_settings, with_preset
from sphere_edit.editor import Editor
from sphere_edit.models.architecture import FAMILIES
from sphere_edit.progress import Quiet

CONFIGS = {
    "Llama-3-8B": AutoConfig.for_model(
        "llama", num_hidden_layers=32, hidden_size=4096, intermediate_size=14336, vocab_size=128256
    ),
    "Qwen2.5-7B": AutoConfig.for_model("qwen2", num_hidden_layers=28, hidden_size=3584, num_attention_heads=28),
    "GPT-J-6B": AutoConfig.for_model("gptj", n_layer=28, n_embd=4096),
    "SmolLM2-135M": AutoConfig.for_model(
        "llama", num_hidden_layers=30, hidden_size=576, num_attention_heads=9, num_key_value_heads=3
    ),
    "GPT2-XL": AutoConfig.for_model("gpt2", n_layer=48, n_embd=1600, n_head=25),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_is_recognised_by_what_it_is(name):
    assert {preset.name for preset in presets() if preset.fits(CONFIGS[name])} == {name}
    method = "frugal" if name == "SmolLM2-135M" else "memit"
    assert preset_of(CONFIGS[name], method).name == name
    assert preset_of(CONFIGS[name], "no such method") is None


def test_other_models_have_none():
    for config in (
        AutoConfig.for_model("llama", num_hidden_layers=32, hidden_size=4096, vocab_size=32000),
        AutoConfig.for_model("mistral", num_hidden_layers=32, hidden_size=4096, vocab_size=128256),
        AutoConfig.for_model("gpt2"),
    ):
        given = make_settings({"seed": 3})
        assert with_preset(given, config, "") == (given, None)


def test_what_is_built_on_alphaedit_takes_its_published_settings():
    built = {name for name, method in METHODS.items() if issubclass(method, METHODS["alphaedit"])}
    assert len(built) > 1
    published = [preset for preset in presets() if "alphaedit" in preset.methods]
    assert len(published) == 4
    for preset in published:
        assert all(preset.methods[name] == preset.methods["alphaedit"] for name in built), preset.name


@pytest.mark.parametrize("preset", presets(), ids=lambda preset: preset.name)
def test_every_preset_can_be_used(preset):
    assert set(preset.methods) <= set(METHODS)
    family = next(family for family in FAMILIES if preset.model["model_type"] in family.model_types)
    for method in preset.methods:
        settings, name = with_preset(make_settings({"method": method}), CONFIGS[preset.name], "")
        assert name == f"{preset.origin} for {preset.name}"
        settings.make_method()
        assert settings.resolved_matrices(family.of_depth(preset.model["num_hidden_layers"]))


def test_published_values_arrive():
    settings, _ = with_preset(make_settings({"method": "alphaedit"}), CONFIGS["Llama-3-8B"], "")
    assert (settings.targets.lr, settings.targets.clamp_norm_factor, settings.targets.steps) == (0.1, 0.75, 25)
    assert settings.make_method().l2 == 10
    assert settings.layers == (4, 5, 6, 7, 8)
    rome, _ = with_preset(make_settings({"method": "rome"}), CONFIGS["Qwen2.5-7B"], "")
    assert rome.make_method().needs.get(SecondMoment) is None
    ultra, _ = with_preset(make_settings({"method": "ultraedit"}), CONFIGS["Llama-3-8B"], "")
    assert ultra.layers == {"gate": (11, 12, 13, 14, 15), "up": (18, 19, 20, 21, 22, 23, 24)}


def test_what_is_said_wins_even_where_it_is_a_default():
    default = Settings().targets.lr
    given = make_settings({"method": "alphaedit", "targets": {"lr": default}, "options": {"l2": 7}, "layers": [3]})
    settings, _ = with_preset(given, CONFIGS["Llama-3-8B"], "")
    assert (settings.targets.lr, settings.targets.steps) == (default, 25)
    assert settings.options == {"l2": 7, "null_space": "absolute", "null_space_threshold": 0.02}
    assert settings.layers == (3,)


def test_the_rate_goes_with_its_rule_and_what_was_tuned_comes_first(monkeypatch):
    """A normalised step of 2 is twice ‖h‖, and one of Adam's is 2 a coordinate."""

    def arrives(method, found, **targets):
        monkeypatch.setattr(settings_module, "read_tuned", lambda *_: found)
        given = make_settings({"method": method}, {"targets": targets} if targets else {})
        settings, origin = with_preset(given, CONFIGS["Llama-3-8B"], "")
        arrived = {**settings.make_method().targets, **settings.targets.model_dump(exclude_unset=True)}
        return {name: arrived[name] for name in ("rule", "lr") if name in arrived}, origin

    short = {"layers": [3], "targets": {"rule": "normalised", "lr": 0.2}}
    assert arrives("frugal", short) == ({"rule": "normalised", "lr": 0.2}, "tuned for this model")
    assert arrives("frugal", short, rule="adam") == ({"rule": "adam"}, "tuned for this model")
    assert arrives("frugal", {"targets": {"rule": "adam", "lr": 2.0}}) == (
        {"rule": "adam", "lr": 2.0},
        "tuned for this model",
    )
    older = {"targets": {"lr": 0.2}}  # kept without its rule, which was the method's
    assert arrives("frugal", older)[0] == {"rule": "normalised", "lr": 0.2}
    assert arrives("frugal", older, rule="adam")[0] == {"rule": "adam"}
    published, origin = arrives("memit", None)
    assert (published["lr"], origin) == (0.1, "published for Llama-3-8B")
    assert "lr" not in arrives("memit", None, rule="normalised")[0]
    assert arrives("memit", {"layers": [3]}) == ({}, "tuned for this model"), "somebody asked for it"


def test_layers_by_role_are_one_choice():
    given = make_settings({"method": "ultraedit", "layers": {"gate": [3]}})
    assert with_preset(given, CONFIGS["Llama-3-8B"], "")[0].layers == {"gate": (3,)}


def test_a_run_shows_its_preset_and_keeps_it(tmp_path, monkeypatch):
    shape = {"model_type": "llama", "num_hidden_layers": 4}
    rows = (Preset("Tiny", shape, {"memit": {"layers": [2], "targets": {"steps": 2, "lr": 0.3}}}),)
    monkeypatch.setattr(presets_module, "presets", lambda: rows)
    folder = save_tiny("llama", tmp_path / "model")
    options = {"moments": {"sampled_tokens": 256}, "targets": {"lr": 0.2}}
    editor = Editor.from_pretrained(folder, tmp_path / "run", reporter=Quiet(), method="memit", **options)
    editor.edit([{"subject": "Ada", "prompt": "{} plays the", "target_new": "football"}])
    editor.close()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["preset"] == "published for Tiny"
    assert config["settings"]["layers"] == [2]
    assert (config["settings"]["targets"]["steps"], config["settings"]["targets"]["lr"]) == (2, 0.2)
    monkeypatch.undo()
    again = Editor.open(tmp_path / "run", Quiet())
    assert again.session.preset == "published for Tiny"
    assert again.settings == editor.settings
    again.close()


def test_adams_published_rate_is_not_taken_for_another_rules():
    given = make_settings({"method": "alphaedit", "targets": {"rule": "normalised"}})
    settings, name = with_preset(given, CONFIGS["Llama-3-8B"], "")
    assert name == "published for Llama-3-8B"
    assert (settings.targets.lr, settings.targets.clamp_norm_factor) == (None, 0.75)
