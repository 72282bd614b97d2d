from __future__ import annotations

import dataclasses
import json
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sphere_edit.editing.methods import METHODS
from sphere_edit.editing.settings import Settings, make_settings, read_settings_file
from sphere_edit.errors import SphereEditError
from sphere_edit.models.architecture import FAMILIES, Architecture, LayerParts, Matrix

PRE_NORM = next(family for family in FAMILIES if not family.post_norm)
POST_NORM = next(family for family in FAMILIES if family.post_norm)


class GATED:
    """A layout whose MLPs' outputs are changed by something that is no norm."""

    @staticmethod
    def of_depth(layers: int) -> Architecture:
        parts = LayerParts({"down": Matrix("mlp.down_proj", inside=True)})
        return Architecture("model.layers", "model.norm", (parts,) * layers)


def told(*layers: dict) -> str:
    with pytest.raises(SphereEditError) as caught:
        make_settings(*layers)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"bath_size": 5}, "settings: there is no setting 'bath_size'"),
        ({"sphere": {"etta": 0.5}}, "settings: there is no setting 'sphere.etta'"),
        ({"targets": {"learning_rate": 1}}, "settings: there is no setting 'targets.learning_rate'"),
        (
            {"moments": {"tokens": {"of": 5}}},
            "settings: 'moments.tokens': Input should be a valid integer, not {'of': 5}",
        ),
        ({1: 2}, "settings: '1': Keys should be strings, not 1"),
        ({"sphere": {1: 2}}, "settings: 'sphere.1': Keys should be strings, not 1"),
        ({"options": {1: 2}}, "settings: 'options.1.[key]': Input should be a valid string, not 1"),
        ({"batch_size": 0}, "settings: 'batch_size': Input should be greater than or equal to 1, not 0"),
        (
            {"batch_size": 1.5},
            "settings: 'batch_size': Input should be a valid integer, got a number with a fractional",
        ),
        (
            {"batch_size": "many"},
            "settings: 'batch_size': Input should be a valid integer, unable to parse string as an",
        ),
        (
            {"evaluation": {"every": 0}},
            "settings: 'evaluation.every': Input should be greater than or equal to 1, not 0",
        ),
        ({"seed": -1}, "settings: 'seed': Input should be greater than or equal to 0, not -1"),
        ({"seed": 2**63}, "settings: 'seed': Input should be less than "),
        ({"layers": "4-8"}, "settings: 'layers': expected layer numbers such as [4, 5], or those of each role, "),
        ({"layers": [4, "x"]}, "settings: 'layers': expected layer numbers such as [4, 5], or those of each role, "),
        ({"layers": {"up": 4}}, "settings: 'layers': expected layer numbers such as [4, 5], or those of each role, "),
        ({"sphere": None}, "settings: 'sphere': Input should be a valid dictionary or instance of SphereSettings, not"),
        ({"sphere": {"eta": 1.5}}, "settings: 'sphere.eta': Input should be less than or equal to 1, not 1.5"),
        ({"sphere": {"alpha": float("nan")}}, "settings: 'sphere.alpha': Input should be "),
        ({"sphere": {"basis": "both"}}, "sphere: 'basis': Input should be 'current' or 'pretrained', not 'both'"),
        (
            {"sphere": {"project": "x"}},
            "sphere: 'project': Input should be 'per_layer', 'after_all' or 'deployed', not 'x'",
        ),
        ({"targets": {"lr": 0}}, "settings: 'targets.lr': Input should be greater than 0, not 0"),
        ({"targets": {"steps": 1}}, "settings: 'targets.steps': Input should be greater than or equal to 2, not 1"),
        ({"method": "rome2"}, "there is no method 'rome2'; choose one of alphaedit, "),
        (
            {"method": "memit", "options": {"l2": 5}},
            "memit: option 'l2': Extra inputs are not permitted (options: second_moment_weight)",
        ),
        (
            {"method": "alphaedit", "options": {"l2": -1}},
            "alphaedit: option 'l2': Input should be greater than 0 (options: l2, null_space, null_space_threshold)",
        ),
        (
            {"method": "alphaedit", "options": {"null_space": "small"}},
            "alphaedit: option 'null_space': Input should be 'mean', ",
        ),
    ],
)
def test_what_cannot_be_set_is_told_by_its_name(given_settings, message):
    assert told(given_settings).startswith(message)


