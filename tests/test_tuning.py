"""`sphere-edit tune`: a calibration that leaves the model as it was, keeps what it found, and is taken by later runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import harmonic_mean
from types import SimpleNamespace

import pytest
import torch
import yaml
from filelock import FileLock

from conftest import fact_records
from families import save_tiny
from sphere_edit import SphereEditError
from sphere_edit import trials as trials_module
from sphere_edit import tuning as tuning_module
from sphere_edit.bench import Bench, BenchConfig
from sphere_edit.editing import sources, statistics
from sphere_edit.editing.presets import read_tuned, tuned_file
from sphere_edit.editing.settings import make_settings
from sphere_edit.editor import Editor
from sphere_edit.facts.readers import facts_from, read_facts
from sphere_edit.models.loading import load_model
from sphere_edit.progress import Quiet
from sphere_edit.trials import STREAM, Trial
from sphere_edit.trials import Bench as Trials
from sphere_edit.tuning import _best_span, _moved, _tried_along, calibrate, tune
from test_cli import run
from test_runs import Listening

pytestmark = pytest.mark.usefixtures("blank_figures")

QUICK = {
    "method": "frugal",
    "templates": 0,
    "targets": {"steps": 6},
    "moments": {"sampled_tokens": 512},
    "tokens_per_batch": 512,
}
UNTUNED = {name: value for name, value in QUICK.items() if name != "targets"}  # leaves the targets to a calibration


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


def test_every_trial_is_an_edit_that_is_taken_back_and_the_best_is_kept_for_later_runs(model, tmp_path, monkeypatch):
    loaded = load_model(str(model))
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    facts = facts_from(fact_records(4)).facts
    listening = Listening()
    trials = tune(loaded, make_settings(QUICK), listening, facts)
    assert "so nothing speaks for any of them" in listening.said[-1]
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    rest = [trial.score for trial in trials[1:]]
    assert rest == sorted(rest, reverse=True)
    spans = {tuple(trial.settings["layers"]) for trial in trials}
    assert len(spans) > 1
    assert {"options", "targets"} <= {name for trial in trials for name in trial.settings}
    assert len({trial.divergence for trial in trials}) == len(trials), "each setting does something else to the model"
    for trial in trials:
        left = math.exp(-trial.divergence * STREAM / len(facts))
        parts = [trial.summary[part] / 100 for part in ("efficacy_strict", "generalization_strict", "specificity")]
        assert trial.score == pytest.approx(harmonic_mean([*parts, left]))
    assert trials[0].score == 0, "a model of random weights learns no fact in six steps"
    assert read_tuned(loaded.fingerprint, "frugal") is None, "what did not work is not kept"
    with monkeypatch.context() as patch:
        patch.setattr(Trial, "score", property(lambda self: 0.5))
        trials = tune(loaded, make_settings(QUICK), Quiet(), facts)
    assert read_tuned(loaded.fingerprint, "frugal") == trials[0].settings
    assert read_tuned(loaded.fingerprint, "memit") is None

    chosen = {**trials[0].settings, "layers": [1, 2], "options": {"second_moment_weight": 0.07}}
    tuned_file(loaded.fingerprint, "frugal").write_text(json.dumps({"settings": chosen}))
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=Quiet(), method="frugal")
    assert (editor.session.layers, editor.session.method.second_moment_weight) == ([1, 2], 0.07)
    assert editor.session.preset == "tuned for this model"
    said = Editor.from_pretrained(model, tmp_path / "other", reporter=Quiet(), method="frugal", layers=[0])
    assert (said.session.layers, said.session.method.second_moment_weight) == ([0], 0.07), "what is said wins"
    plain = Editor.from_pretrained(model, tmp_path / "third", reporter=Quiet(), method="memit")
    assert plain.session.preset is None


def test_a_trial_is_what_a_run_of_one_batch_does(model, tmp_path):
    """The calibration's short loop against the sequential one."""
    facts = facts_from(fact_records(4)).facts
    loaded = load_model(str(model))
    trials = tune(loaded, make_settings(QUICK), Quiet(), facts)
    trial = next(trial for trial in trials if set(trial.settings) == {"layers"})
    tuned_file(loaded.fingerprint, "frugal").unlink(missing_ok=True)
    editor = Editor.from_pretrained(
        model, tmp_path / "run", reporter=Quiet(), **{**QUICK, "recheck": 0, "repair": 0, **trial.settings}
    )
    metrics = editor.edit([fact.as_dict() for fact in facts])
    assert metrics["edited"]["divergence"] == pytest.approx(trial.divergence, rel=1e-3)
    assert metrics["edited"]["specificity"] == pytest.approx(trial.summary["specificity"])
    assert metrics["edited"]["efficacy_strict"] == pytest.approx(trial.summary["efficacy_strict"])


