"""The command line, as a user meets it: every family, every command, and what it says to mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from conftest import fact_records
from families import FAMILIES, save_tiny
from old_runs import FOLDER as OLD_RUNS
from sphere_edit import SphereEditError, __version__
from sphere_edit.cli import app
from sphere_edit.editing.methods import METHODS
from sphere_edit.editor import Editor, opened
from sphere_edit.models.loading import prepare

pytestmark = pytest.mark.usefixtures("blank_figures")

SETTINGS = """
method: alphaedit
batch_size: 10
targets: {steps: 3, lr: 0.3}
moments: {sampled_tokens: 256}
options: {l2: 0.1, null_space: quantile, null_space_threshold: 0.8}
tokens_per_batch: 512
"""


QUESTIONS = ("Did the edits take?", "Is the rest intact?", "Is it still near itself?")


def invoked(*args: object, typed: str | None = None) -> Result:
    """Run a command, in one width; what it did, or the error it ends in."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], input=typed, env={"COLUMNS": "200"})
    if isinstance(result.exception, SphereEditError):
        raise result.exception
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def run(*args: object) -> str:
    """All that a command prints."""
    return invoked(*args).output


@pytest.fixture
def facts(tmp_path) -> Path:
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in fact_records(20)))
    return path


@pytest.fixture
def settings(tmp_path) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(SETTINGS)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, "float32") for family in FAMILIES), *((family, "bfloat16") for family in ("llama", "gpt2", "gemma2"))],
)
def test_edit_export_load_and_evaluate(family, dtype, tmp_path, facts, settings):
    """20 facts through the command line; the exported folder, loaded by plain transformers, scores as the run did."""
    folder = save_tiny(family, tmp_path / "model", getattr(torch, dtype))
    out = run("edit", folder, facts, "-o", tmp_path / "run", "--config", settings)
    assert "Efficacy" in out
    assert "Run folder" in out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["facts"] == 20
    run("export", tmp_path / "run", "-o", tmp_path / "exported")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert next(model.parameters()).dtype == getattr(torch, dtype)
    assert (tmp_path / "exported" / "generation_config.json").is_file()
    changed = [
        name
        for name, value in AutoModelForCausalLM.from_pretrained(folder).state_dict().items()
        if not torch.equal(value, model.state_dict()[name])
    ]
    matrices = json.loads((tmp_path / "run" / "config.json").read_text())["matrices"]
    assert sorted(changed) == sorted(f"{name}.weight" for name in matrices)
    assert prepare(model, tokenizer, "exported").architecture

    complete = tmp_path / "complete.jsonl"  # with the answers the unedited model gave
    unedited = json.loads((tmp_path / "run" / "evaluations" / "unedited-0001.json").read_text())
    rows = [
        {**record, "neighbors": [n for n in record["neighbors"] if n["answer_ids"] is None]}
        for record in unedited["facts"]
        if record["target_true_ids"] is None
    ]
    complete.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("eval", tmp_path / "exported", complete, "--json", tmp_path / "plain.json")
    plain = json.loads((tmp_path / "plain.json").read_text())["facts"]
    by_prompt = {(row["subject"], row["prompt"]): row["edited"] for row in metrics["per_fact"]}
    assert len(plain) > 10
    for row in plain:
        ours = by_prompt[row["fact"]["subject"], row["fact"]["prompt"]]
        for mine, theirs in [
            (ours["rewrite"], row["edited"]["rewrite"]),
            *zip(ours["paraphrases"], row["edited"]["paraphrases"], strict=True),
        ]:
            assert theirs["nll_right"] == pytest.approx(mine["nll_right"], abs=1e-3 if dtype == "float32" else 0.15)
            assert theirs["nll_other"] == pytest.approx(mine["nll_other"], abs=1e-3 if dtype == "float32" else 0.15)


def test_the_demo_ends_as_an_edit_does(model, tmp_path, monkeypatch):
    """With a tiny model in SmolLM2's place; test_smollm2_slow.py has the real one."""
    load = Editor.from_pretrained
    quick = {"targets": {"steps": 2}, "moments": {"sampled_tokens": 256}, "recheck": False, "repair": 0}
    monkeypatch.setattr(Editor, "from_pretrained", lambda name, **given: load(model, **given, **quick))
    out = run("demo", "-o", tmp_path / "demo", "--limit", 6)
    order = ["What the model says", "All 6 facts, after batch 3", *QUESTIONS, "Run folder:", "studio"]
    places = [out.index(text) for text in order]
    assert places == sorted(places)
    assert (tmp_path / "demo" / "report.html").is_file()


