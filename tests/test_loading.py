"""Loading: the head against the model's own logits, quiet threads, tokenizers fast and slow, and the keys of caches."""

from __future__ import annotations

import json
import logging
import sys
import threading
from contextlib import contextmanager
from importlib.metadata import version

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaForCausalLM
from typer.testing import CliRunner

from conftest import fact_records
from families import _LLAMA, FAMILIES, tiny, tiny_model, tiny_tokenizer
from sphere_edit import SphereEditError
from sphere_edit.cli import app
from sphere_edit.editing import moments, statistics
from sphere_edit.models import architecture, identity
from sphere_edit.models.generation import generate
from sphere_edit.models.identity import tokenizer_identity
from sphere_edit.models.loading import prepare
from sphere_edit.models.quiet import quiet
from sphere_edit.progress import Quiet

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# --- the head -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_head_gives_the_models_own_logits(family, dtype):
    tiny(family, dtype)


class Scaled(LlamaForCausalLM):
    factor = 1 / 8

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.factor
        return output


@pytest.mark.parametrize("factor", [1 / 8, 1.1, float("nan")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_that_scales_its_logits_is_refused(dtype, factor, monkeypatch):
    model, tokenizer = tiny_model("llama", dtype)
    model.__class__ = Scaled
    monkeypatch.setattr(Scaled, "factor", factor)
    with pytest.raises(SphereEditError, match="logits of 'here' are not what its final norm and output embedding make"):
        prepare(model, tokenizer, "here")


@pytest.mark.parametrize(("family", "scale"), [("granite", {"logits_scaling": 8.0}), ("cohere", {"logit_scale": 0.1})])
def test_a_row_for_a_family_that_scales_its_logits_is_refused_as_wrong(family, scale, monkeypatch):
    """Somebody adds these families as if they were Llama's kin: loading says what is the matter."""
    row = architecture.Family((family,), "model.layers", "model.norm")
    monkeypatch.setattr(architecture, "FAMILIES", (*architecture.FAMILIES, row))
    tokenizer = tiny_tokenizer()

    def model(**options):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **{**_LLAMA, **options})
        return AutoModelForCausalLM.from_config(config)

    with pytest.raises(SphereEditError, match=f"this '{family}' model changes"):
        prepare(model(**scale), tokenizer, "here")
    prepare(model(**dict.fromkeys(scale, 1.0)), tokenizer, "here")


def test_a_model_that_cannot_be_run_is_told_so():
    model, tokenizer = tiny_model("llama")

    def broken(*args):
        raise RuntimeError("not implemented for 'Half'")

    model.model.layers[0].register_forward_pre_hook(broken)
    with pytest.raises(SphereEditError, match=r"model 'here' cannot be run on cpu in torch.float32: not implemented"):
        prepare(model, tokenizer, "here")


# --- threads ------------------------------------------------------------------------------------------------------


@contextmanager
def quiet_elsewhere():
    """Another thread stands in a quiet block inside; what it does there is done at its end."""
    inside, leave = threading.Event(), threading.Event()

    def work():
        with quiet():
            inside.set()
            leave.wait(20)
            print("theirs", file=sys.stderr)
            logging.getLogger("transformers.models").warning("theirs")

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(20)
    yield
    leave.set()
    thread.join()


@pytest.fixture
def logged():
    """Messages that reach a handler of transformers' log."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    yield messages
    assert handler.filters == []
    logging.getLogger("transformers").removeHandler(handler)


def test_a_quiet_thread_silences_no_other(capsys, logged):
    before = sys.stderr
    with quiet_elsewhere():
        print("ours", file=sys.stderr)
        logging.getLogger("transformers.models").warning("ours")
    assert capsys.readouterr().err == "ours\n"
    assert logged == ["ours"]
    assert sys.stderr is before


def test_quiet_blocks_that_overlap_leave_nothing_behind(capsys, logged):
    before, level = sys.stderr, logging.getLogger("transformers").level
    ours = quiet()
    with quiet_elsewhere():  # they begin, we begin, they end, we end
        ours.__enter__()
        with quiet():
            print("nothing", file=sys.stderr)
        print("nothing", file=sys.stderr)
    logging.getLogger("transformers.models").warning("nothing")
    logging.getLogger("transformers.models").error("an error")
    ours.__exit__(None, None, None)
    assert capsys.readouterr().err == ""
    assert logged == ["an error"]
    assert sys.stderr is before
    assert logging.getLogger("transformers").level == level


def test_threads_can_generate_from_one_model_whose_own_settings_are_left_alone():
    loaded = tiny("llama")
    own = loaded.model.generation_config
    own.temperature, own.bad_words_ids, own.repetition_penalty = 3.0, [[5]], 5.0
    alone = {length: generate(loaded, [[5, 9, 30]], length) for length in (4, 12)}
    assert alone[12][0][:7] == alone[4][0]
    inside, leave, said = threading.Event(), threading.Event(), {}

    def wait(ids, scores):
        inside.set()
        assert leave.wait(20)
        assert loaded.model.generation_config is own
        return scores

    thread = threading.Thread(target=lambda: said.update({4: generate(loaded, [[5, 9, 30]], 4, [wait])}))
    thread.start()
    assert inside.wait(20)
    assert loaded.model.generation_config is own

    def release(ids, scores):  # they end while we are at it
        leave.set()
        thread.join()
        return scores

    said[12] = generate(loaded, [[5, 9, 30]], 12, [release])
    assert said == alone
    assert loaded.model.generation_config is own
    assert own.bad_words_ids == [[5]]


# --- tokenizers ---------------------------------------------------------------------------------------------------


class Lowering(ByT5Tokenizer):
    def _tokenize(self, text):
        return super()._tokenize(text.lower())


def with_template(tokenizer):
    tokenizer.chat_template = "{{ messages }}"
    return tokenizer


def test_a_tokenizers_identity_is_what_it_does(tmp_path):
    makers = {
        "slow": ByT5Tokenizer,
        "slow, other special tokens": lambda: ByT5Tokenizer(extra_ids=3),
        "slow, lowering": Lowering,
        "slow, a template": lambda: with_template(ByT5Tokenizer()),
        "fast": tiny_tokenizer,
        "fast, BOS": lambda: tiny_tokenizer(bos=True),
        "fast, a template": lambda: with_template(tiny_tokenizer()),
    }
    found = {name: tokenizer_identity(make()) for name, make in makers.items()}
    assert len(set(found.values())) == len(makers)
    assert found == {name: tokenizer_identity(make()) for name, make in makers.items()}
    for name in ("slow", "fast"):
        makers[name]().save_pretrained(tmp_path / name)
        assert tokenizer_identity(AutoTokenizer.from_pretrained(tmp_path / name)) == found[name]


def test_edit_evaluate_report_and_export_with_a_slow_tokenizer(tmp_path):
    """ByT5's tokenizer is Python code: it has no fast twin, no pipeline to write down, and gives no offsets."""
    tokenizer = ByT5Tokenizer()
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), initializer_range=0.2, **_LLAMA, eos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    facts = tmp_path / "facts.jsonl"
    facts.write_text("".join(json.dumps(record) + "\n" for record in fact_records(4)))
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        "method: memit\nbatch_size: 2\nlayers: [1, 2]\ntargets: {steps: 3, lr: 0.3}\nmoments: {sampled_tokens: 256}\n"
        "options: {second_moment_weight: 0.1}\ntokens_per_batch: 1024\n"
    )
    run = tmp_path / "run"
    for command in (
        ["edit", tmp_path / "model", facts, "-o", run, "--config", settings],
        ["eval", run, facts],
        ["report", run, "-o", tmp_path / "page.html"],
        ["export", run, "-o", tmp_path / "exported"],
        ["eval", tmp_path / "exported", facts],
    ):
        result = CliRunner().invoke(app, [str(part) for part in command], env={"COLUMNS": "200"})
        assert result.exit_code == 0, (command[0], result.output, result.exception)
    assert not AutoTokenizer.from_pretrained(tmp_path / "exported").is_fast
    assert json.loads((run / "metrics.json").read_text())["facts"] == 4