def trial_of(strict: list[float], general: list[float], specific: list[float], divergence: float = 0.0) -> Trial:
    return Trial({}, divergence, torch.tensor([strict, general, specific], dtype=torch.float64).T)


def test_a_setting_gives_way_only_to_one_that_is_better_beyond_noise():
    """Three facts of sixty are luck, a third of them is not; nor is what is the same in every fact but costs the model more."""
    sure = [1.0] * 60
    default = trial_of(sure, [1.0] * 30 + [0.0] * 30, sure, 0.01)
    luckier = trial_of(sure, [1.0] * 31 + [0.0] * 27 + [1.0, 1.0], sure, 0.01)
    better = trial_of(sure, [1.0] * 50 + [0.0] * 10, sure, 0.01)
    gentler = trial_of(sure, [1.0] * 30 + [0.0] * 30, sure, 0.005)
    assert luckier.score > default.score
    assert not luckier.beats(default)
    assert better.beats(default)
    assert gentler.beats(default)
    assert not default.beats(default)
    assert not default.beats(better)


def test_a_score_is_over_what_there_is_to_measure():
    nothing = float("nan")
    bare = trial_of([1.0, 0.0], [nothing] * 2, [1.0, nothing], 0.0)
    assert bare.summary["generalization_strict"] is None
    assert bare.score == pytest.approx(harmonic_mean([0.5, 1.0, 1.0]))
    assert "generalization –" in str(bare)
    assert trial_of([0.0], [1.0], [1.0]).score == 0
    assert trial_of([1.0], [1.0], [1.0], math.inf).score == 0


def test_spans_follow_the_depth(model, tmp_path):
    """The default five layers first; then ends from a tenth to under half of the depth, so that shallow models have some of their own."""
    loaded = load_model(str(model))
    spans = Trials(loaded, make_settings(QUICK), facts_from(fact_records(2)).facts, Quiet()).spans()
    depth = len(loaded.architecture.decoder_layers(loaded.model))
    assert spans[0] == make_settings(QUICK).make_method().default_layers(depth)
    assert len(set(spans)) == len(spans) > 1
    assert all(span == tuple(range(span[0], span[-1] + 1)) and 0 <= span[0] <= span[-1] < depth for span in spans)


class Pretended:
    """A bench on which a trial is what a table says: the parts of fifteen facts, or of sixty, and the damage."""

    def __init__(self, outcomes: dict[str, tuple[float, float, float, float]], looks: list[str] = ()):
        self.outcomes, self.names = outcomes, looks
        self.tried: list[str] = []
        self.reporter = Listening()
        self.part, self.whole = SimpleNamespace(facts=[0] * 15), SimpleNamespace(facts=[0] * 60)

    def made(self, settings: dict, count: int) -> Trial:
        *shares, damage = self.outcomes[repr(settings)]
        parts = torch.stack([(torch.arange(count) < share * count).double() for share in shares], 1)
        return Trial(settings, damage * count / STREAM, parts)

    def looks(self) -> list[Trial]:
        return [self.made({"layers": [layer]}, 15) for layer in self.names]

    def trial(self, settings: dict) -> Trial:
        self.tried.append(repr(settings))
        return self.made(settings, 60)


def layer(number: int) -> str:
    return repr({"layers": [number]})


