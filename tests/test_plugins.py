"""Methods from outside the package: registered from a file, with ingredients of their own, in every command."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from conftest import fact_records
from families import save_tiny
from sphere_edit import SphereEditError, plugins, read_facts, register_format
from sphere_edit.cli import app
from sphere_edit.editing.methods import METHODS, make_method, register_file, register_method
from sphere_edit.editor import opened
from sphere_edit.facts.shapes import FORMATS
from sphere_edit.progress import Quiet
from sphere_edit.reporting.colours import colour_of
from sphere_edit.reporting.methods import method_tables
from sphere_edit.runs.commit import Committer
from test_cli import run

PAGE = (Path(__file__).parents[1] / "docs" / "methods.md").read_text("utf-8")
SETTINGS = (
    "{batch_size: 2, templates: 0, targets: {steps: 6, lr: 0.5}, moments: {sampled_tokens: 256}, tokens_per_batch: 256}"
)

TALLY = '''
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sphere_edit import register_method
from sphere_edit.editing.ingredients import Ingredient
from sphere_edit.editing.methods.memit import Memit


@dataclass(frozen=True)
class Tally(Ingredient):
    name: ClassVar[str] = "tally"
    words: ClassVar[str] = "how many facts there were"

    def of_matrix(self, original):
        return {"size": original.norm()[None]}

    def of_batch(self, source, names):
        return {name: {"facts": torch.full((1, 1), float(len(source._facts)))} for name in names}

    def of_problem(self, problem):
        return {"tally": problem.given["facts"]}

    def once_written(self, source, facts):
        return {name: {"written": torch.full((1, 1), float(len(facts)))} for name in source.weights.names}

    def of_weights(self, weights, name):
        return {"moved": weights.working[name].norm()[None]}


@register_method
class Counting(Memit):
    """``ΔW`` of MEMIT, smaller from batch to batch."""

    name: ClassVar[str] = "counting"

    @property
    def needs(self):
        return super().needs.plus(Tally())

    def solve(self, problem, state):
        assert set(problem.given) == {"size", "facts"}
        update = super().solve(problem, state)
        return type(update)(update.left / (1 + state.get("count", torch.zeros(1, 1))), update.right)

    def after_batch(self, state, seen, statistics):
        assert set(seen) == {"tally", "written", "moved"}
        return {"count": state.get("count", 0) + seen["tally"], "moved": seen["moved"], "repairs": torch.zeros(1)}

    def after_repair(self, state, seen, statistics):
        return {**state, "moved": seen["moved"], "repairs": state["repairs"] + 1}
'''


@pytest.fixture(autouse=True)
def own_table():
    """What a test registers is gone after it, as after a command."""
    known = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(known)
    FORMATS.clear()
    for name in [name for name in sys.modules if name.startswith("sphere_edit_plugin_")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """The page's example and a method of many hooks as plugins, facts, and settings."""
    example, *_ = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    contents = {
        "ridge.py": example,
        "counting.py": TALLY,
        "settings.yaml": SETTINGS,
        "facts.jsonl": "".join(json.dumps(record) + "\n" for record in fact_records(4)),
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content, "utf-8")
    return {name.split(".")[0]: tmp_path / name for name in contents}


def listed_needs(method: str) -> list[str]:
    """What `sphere-edit methods` says of a method's needs, however narrow the screen."""
    listed = method_tables()[0]
    names, needs = ([str(cell) for cell in listed.columns[number].cells] for number in (0, 2))
    return [need for name, need in zip(names, needs, strict=True) if name == method]


def test_the_pages_example_works_in_every_command(model, files, tmp_path):
    plugin, folder = ["--plugin", files["ridge"]], tmp_path / "run"
    edit = ["edit", model, files["facts"], "-o", folder, "--config", files["settings"], "--method", "ridge"]
    plan = run(*plugin, *edit, "--dry-run")
    assert "second moments" in plan
    told = run(*plugin, *edit)
    assert f"sphere-edit --plugin {files['ridge']} export {folder} -o DIR" in told, "a hint can be given as it stands"
    assert plugins.options() == ["--plugin", str(files["ridge"])]
    listed = run(*plugin, "methods")
    assert "mean squared length of ordinary keys" in " ".join(listed_needs("ridge"))
    assert " strength " in listed
    assert "ridge" in run(*plugin, "show", folder)
    assert len(list((folder / "statistics" / "key_size").iterdir())) == len(
        json.loads((folder / "config.json").read_text())["matrices"]
    )
    run(*plugin, "report", folder)
    assert colour_of("ridge") in (folder / "report.html").read_text("utf-8").upper()
    run(*plugin, "export", folder, "-o", tmp_path / "exported")
    with pytest.raises(
        SphereEditError, match="tune sets layers, step and weight of second moments, which ridge has not"
    ):
        run(*plugin, "tune", model, "--method", "ridge")
    run(*plugin, "rollback", folder, "--to", "1")
    with opened(folder, Quiet()) as editor:
        assert editor.run.history.head == 1

    # another command that does not name the file knows nothing of it, and says what to give
    del METHODS["ridge"]
    with pytest.raises(SphereEditError, match="no method 'ridge'.*sphere-edit --plugin FILE.py"):
        run("export", folder, "-o", tmp_path / "again")


