"""Second moments against their definition, and the sampling of text."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import as_file, files

import pytest
import torch

from families import tiny
from sphere_edit.editing import moments, shipped
from sphere_edit.editing.moments import (
    Corpus,
    MomentSettings,
    _Sums,
    draw,
    load_corpus,
    own_text,
    sample_text,
    second_moments,
)
from sphere_edit.errors import SphereEditError
from sphere_edit.files import read_cache
from sphere_edit.progress import Quiet


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_second_moments_are_the_mean_outer_product_over_all_tokens(family):
    loaded = tiny(family)
    names = [loaded.architecture.module_name(layer, "down") for layer in (1, 2)]
    passages = [[1, 5, 9, 30], [1, 7], [40, 50, 60, 70, 80, 90, 11]]
    found = second_moments(loaded, passages, names, 16, Quiet())
    for name in names:
        keys = []
        hook = loaded.model.get_submodule(name).register_forward_pre_hook(
            lambda m, args, keys=keys: keys.append(args[0][0])
        )
        for passage in passages:
            loaded.model(torch.tensor([passage]))
        hook.remove()
        plain = torch.cat(keys).double()
        assert len(plain) == 13
        torch.testing.assert_close(found[name].double(), plain.T @ plain / 13, atol=1e-6, rtol=1e-4)


def test_draw_samples_from_the_softmax():
    torch.manual_seed(0)
    scores = torch.tensor([2.0, float("-inf"), 0.0, 1.0]).repeat(20_000, 1)
    drawn = draw(torch.empty(0), scores)
    assert bool((torch.isfinite(drawn).sum(1) == 1).all())
    shares = torch.bincount(drawn.argmax(1), minlength=4) / len(scores)
    torch.testing.assert_close(shares, scores[0].softmax(-1), atol=0.012, rtol=0)
    assert shares[1] == 0


def test_sampled_text_is_seeded_varied_and_as_long_as_asked():
    loaded = tiny("llama")
    first, again, other = (sample_text(loaded, 512, seed, Quiet(), length=32) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert len(first) == 16
    assert len({tuple(row) for row in first}) == 16
    assert all(len(row) == 33 for row in first)


def test_shipped_text_is_that_of_the_very_model_and_no_other(tmp_path, monkeypatch):
    """A package with text of the tiny model stands in for ours; whatever is not as it was when that was sampled is sampled."""
    loaded, asked = tiny("llama"), []
    rows = sample_text(loaded, 4 * 128, 0, Quiet())
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / shipped.NAME
    shipped.write_shipped(file, loaded, 0, rows)
    monkeypatch.setattr(shipped, "files", lambda package: tmp_path)
    monkeypatch.setattr(moments, "sample_text", lambda *args: asked.append(args) or [[1, 2]])
    assert own_text(loaded, 4 * 128, 0, Quiet()) == rows
    assert own_text(loaded, 130, 0, Quiet()) == rows[:2]
    assert not asked
    assert shipped.agree({"rope": "1", "new": "2"}, {"rope": "1", "gone": "3"})
    assert not shipped.agree({"rope": "2"}, {"rope": "1"})
    others = [
        (loaded, 5 * 128, 0),  # more than is shipped
        (loaded, 128, 1),  # another seed
        (tiny("gpt2"), 128, 0),
        (replace(loaded, fingerprint="0"), 128, 0),
    ]
    for other in others:
        assert own_text(*other, Quiet()) == [[1, 2]]
    monkeypatch.setattr(loaded.model.config, "rms_norm_eps", 0.5)
    assert own_text(loaded, 128, 0, Quiet()) == [[1, 2]]
    assert len(asked) == 5
    file.write_text(file.read_text().replace(" 1", " 2", 1))
    with pytest.raises(SphereEditError, match="install sphere-edit again"):
        own_text(loaded, 128, 0, Quiet())


def test_the_package_ships_the_text_of_its_embedded_model():
    """Long enough for the default, and told by its own hash."""
    with as_file(files("sphere_edit") / "data" / shipped.NAME) as path:
        rows = [row.split() for row in read_cache(path)["rows"]]
    assert len(rows) * 128 >= MomentSettings().sampled_tokens
    assert {len(row) for row in rows} == {129}
    assert len({" ".join(row) for row in rows}) == len(rows)


def test_a_corpus_keeps_its_last_passages_out_of_the_statistics(tmp_path):
    loaded = tiny("llama")
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(f"Passage {number} about Paris." for number in range(50)))
    corpus = load_corpus(loaded, MomentSettings(corpus=str(path), heldout=7), 0, Quiet())
    assert len(corpus.heldout) == 7
    assert len(corpus.passages) == 43
    last = loaded.tokenizer.decode(corpus.heldout[-1], skip_special_tokens=True)
    assert last.strip() == "Passage 49 about Paris."
    short = load_corpus(loaded, MomentSettings(corpus=str(path), heldout=7, tokens=100), 0, Quiet())
    assert sum(map(len, short.passages)) >= 100
    assert len(short.passages) < 43


def test_second_moments_stop_once_they_have_converged_and_say_how_well(monkeypatch):
    """The error they say is the one they have, against all of a long text; a stopped and stored pass goes on bitwise."""
    loaded = tiny("llama")
    (name,) = names = [loaded.architecture.module_name(1, "down")]
    generator = torch.Generator().manual_seed(0)
    passages = torch.randint(100, (3000, 8), generator=generator).tolist()
    whole = second_moments(loaded, passages, names, 64, Quiet())[name]
    said = []

    class Telling(Quiet):
        def say(self, text, style=""):
            said.append(text)

    early = second_moments(loaded, passages, names, 64, Telling(), tolerance=0.15)[name]
    assert "of 24,000" in said[0]
    tokens = int(said[0].split()[3].replace(",", ""))
    assert tokens < 12_000
    error = float((early - whole).norm() / whole.norm())
    assert 0.07 < error < 0.25


def test_an_interrupted_pass_over_the_text_goes_on_where_it_was_stored(tmp_path, monkeypatch):
    loaded = tiny("llama")
    names = [loaded.architecture.module_name(layer, "down") for layer in (1, 2)]
    passages = torch.randint(100, (100, 8), generator=torch.Generator().manual_seed(0)).tolist()
    monkeypatch.setattr("sphere_edit.editing.moments._STORE_SECONDS", 0.0)
    whole = second_moments(loaded, passages, names, 64, Quiet())
    partial, calls = tmp_path / "partial.safetensors", []
    add = _Sums.add

    def dies(sums, *seen):
        calls.append(sums.windows)
        if len(calls) == 8:
            raise KeyboardInterrupt
        add(sums, *seen)

    with monkeypatch.context() as context:
        context.setattr(_Sums, "add", dies)
        with pytest.raises(KeyboardInterrupt):
            second_moments(loaded, passages, names, 64, Quiet(), partial=partial)
    assert partial.is_file()
    monkeypatch.setattr(_Sums, "add", lambda sums, *seen: (calls.append(sums.windows), add(sums, *seen))[1])
    calls.clear()
    again = second_moments(loaded, passages, names, 64, Quiet(), partial=partial)
    assert calls[0] > 0, "it did not begin at the beginning"
    assert all(torch.equal(again[name], whole[name]) for name in names)
    assert not partial.exists()


@pytest.mark.parametrize(("facts", "passages"), [(1, 21), (51, 21), (60, 24), (500, 200), (1000, 300), (10_000, 300)])
def test_a_short_stream_is_measured_on_less_text(facts, passages):
    """40 tokens for each fact, 2,048 at least, in whole passages; the same first ones whatever comes later."""
    corpus = Corpus([], [[number] * 100 for number in range(300)], "")
    found = corpus.heldout_for(facts)
    assert len(found) == passages
    assert found == corpus.heldout[: len(found)]