@pytest.mark.parametrize(
    ("outcomes", "tried", "chosen"),
    [
        # one span is far better than the default and the rest: it alone is tried on all facts
        ({6: (0.9, 0.1, 0.9, 0), 3: (1.0, 0.8, 0.9, 0), 2: (0.3, 0.1, 0.9, 0)}, [3], 3),
        # one that may be better than the default is held against it, and the default stays where the difference is noise
        ({6: (1.0, 0.67, 0.9, 0), 3: (1.0, 0.7, 0.9, 0), 2: (0.3, 0.1, 0.9, 0)}, [6, 3], 6),
        # the default is the best at once
        ({6: (1.0, 0.8, 0.9, 0), 3: (0.4, 0.1, 0.9, 0)}, [6], 6),
        # neither of two that are far better than the default is clearly so
        ({6: (0.5, 0.1, 0.9, 0), 3: (1.0, 0.8, 0.9, 0), 2: (1.0, 0.74, 0.9, 0)}, [3, 2], 3),
    ],
)
def test_only_spans_that_may_be_the_best_are_tried_on_all_facts(outcomes, tried, chosen):
    bench = Pretended({layer(number): parts for number, parts in outcomes.items()}, list(outcomes))
    assert _best_span(bench).settings == {"layers": [chosen]}
    assert bench.tried == [layer(number) for number in tried]
    assert bench.reporter.said[0].startswith("Guessed from 15 of 60 facts: layer ")


@pytest.mark.parametrize(
    ("scores", "tried"),
    [
        # too little is written: less weight of ordinary keys, as long as that helps, and never more
        ({0: (0.9, 0.2, 0.9, 0), 1: (1.0, 0.5, 0.9, 0), 2: (1.0, 0.4, 0.9, 0)}, [1, 2]),
        ({0: (0.9, 0.2, 0.9, 0), 1: (0.9, 0.1, 0.9, 0)}, [1]),
        # too little is kept: more
        ({0: (1.0, 0.9, 0.3, 0.1), -1: (1.0, 0.8, 0.8, 0), -2: (1.0, 0.2, 0.9, 0)}, [-1, -2]),
        # neither is the weaker one: both ways, unless the first helps
        ({0: (1.0, 0.9, 1.0, 0), 1: (1.0, 0.8, 0.9, 0), -1: (0.9, 0.8, 1.0, 0)}, [1, -1]),
    ],
)
def test_a_setting_is_moved_to_where_the_weaker_part_gains_and_no_further_than_that_helps(scores, tried):
    bench = Pretended({repr({"power": power} if power else {}): parts for power, parts in scores.items()})
    chosen = bench.made({}, 60)
    found = _tried_along(bench, chosen, "it", lambda power: {"power": power})
    assert [trial.settings["power"] for trial in found] == tried


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        # twice as far scores more, within noise of once as far, which is what a stream is spared the cost of
        ({0: (1.0, 0.2, 0.9, 0), 1: (1.0, 0.7, 0.9, 0), 2: (1.0, 0.72, 0.9, 0)}, 1),
        ({0: (1.0, 0.2, 0.9, 0), 1: (1.0, 0.5, 0.9, 0), 2: (1.0, 0.8, 0.9, 0)}, 2),
        # once as far is noise, twice as far is not
        ({0: (1.0, 0.4, 0.9, 0), 1: (1.0, 0.42, 0.9, 0), 2: (1.0, 0.8, 0.9, 0)}, 2),
        ({0: (1.0, 0.4, 0.9, 0), 1: (1.0, 0.42, 0.9, 0), 2: (1.0, 0.43, 0.9, 0)}, 0),
    ],
)
def test_each_step_of_a_setting_is_taken_only_if_it_is_better_beyond_noise(scores, chosen):
    bench = Pretended({repr({"power": power} if power else {}): parts for power, parts in scores.items()})
    found = _moved(bench, bench.made({}, 60), "it", lambda power: {"power": power})
    assert found.settings.get("power", 0) == chosen