def test_a_bench_has_a_row_for_it(model, files, tmp_path):
    bench = {
        "models": [str(model)],
        "data": {"own": {"source": str(files["facts"])}},
        "methods": {"memit": {}, "ridge": {}},
        "variants": ["plain"],
        "settings": yaml.safe_load(SETTINGS),
    }
    (tmp_path / "bench.yaml").write_text(yaml.safe_dump(bench))
    table = run("--plugin", files["ridge"], "bench", tmp_path / "bench.yaml", "-o", tmp_path / "out")
    assert re.search(r"\| ridge +\|", table)
    assert colour_of("ridge") in (tmp_path / "out" / "report.html").read_text("utf-8").upper()


def test_what_an_ingredient_gives_survives_resume_replay_and_repair(model, files, tmp_path, monkeypatch):
    """The state of a method of every hook is the same after an interruption, and put together from the journal alone."""
    edit = ["--plugin", files["counting"], "edit"]
    settings = {**yaml.safe_load(SETTINGS), "method": "counting", "repair": 1}
    files["settings"].write_text(yaml.safe_dump(settings))
    monkeypatch.setattr("sphere_edit.editing.repair._FACTS_A_STEP", 1)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(*edit, model, files["facts"], "-o", whole, "--config", files["settings"])

    real = Committer.edit

    def once(self, *args):
        if self.run.history.head == 1:
            raise SphereEditError("stopped")
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Committer, "edit", once)
        with pytest.raises(SphereEditError, match="stopped"):
            run(*edit, model, files["facts"], "-o", broken, "--config", files["settings"])
    run(*edit, broken, "--resume")
    states = []
    for folder in (whole, broken):
        for checkpoint in (folder / "checkpoints").iterdir():
            checkpoint.unlink()
        with opened(folder, Quiet()) as editor:
            assert [batch.kind for batch in editor.run.history.batches] == ["edit", "edit", "repair"]
            states.append(editor._stream.committer.states)
            for name, state in states[-1].items():
                assert float(state["count"]) == 4.0
                assert float(state["repairs"]) == 1.0, "a repair is no batch"
                assert torch.equal(state["moved"], editor.weights.working[name].norm()[None])
    for name, state in states[0].items():
        assert all(torch.equal(value, states[1][name][part]) for part, value in state.items())


def test_an_installed_package_is_asked_when_a_name_is_unknown(files, tmp_path, monkeypatch):
    (tmp_path / "a_package_of_methods.py").write_text(files["counting"].read_text())
    monkeypatch.syspath_prepend(tmp_path)
    offered = [EntryPoint("counting", "a_package_of_methods:Counting", plugins.GROUP)]
    monkeypatch.setattr(plugins, "entry_points", lambda group: offered)
    assert make_method("counting", {}).name == "counting"
    assert " counting " in run("methods")
    assert "how many facts there were" in " ".join(listed_needs("counting"))
    offered.append(EntryPoint("gone", "a_package_that_is_not_there:Gone", plugins.GROUP))
    make_method("counting", {}), make_method("memit", {})
    with pytest.raises(
        SphereEditError, match="'gone' of the installed package .* cannot be imported: ModuleNotFoundError"
    ):
        make_method("gone", {})


def test_a_file_run_again_takes_the_place_of_the_first(files):
    assert register_file(files["counting"]) == ["counting"]
    files["counting"].write_text(TALLY.replace("smaller from batch", "larger from batch"))
    assert register_file(files["counting"]) == ["counting"]
    assert "larger" in METHODS["counting"].__doc__
    other = files["counting"].with_name("other.py")
    other.write_text(TALLY)
    with pytest.raises(SphereEditError, match="there is a method 'counting' already"):
        register_file(other)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ("x = 1", "registers nothing: put @register_method before a method's class, or @register_format"),
        ("x = 1\nx +", "does not run: line 2: SyntaxError"),
        ("\n\nraise ValueError('so')", "does not run: line 3: ValueError: so"),
        (TALLY.replace('"counting"', '"memit"'), "Counting cannot be registered .* there is a method 'memit' already"),
        (TALLY.replace('"counting"', '"Two Words"'), "must be a word of small letters"),
        (TALLY.replace('name: ClassVar[str] = "counting"', 'x: float'), "its defaults do not work: 'x': Field required|'memit' already"),
        (TALLY.replace('"tally"', '"keys"'), "there is an ingredient 'keys' already"),
        (TALLY.replace("plus(Tally())", "plus(Tally(), Tally())"), "the ingredient 'tally' is asked for twice"),
        (TALLY.replace("plus(Tally())", "plus(1)"), "an ingredient must be derived from Ingredient|has no attribute"),
        (TALLY.replace("super().needs.plus(Tally())", "None"), "'needs' must be Needs"),
        (TALLY.replace("def after_repair", "def forget"), "its needs must name EarlierKeys"),
        (TALLY.replace('"""``ΔW`` of MEMIT, smaller from batch to batch."""', ""), "it has no docstring"),
        ("from sphere_edit import register_method\nregister_method(int)", "int is no editing method"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_a_sentence(tmp_path, content, message):
    file = tmp_path / "plugin.py"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SphereEditError, match=message):
        run("--plugin", file, "methods")