def test_later_settings_win_and_leave_their_neighbours():
    settings = make_settings(
        {
            "method": "alphaedit",
            "batch_size": 5,
            "sphere": {"eta": 0.3, "alpha": 0.2},
            "targets": {"lr": 0.5},
            "options": {"l2": 1},
        },
        {"sphere": {"eta": 0.4}, "options": {"null_space_threshold": 2}},
        {"batch_size": 7, "targets": {}},
    )
    assert (settings.batch_size, settings.sphere.eta, settings.sphere.alpha) == (7, 0.4, 0.2)
    assert settings.targets.lr == 0.5
    assert settings.options == {"l2": 1, "null_space_threshold": 2}


def test_merging_leaves_its_arguments_alone():
    base, over = {"sphere": {"eta": 0.3}}, {"sphere": {"eta": 0.4}}
    make_settings(base, over)
    assert (base, over) == ({"sphere": {"eta": 0.3}}, {"sphere": {"eta": 0.4}})


@pytest.mark.parametrize("name", METHODS)
def test_sphere_is_the_methods_own_but_for_what_is_said(name):
    published = METHODS[name].sphere
    assert make_settings({"method": name}).make_sphere() == published
    changed = make_settings({"method": name, "sphere": {"alpha": 0.25, "basis": "pretrained"}}).make_sphere()
    assert changed == published.model_copy(update={"alpha": 0.25, "basis": "pretrained"})
    plain = make_settings({"method": name, "sphere": {"enabled": False}})
    assert plain.make_sphere() is None
    assert plain.diagnostic_sphere() == published


def test_settings_survive_the_config_file_of_a_run():
    settings = make_settings(
        {
            "layers": [8, 4],
            "targets": {"lr": "1e-3"},
            "options": {"second_moment_weight": 3.5},
            "evaluation": {"every": 2},
        }
    )
    assert make_settings(json.loads(settings.model_dump_json())) == settings
    assert make_settings() == Settings()


# --- layers -------------------------------------------------------------------------------------------------------


def down(*layers):
    return tuple((layer, "down") for layer in layers)


@pytest.mark.parametrize(
    ("method", "depth", "expected"),
    [
        ("alphaedit", 30, down(4, 5, 6, 7, 8)),
        ("rome", 32, down(5)),
        ("emmet", 30, down(5)),
        ("ft", 32, down(21)),
        ("ultraedit", 28, tuple((layer, role) for layer in range(18, 27) for role in ("gate", "up"))),
    ],
)
def test_default_matrices(method, depth, expected):
    assert make_settings({"method": method}).resolved_matrices(PRE_NORM.of_depth(depth)) == expected


def test_ungated_families_take_the_matrix_that_writes_the_output():
    bare = dataclasses.replace(PRE_NORM, modules={"down": "mlp.out", "up": "mlp.in"})
    assert make_settings({"method": "ultraedit"}).resolved_matrices(bare.of_depth(28)) == down(*range(18, 27))


@given(st.integers(1, 80), st.sampled_from(list(METHODS)))
def test_default_layers_exist_at_every_depth(depth, method):
    kind, settings = METHODS[method], make_settings({"method": method})
    layers = kind.default_layers(depth)
    assert layers == tuple(range(layers[0], layers[-1] + 1))
    assert 0 <= layers[0] <= layers[-1] < depth
    assert sorted({layer for layer, _ in settings.resolved_matrices(PRE_NORM.of_depth(depth))}) == list(layers)
    single = settings.resolved_matrices(POST_NORM.of_depth(depth))
    assert not kind().needs.feed.at_subjects or single == ((layers[-1], "down"),)


def test_chosen_layers_come_lowest_first():
    assert make_settings({"layers": [6, 2, 4]}).resolved_matrices(PRE_NORM.of_depth(7)) == down(2, 4, 6)
    assert make_settings({"layers": [0]}).resolved_matrices(POST_NORM.of_depth(1)) == down(0)
    chosen = {"method": "ultraedit", "layers": {"up": [5, 3], "gate": [3]}}
    assert make_settings(chosen).resolved_matrices(PRE_NORM.of_depth(7)) == ((3, "gate"), (3, "up"), (5, "up"))


def test_resolved_settings_choose_the_same_matrices_again():
    chosen = [{"method": method} for method in METHODS]
    chosen += [{"method": method, "layers": {"down": [3, 9]}} for method in METHODS if method not in ("rome",)]
    chosen += [{"method": "ultraedit", "layers": [3]}, {"method": "ft", "layers": {"gate": [2], "down": [2]}}]
    for wish in chosen:
        settings = make_settings(wish)
        matrices = settings.resolved_matrices(PRE_NORM.of_depth(30))
        kept = make_settings(json.loads(settings.with_resolved(matrices, torch.device("cpu")).model_dump_json()))
        assert kept.resolved_matrices(PRE_NORM.of_depth(30)) == matrices