def test_a_whole_week(model, tmp_path, facts, settings):
    folder = tmp_path / "run"
    settings.write_text(
        SETTINGS.replace("{l2: 0.1, null_space: quantile, null_space_threshold: 0.8}", "{second_moment_weight: 0.1}")
    )
    common = [
        "--config",
        settings,
        "--method",
        "memit",
        "--no-sphere",
        "--seed",
        3,
        "--limit",
        8,
        "--batch-size",
        4,
        "--eval-every",
        1,
    ]
    plan = run("edit", model, facts, "-o", folder, *common, "--dry-run")
    assert "8 in batches of 4" in plan
    assert "time, all" in plan
    assert not folder.exists()
    assert "the same command without --dry-run edits" in plan.lower()
    assert "Text is sampled once for each model" in plan
    told = run("edit", model, facts, "-o", folder, *common, "--layers", "1-2")
    assert all(question in told for question in QUESTIONS)
    assert "of 8: target_true in 5, paraphrases in 8, neighbors in 8" in told
    assert "(strict efficacy " in told
    assert "(perplexity × " in told
    shown = run("show", folder)
    for text in (
        "Time by stage: targets",
        "Facts (5 of 8, failures first)",
        "memit, no SPHERE",
        "2 batches",
        "8 facts edited",
        "finished",
        "layers [1, 2]",
    ):
        assert text in shown
    log = folder / "journal.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    broken = [{**entry, "perplexity": None} if entry["event"] == "evaluation" else entry for entry in lines]
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "journal.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in broken))
    assert "not finite" in run("show", copy)
    more = tmp_path / "more.csv"
    more.write_text(
        "subject,prompt,target_new,paraphrases\nMadrid 2,The river of {} is the,Tiber,Where is Madrid 2? It is\n"
    )
    again = tmp_path / "again.json"
    again.write_text(json.dumps([{**fact_records(1)[0], "target_new": "Vienna"}]))
    assert "1 earlier fact" in run("edit", folder, again, "--dry-run")
    run("edit", folder, more)
    assert "3 batches" in run("show", folder)
    assert "efficacy" in run("eval", folder, more).lower()
    assert "as after batch 2" in run("rollback", folder, "--to", 2)
    assert "1 withdrawn" in run("show", folder)
    assert "nothing to resume" in run("edit", folder, "--resume")
    assert "the original model, bit for bit" in run("rollback", folder, "--to", 0)
    run("export", folder, "-o", tmp_path / "out")
    original = AutoModelForCausalLM.from_pretrained(model).state_dict()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(original[name], exported[name]) for name in original)


def test_command_line_wins_over_the_settings_file(model, tmp_path, facts, settings):
    plan = run(
        "edit",
        model,
        facts,
        "-o",
        tmp_path / "run",
        "--config",
        settings,
        "--batch-size",
        7,
        "--eta",
        0.25,
        "--dry-run",
    )
    assert "in batches of 7" in plan
    assert "eta: 0.25" in plan
    assert "steps: 3" in plan