def test_a_first_look_is_at_a_part_of_the_facts_and_its_targets_are_not_sought_again(model, monkeypatch):
    loaded, facts = load_model(str(model)), facts_from(fact_records(5)).facts
    monkeypatch.setattr(trials_module, "_SCREENED", 2)
    sought = []
    real = sources.optimise_targets
    monkeypatch.setattr(
        sources,
        "optimise_targets",
        lambda loaded, forms, *args: sought.append(len(forms)) or real(loaded, forms, *args),
    )
    bench = Trials(loaded, make_settings(QUICK), facts, Quiet())
    assert (len(bench.part.facts), len(bench.whole.facts)) == (3, 5)
    assert bench.part.heldout == bench.whole.heldout[::2]
    settings = {"layers": [1]}
    assert 0 < bench.reach(settings) < 1
    look = bench.trial(settings, bench.part)
    whole = bench.trial(settings)
    assert sought == [3, 2], "once for each fact"
    assert (len(look.parts), len(whole.parts)) == (3, 5)
    assert bench.trial(settings) is whole, "nor is anything tried twice"
    assert bench.trials == [whole]
    monkeypatch.setattr(trials_module, "_SCREENED", 15)
    alone = Trials(loaded, make_settings(QUICK), facts, Quiet()).trial(settings)
    assert whole.divergence == pytest.approx(alone.divergence, rel=1e-3), "found in two parts, and as one"


def test_where_one_layer_is_the_default_and_several_can_be_edited_both_are_looked_at(tmp_path, monkeypatch):
    loaded = load_model(str(save_tiny("gemma2", tmp_path / "model")))
    read = []
    real = statistics.second_moments
    monkeypatch.setattr(statistics, "second_moments", lambda *args: read.append(args[2]) or real(*args))
    bench = Trials(loaded, make_settings(QUICK), facts_from(fact_records(2)).facts, Quiet())
    looked = [trial.settings["layers"] for trial in bench.looks()]
    single, several = ([layers for layers in looked if (len(layers) == 1) is one] for one in (True, False))
    assert looked == [*single, *several]
    assert single[0] == list(bench.session({}).layers)
    assert several
    assert all(layers == list(range(layers[-1] + 1)) for layers in several), "the model has four layers"
    assert len(read) == 1, "all of them in one pass over the text"


def test_the_command_and_its_mistakes(model, tmp_path, monkeypatch):
    few = facts_from(fact_records(4))
    monkeypatch.setattr(tuning_module, "read_facts", lambda name: {"demo": few}.get(name) or read_facts(name))
    config = tmp_path / "quick.yaml"
    config.write_text(yaml.safe_dump({name: value for name, value in QUICK.items() if name != "method"}))
    kept = tuned_file(load_model(str(model)).fingerprint, "frugal")
    before = kept.read_text() if kept.is_file() else None
    with pytest.raises(SphereEditError, match="nothing was chosen, and nothing kept"):  # random weights learn nothing
        run("tune", model, "--config", config, "-o", tmp_path / "found.yaml")
    assert not (tmp_path / "found.yaml").exists()
    assert (kept.read_text() if kept.is_file() else None) == before
    monkeypatch.setattr(Trial, "score", property(lambda self: 0.5))
    out = run("tune", model, "--config", config, "-o", tmp_path / "found.yaml")
    assert "Calibration, frugal" in out
    found = yaml.safe_load((tmp_path / "found.yaml").read_text())
    assert found["method"] == "frugal"
    assert found["layers"]
    assert found["targets"]["steps"] == QUICK["targets"]["steps"], "what every trial had stands in the file too"
    config.write_text(yaml.safe_dump({**QUICK, "method": "ultraedit"}))
    assert "Calibration, memit" in run("tune", model, "--config", config, "--method", "memit"), "what is typed wins"
    config.write_text(yaml.safe_dump(QUICK))
    own = tmp_path / "own.json"
    own.write_text(json.dumps(fact_records(3)))
    assert "Calibration, frugal" in run("tune", model, "--config", config, "--facts", own)
    with pytest.raises(SphereEditError, match="gone.json"):
        run("tune", model, "--config", config, "--facts", tmp_path / "gone.json")
    with pytest.raises(SphereEditError, match="which ultraedit has not; take --method frugal"):
        tune(load_model(str(model)), make_settings({"method": "ultraedit"}), Quiet())