@pytest.mark.parametrize(
    ("layers", "family", "message"),
    [
        ([4, 4], PRE_NORM, "--layers takes different layer numbers, not [4, 4]"),
        ([], PRE_NORM, "--layers takes different layer numbers, not []"),
        ([28, 30], PRE_NORM, "layers [28, 30] do not all exist: this model has layers 0 to 29"),
        ([-1], PRE_NORM, "layers [-1] do not all exist: this model has layers 0 to 29"),
        ([7, 8], GATED, "this model gates or changes each MLP's output, so one layer is edited and not 2: "),
        ({"gate": [3]}, PRE_NORM, "frugal edits the matrices that write the MLP's output; give --layers 4-8"),
        ({"side": [3]}, PRE_NORM, "this model has no 'side' matrix; it has "),
        ({}, PRE_NORM, "--layers takes layer numbers for at least one role"),
        ({"down": [3, 3]}, PRE_NORM, "--layers takes different layer numbers, not [3, 3]"),
    ],
)
def test_layers_that_cannot_be_edited(layers, family, message):
    with pytest.raises(SphereEditError) as caught:
        make_settings({"layers": layers}).resolved_matrices(family.of_depth(30))
    assert str(caught.value).startswith(message)
    assert family is PRE_NORM or str(caught.value).endswith("use --layers 8")


# --- files --------------------------------------------------------------------------------------------------------


def settings_file(folder: Path, content: str | bytes) -> Path:
    path = folder / "settings.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", {}),
        ("# nothing yet\n", {}),
        ("\ufeffseed: 3\n", {"seed": 3}),
        ("layers: [4, 5]\nsphere:\n  eta: 0.4\n", {"layers": [4, 5], "sphere": {"eta": 0.4}}),
        ('{"batch_size": 10}', {"batch_size": 10}),
    ],
)
def test_a_settings_file_is_read(tmp_path, content, expected):
    content = read_settings_file(settings_file(tmp_path, content))
    assert content == expected
    make_settings(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a: [", " is not valid YAML: while parsing a flow node"),
        ("a: b: c", " is not valid YAML: mapping values are not allowed here"),
        ("a: \x00", " is not valid YAML: unacceptable character"),
        ("? [1]\n: 2", " is not valid YAML: while constructing a mapping"),
        ("a: 2024-13-45", " is not valid YAML: month must be in 1..12"),
        ("a: 0x_", " is not valid YAML: invalid literal for int() with base 16"),
        ("a: !!timestamp x", " is not valid YAML: "),
        ("a: " + "9" * 5000, " is not valid YAML: "),
        ("[" * 2000, " is not valid YAML: "),
        ("a: !!python/object/apply:os.getcwd []", " is not valid YAML: could not determine a constructor for the tag"),
        (b"a: \xff", " cannot be read: 'utf-8' codec can't decode byte 0xff"),
        ("- 1\n- 2\n", ": expected names and values, found list"),
        ("just text", ": expected names and values, found str"),
    ],
)
def test_a_settings_file_that_is_none(tmp_path, content, reason):
    path = settings_file(tmp_path, content)
    with pytest.raises(SphereEditError) as caught:
        read_settings_file(path)
    assert str(caught.value).startswith(f"settings file {path}{reason}")
    assert "\n" not in str(caught.value)


def test_a_settings_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(SphereEditError, match=f"settings file {path} cannot be read: "):
            read_settings_file(path)


def test_yaml_whose_aliases_grow_is_refused_before_it_is_spelled_out(tmp_path):
    path, began = tmp_path / "settings.yaml", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lists = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lists += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    merged = ["a0: &a0 {x: 1, y: 2}"]
    merged += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 12)]
    for text in ("\n".join(lists), "\n".join(merged), "a: &a [*a, *a]", "a: &a {b: *a}"):
        path.write_text(text)
        with pytest.raises(
            SphereEditError, match="is not valid YAML: with its aliases spelled out it holds more than"
        ) as caught:
            read_settings_file(path)
        assert len(str(caught.value)) < 500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - began < 1 << 19, "kilobytes"
    path.write_text("a: &a {seed: 1}\nb: *a\nc: {<<: *a}\n")
    assert read_settings_file(path) == {"a": {"seed": 1}, "b": {"seed": 1}, "c": {"seed": 1}}