def test_corpus_from_files_and_its_heldout_part(model, tmp_path, facts, settings):
    passages = [f"Passage {number}. The capital of France is Paris and Ada plays the violin." for number in range(20)]
    text, lines = tmp_path / "corpus.txt", tmp_path / "corpus.jsonl"
    text.write_text("\n\n".join(passages))
    lines.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in passages))
    results = []
    for number, corpus in enumerate((text, lines)):
        run("edit", model, facts, "-o", tmp_path / str(number), "--config", settings, "--limit", 4, "--corpus", corpus)
        config = json.loads((tmp_path / str(number) / "config.json").read_text())
        assert config["corpus"]["passages"] == 16
        assert config["corpus"]["heldout_passages"] == 4
        results.append(json.loads((tmp_path / str(number) / "metrics.json").read_text())["edited"])
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["edit", "{model}", "{facts}"], "where should the run go"),
        (["edit", "{model}", "-o", "{tmp}/r"], "which facts"),
        (["edit", "{model}", "{tmp}/none.json", "-o", "{tmp}/r"], "there is no file"),
        (["edit", "{tmp}/none", "{facts}", "-o", "{tmp}/r"], "there is no folder"),
        (["edit", "{model}", "{facts}", "-o", "{tmp}/r", "--layers", "two"], "--layers takes numbers"),
        (["edit", "{model}", "{facts}", "-o", "{tmp}/r", "--layers", "2,2"], "different layer numbers"),
        (["edit", "{model}", "{facts}", "-o", "{tmp}/r", "--layers", "9"], "has layers 0 to 3"),
        (["edit", "{model}", "{facts}", "-o", "{tmp}/r", "--eta", "1.5"], "'sphere.eta'.*less than or equal to 1"),
        (
            ["edit", "{model}", "{facts}", "-o", "{tmp}/r", "--batch-size", "0"],
            "'batch_size'.*greater than or equal to 1",
        ),
        (["edit", "{model}", "{facts}", "-o", "{tmp}/r", "--corpus", "{tmp}/none.txt"], "no corpus file"),
        (["edit", "{model}", "{facts}", "-o", "{tmp}/r", "--device", "abacus"], "device 'abacus' cannot be used"),
        (["edit", "{model}", "{facts}", "-o", "{facts}"], "is not a run folder; choose another|could not be written"),
        (["edit", "{model}", "{facts}", "-o", "{tmp}/r", "--config", "{tmp}/none.yaml"], "cannot be read"),
        (["edit", "{model}", "{facts}", "-o", "{tmp}"], "is not a run folder; choose another"),
        (["edit", "{model}", "{facts}", "-o", "{tmp}/done", "--resume"], "has the facts of other.json, not those of"),
        (["show", "{tmp}/damaged"], "config.json is damaged"),
        (["show", "{tmp}"], "is not a run folder"),
        (["rollback", "{tmp}", "--to", "1"], "is not a run folder"),
        (["export", "{tmp}", "-o", "{tmp}/x"], "is not a run folder"),
        (["eval", "{model}", "{tmp}/none.csv"], "there is no file"),
        (
            ["inspect", 300 * "m"],
            r"expected a model's hub id, folder or .gguf file, not 'm{60}…' \(File name too long\)",
        ),
        (["verify", 300 * "m"], "is neither a run folder nor an export"),
        (["apply", 300 * "m", "{model}", "-o", "{tmp}/x"], "is no export"),
    ],
)
def test_mistakes_are_told_in_a_sentence_before_any_work(model, tmp_path, facts, arguments, message):
    filled = [argument.format(model=model, facts=facts, tmp=tmp_path) for argument in arguments]
    finished = {
        "event": "facts", "session": 1, "count": 1, "source": "other.json", "sha256": "", "protocol": "", "left_out": []
    }  # fmt: skip
    for name, config in (("done", (OLD_RUNS / "alphaedit" / "config.json").read_text()), ("damaged", '{"schema": ')):
        if f"{tmp_path}/{name}" in filled:
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text(config)
            (tmp_path / name / "journal.jsonl").write_text(json.dumps(finished) + "\n")
    with pytest.raises(SphereEditError, match=rf"(?s){message}"):
        run(*filled)


def test_a_run_keeps_its_settings_and_its_name(model, tmp_path, facts, settings):
    folder = tmp_path / "run"
    run("edit", model, facts, "-o", folder, "--config", settings, "--limit", 2)
    for arguments, message in [
        (["edit", model, facts, "-o", folder], "holds a run already; add --resume"),
        (["edit", folder, facts, "--alpha", "0.1"], "these would change: sphere"),
        (["edit", folder], "which facts"),
        (["edit", folder, facts, "-o", tmp_path / "other"], "continues in its own folder"),
        (["edit", "smollm2", "-o", folder, "--resume"], "edits '.*', not 'smollm2'"),
        (["rollback", folder, "--to", "5"], "stands at batch 1, so 0 to 1 exist"),
        (["export", folder, "-o", facts], "exists already"),
    ]:
        with pytest.raises(SphereEditError, match=message):
            run(*arguments)


def test_bad_records_stop_a_run_before_it_starts_and_skip_bad_goes_on(model, tmp_path, facts, settings):
    with facts.open("a") as file:
        file.write('{"subject": "Nobody", "prompt": "Someone is", "target_new": "Rome"}\n{broken\n')
        file.write(json.dumps({**fact_records(1, start=15)[0], "target_new": "Madrid"}) + "\n")
    with pytest.raises(
        SphereEditError,
        match=r"(?s)2 records.*record 21: the subject 'Nobody' does not occur.*record 22: not valid JSON",
    ):
        run("edit", model, facts, "-o", tmp_path / "run", "--config", settings)
    assert not (tmp_path / "run").exists()
    run("edit", model, facts, "-o", tmp_path / "run", "--config", settings, "--skip-bad")
    entry = json.loads((tmp_path / "run" / "journal.jsonl").read_text().splitlines()[0])
    assert len(entry["left_out"]) == 2
    assert "1 superseded" in run("show", tmp_path / "run"), "record 23 contradicts record 16 of an earlier batch"


def test_the_readable_outside():
    assert __version__ in run("--version")
    for command in ("edit", "eval", "show", "rollback", "export", "demo", "methods"):
        assert "Usage" in run(command, "--help")