# --- caches -------------------------------------------------------------------------------------------------------

COMPUTING = {
    "another device": (identity, "device_name", lambda device: "another device"),
    "another torch": (identity, "version", lambda package: "9.9.9" if package == "torch" else version(package)),
    "another transformers": (identity, "version", lambda package: "9.9.9" if package != "torch" else version(package)),
    "more threads": (torch, "get_num_threads", lambda: 64),
    "other instructions": (torch.backends.cpu, "get_cpu_capability", lambda: "none"),
    "TF32": (torch, "get_float32_matmul_precision", lambda: "high"),
}


@pytest.mark.parametrize("what", COMPUTING)
def test_cached_text_and_statistics_are_of_what_computed_them(what, monkeypatch, tmp_path):
    monkeypatch.setenv("SPHERE_EDIT_CACHE", str(tmp_path))  # without what earlier tests have sampled
    loaded = tiny("llama")
    done: list[str] = []
    settings = moments.MomentSettings(sampled_tokens=256)
    names = [loaded.architecture.module_name(1, "down")]

    def counted(module, name):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: (done.append(name), original(*args))[1])

    counted(moments, "sample_text")
    counted(statistics, "second_moments")

    def once() -> list[str]:
        done.clear()
        corpus = moments.load_corpus(loaded, settings, 0, Quiet())
        statistics.cached_moments(loaded, corpus, [1], names, 256, 0.0, Quiet())
        return list(done)

    assert once() == ["sample_text", "second_moments"]
    assert once() == []
    with monkeypatch.context() as context:
        context.setattr(*COMPUTING[what])
        assert once() == ["sample_text", "second_moments"]
    assert once() == []


def test_text_sampled_in_one_dtype_is_not_another_ones():
    keys = {identity.cache_key(torch.device("cpu"), tiny("llama", dtype).fingerprint) for dtype in DTYPES}
    assert len(keys) == 3