def test_the_first_run_on_an_unknown_model_calibrates_and_goes_by_what_it_finds(model, tmp_path, monkeypatch):
    """Once: later runs take the same settings; a user who says what he wants is not kept waiting."""
    known = facts_from(fact_records(3))
    monkeypatch.setattr(tuning_module, "read_facts", lambda name: known)
    facts = fact_records(4)
    where = tuned_file(load_model(str(model)).fingerprint, "frugal")
    where.unlink(missing_ok=True)
    config, source = tmp_path / "quick.yaml", tmp_path / "facts.json"
    source.write_text(json.dumps(facts))
    for name, options in (("said", {"layers": [1]}), ("other", {"method": "memit"})):
        editor = Editor.from_pretrained(model, tmp_path / "asked", reporter=Quiet(), **{**UNTUNED, **options})
        assert not editor.session.would_calibrate
        config.write_text(yaml.safe_dump({**UNTUNED, **options}))
        run("edit", model, source, "-o", tmp_path / name, "--config", config)
        assert not where.exists()
        assert json.loads((tmp_path / name / "config.json").read_text())["preset"] is None
    config.write_text(yaml.safe_dump(UNTUNED))
    plan = run("edit", model, source, "-o", tmp_path / "long", "--config", config, "--dry-run")
    assert "found by calibration first" in plan
    assert "calibration  " in plan
    assert not where.exists()
    run("edit", model, source, "-o", tmp_path / "long", "--config", config)
    chosen = json.loads(where.read_text())["settings"]
    kept = json.loads((tmp_path / "long" / "config.json").read_text())
    assert kept["preset"] == "tuned for this model"
    assert kept["layers"] == chosen["layers"]
    again = Editor.from_pretrained(model, tmp_path / "again", reporter=Quiet(), **UNTUNED)
    assert again.session.preset == "tuned for this model"
    assert not again.session.would_calibrate


def test_a_bench_on_an_unknown_model_calibrates_once_for_all_its_runs(model, tmp_path, monkeypatch):
    known = facts_from(fact_records(3))
    monkeypatch.setattr(tuning_module, "read_facts", lambda name: known)
    found = []
    monkeypatch.setattr(tuning_module, "tune", lambda *args: found.append(tune(*args)) or found[-1])
    where = tuned_file(load_model(str(model)).fingerprint, "frugal")
    where.unlink(missing_ok=True)
    source = tmp_path / "facts.json"
    source.write_text(json.dumps(fact_records(2)))
    config = {
        "models": [str(model)],
        "data": {"own": {"source": str(source)}},
        "methods": {"frugal": {}, "no repair": {"method": "frugal", "repair": 0}},
        "settings": UNTUNED,
    }
    bench = Bench(BenchConfig.model_validate(config), tmp_path / "bench")
    bench.execute(Quiet())
    assert not bench.failures
    assert len(found) == 1
    chosen = json.loads(where.read_text())["settings"]["layers"]
    for cell in bench.cells:
        kept = json.loads((bench.run_folder(cell) / "config.json").read_text())
        assert (kept["preset"], kept["layers"]) == ("tuned for this model", chosen)


def test_of_two_processes_one_calibrates_and_the_other_waits(model, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning_module, "tune", lambda *args: pytest.fail("the other one was at it"))
    where = tuned_file(load_model(str(model)).fingerprint, "frugal")
    where.unlink(missing_ok=True)
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=Quiet(), **UNTUNED)
    other = FileLock(f"{where}.lock")
    other.acquire()

    def finish(message: str, style: str = "") -> None:
        if "waiting" in message:
            where.write_text(json.dumps({"settings": {"layers": [1]}}))
            other.release()

    monkeypatch.setattr(editor.session.reporter, "say", finish)
    calibrate(editor, facts_from(fact_records(2)), False)
    assert editor.session.preset == "tuned for this model"
    assert editor.session.layers == [1]