def test_an_unknown_method_is_told_which_exist(tmp_path, facts):
    with pytest.raises(SphereEditError, match="there is no method 'magic'; choose one of alphaedit, memit"):
        run("edit", "no-such-model", facts, "-o", tmp_path / "run", "--method", "magic")


def test_methods_lists_every_method_option_and_preset():
    shown = run("methods")
    for name, kind in METHODS.items():
        assert f" {name} " in shown
        assert kind.paper in shown
        for field in kind.model_fields:
            assert f" {field} " in shown
    for name in ("Llama-3-8B", "Qwen2.5-7B", "GPT-J-6B", "GPT2-XL"):
        assert name in shown


@pytest.mark.parametrize("method", ["rome", "ft", "ultraedit"])
def test_methods_without_v_at_the_layer_can_be_planned_run_shown_and_exported(model, tmp_path, facts, method):
    settings = tmp_path / "few.yaml"
    settings.write_text("{batch_size: 4, targets: {steps: 3}, moments: {sampled_tokens: 256}, tokens_per_batch: 512}")
    common = [model, facts, "-o", tmp_path / "run", "--config", settings, "--method", method, "--limit", 8]
    plan = run("edit", *common, "--dry-run")
    assert {"rome": "targets v*", "ft": "fine-tuning", "ultraedit": "gradients"}[method] in plan
    assert ("second moments" in plan.split("Estimate")[1]) == (method == "rome")
    assert "the method's defaults" in plan
    run("edit", *common)
    shown = run("show", tmp_path / "run")
    assert f"{method}" in shown
    assert "2 batches" in shown
    run("export", tmp_path / "run", "-o", tmp_path / "exported")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "exported")


def test_pruned_models_are_exported_as_they_are_deployed(model, tmp_path, facts):
    settings = tmp_path / "few.yaml"
    settings.write_text(
        "{batch_size: 4, targets: {steps: 3}, moments: {sampled_tokens: 256}, options: {second_moment_weight: 0.01}}"
    )
    run("edit", model, facts, "-o", tmp_path / "run", "--config", settings, "--method", "prune", "--limit", 8)
    run("export", tmp_path / "run", "-o", tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").state_dict()
    with opened(tmp_path / "run") as editor:
        for name in editor.weights.names:
            assert torch.equal(exported[f"{name}.weight"], editor.weights.deployed(name))
            assert not torch.equal(editor.weights.deployed(name), editor.weights.working[name])


def test_layers_by_role(model, tmp_path, facts):
    common = [model, facts, "-o", tmp_path / "run", "--method", "ultraedit", "--limit", 2, "--dry-run"]
    plan = "".join(run("edit", *common, "--layers", "gate:1-2,up:0,2").split())
    for name in ("0.mlp.up_proj", "1.mlp.gate_proj", "2.mlp.gate_proj", "2.mlp.up_proj"):
        assert name in plan
    for text, message in [
        ("1,up:2", "name the role of the first layers too"),
        ("gate:x", "--layers takes numbers such as 4-8, 4,6,8 or gate:11-15,up:18-24, not 'gate:x'"),
        ("side:1", "this model has no 'side' matrix; it has "),
    ]:
        with pytest.raises(SphereEditError, match=message):
            run("edit", *common, "--layers", text)


def test_every_option_of_edit_reaches_the_settings(monkeypatch):
    heard = []

    def admit(model, output, facts, resume, dry_run, over):
        heard.append(over)
        raise SphereEditError("enough")

    monkeypatch.setattr("sphere_edit.runs.admission.admit", admit)
    said = (
        "--method memit --no-sphere --eta 0.4 --alpha 0.7 --basis pretrained --project deployed --batch-size 7 --chat "
        "--system S --rewordings auto --layers 4-6 --matrices experts --corpus c --device cpu --dtype bfloat16 --seed 3 "
        "--eval-every 2 --eval-sample 5 --guard"
    )
    with pytest.raises(SphereEditError, match="enough"):
        run("edit", "model", "facts", "-o", "run", *said.split(), "--forms", "plain, chat")
    with pytest.raises(SphereEditError, match="enough"):
        run("edit", "model", "facts", "-o", "run")
    sphere = {"enabled": False, "eta": 0.4, "alpha": 0.7, "basis": "pretrained", "project": "deployed"}
    assert heard == [
        [
            {},
            {
                "method": "memit", "sphere": sphere, "batch_size": 7, "chat": True, "forms": ["plain", "chat"], "system": "S",
                "rewordings": "auto", "layers": [4, 5, 6], "matrices": "experts", "moments": {"corpus": "c"}, "device": "cpu",
                "dtype": "bfloat16", "seed": 3, "evaluation": {"every": 2, "sample": 5}, "guard": True,
            },
        ],
        [{}, {}],
    ]  # fmt: skip