def test_an_unfinished_class_and_one_whose_feed_has_no_problems_are_refused():
    from sphere_edit.editing.ingredients import EarlierKeys, Needs
    from sphere_edit.editing.losses import FromGradients, FromLoss
    from sphere_edit.editing.methods.base import LayerwiseMethod
    from sphere_edit.editing.methods.memit import Memit

    with pytest.raises(SphereEditError, match="LayerwiseMethod cannot be registered .* it leaves out needs, solve"):
        register_method(LayerwiseMethod)

    class Lost(Memit):
        """ΔW of nothing."""

        name = "lost"

        @property
        def needs(self) -> Needs:
            return Needs(FromLoss())

    with pytest.raises(SphereEditError, match="FromLoss makes no problems of that kind"):
        register_method(Lost)
    with pytest.raises(
        SphereEditError, match="'keys' is measured at the facts' subjects, which problems from one backward pass"
    ):
        Needs(FromGradients(), (EarlierKeys(),))


def test_colours_of_further_methods_are_their_own_and_the_packages_stay():
    assert colour_of("alphaedit") == "#0072B2"
    assert colour_of("frugal") == "#66A61E"
    found = [colour_of(method) for method in METHODS]
    assert len(set(found)) == len(found)
    assert colour_of("mine") == colour_of("mine") not in found
    first = colour_of("mine")
    METHODS["mine"] = METHODS["memit"]
    assert colour_of("mine") == first, "a run's colour does not hang on whether its method is registered"
    METHODS["yours"] = METHODS["memit"]
    assert len({colour_of(method) for method in METHODS}) == len(METHODS)


# --- formats ------------------------------------------------------------------------------------------------------

FORMAT_PAGE = (Path(__file__).parents[1] / "docs" / "howto" / "format.md").read_text("utf-8")


def test_the_pages_format_is_read_by_a_command(model, files, tmp_path):
    *_, example = re.findall(r"```python\n(.*?)```", FORMAT_PAGE, re.DOTALL)
    (tmp_path / "theirs.py").write_text(example, "utf-8")
    lines = [
        {"entity": "Big Ben", "question": "Big Ben stands in", "gold": ["Vienna", "Wien"], "was": "London"},
        {"entity": "Madrid", "question": "Madrid lies in", "gold": ["Japan"], "was": "Spain"},
    ]
    data = tmp_path / "theirs.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plugin = ["--plugin", tmp_path / "theirs.py"]
    edit = [*plugin, "edit", model, data, "--config", files["settings"], "--method", "memit", "-o"]
    plan = run(*edit, tmp_path / "run", "--dry-run")
    assert "Facts read as Theirs: question is edited to the first of gold; of 2: target_true in 2, answers in 1" in plan
    run(*edit, tmp_path / "run")
    facts = (tmp_path / "run" / "facts" / "0001.jsonl").read_text().splitlines()
    assert [json.loads(fact)["target_new"] for fact in facts] == ["Vienna", "Japan"]
    data.write_text(json.dumps({"entity": "Big Ben", "question": "Big Ben stands in", "gold": []}))
    with pytest.raises(SphereEditError, match="record 1: gold is empty"):
        run(*edit, tmp_path / "again", "--dry-run")
    FORMATS.clear()
    with pytest.raises(SphereEditError, match="'subject' is missing"):
        run("edit", model, data, "-o", tmp_path / "again", "--dry-run")
    run("show", tmp_path / "run")  # whose facts are kept as they were understood


def test_a_format_gives_several_facts_and_reads_csv(tmp_path):
    def pairs(record):
        return [
            {"subject": name, "prompt": "{} lies in", "target_new": record["land"]}
            for name in record["towns"].split("/")
        ]

    register_format("Towns {of} a land", fits=lambda record: record.keys() >= {"towns", "land"})(pairs)
    (tmp_path / "towns.csv").write_text("towns,land\nRome/Oslo,Japan\n")
    given = read_facts(tmp_path / "towns.csv")
    assert [fact.filled_prompt for fact in given.facts] == ["Rome lies in", "Oslo lies in"]
    assert given.protocol == "Towns {of} a land"
    register_format("Mine", fits=lambda record: len(record["towns"]) > 2)(pairs)
    with pytest.raises(SphereEditError, match="the format 'Mine' cannot say whether a record is its own: TypeError"):
        read_facts(tmp_path / "towns.csv")


def test_a_plugin_named_behind_the_command_is_told_where_it_belongs():
    result = CliRunner().invoke(app, ["edit", "smollm2", "facts.jsonl", "--plugin", "mine.py"])
    assert result.exit_code == 2
    assert "--plugin stands before the command" in " ".join(result.output.split())
