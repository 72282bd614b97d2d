"""Compensated projection: what was taken away comes back, and the sum is the solution of all facts at one time."""

import pytest
import torch

from conftest import fact_records
from families import save_tiny
from sphere_edit import Editor, SphereEditError
from sphere_edit.editing.compensation import TAKEN, Compensation, lacking, with_back
from sphere_edit.editing.methods.alphaedit import AlphaEdit
from sphere_edit.editing.methods.base import LayerProblem, Statistics
from sphere_edit.editing.methods.frugal import Frugal
from sphere_edit.editing.methods.memit import MemitSeq
from sphere_edit.editing.methods.rect import Rect
from sphere_edit.numerics.projection import Sphere
from sphere_edit.progress import Quiet

OUT, IN, BATCHES, FACTS = 10, 16, 4, 3
METHODS = [MemitSeq(second_moment_weight=2.0), Frugal(second_moment_weight=0.1), AlphaEdit(l2=0.5)]


def problem_of_four_batches():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = draw(IN, 40)
    moment = inputs @ inputs.T / 40 + 0.1 * torch.eye(IN, dtype=torch.float64)
    null_space = torch.linalg.eigh(moment).eigenvectors[:, :12]
    statistics = Statistics(second_moment=moment, null_space=null_space)
    return draw(OUT, IN), draw(BATCHES, IN, FACTS), draw(BATCHES, OUT, FACTS), statistics


def stream(method, share, sphere):
    """Weights after each batch, and what the last one is still owed, with targets that are fixed outputs."""
    weight, keys, values, statistics = problem_of_four_batches()
    directions, state, compensation = sphere.directions(weight), {}, Compensation(share)
    found = [weight]
    for k, v in zip(keys, values, strict=True):
        owed = compensation.given_back().get("w")
        problem = LayerProblem(found[-1], k, v - found[-1] @ k, statistics)
        solved = with_back(method.solve(lacking(problem, owed), state), owed, weight)
        written = sphere.suppress(method.finish(solved, found[-1]), directions)
        state = method.after_batch(state, {"keys": k}, statistics)
        left = compensation.left_of({"w": solved}, {"w": written})
        if left:  # kept in float32 by a run; here to the last bit
            compensation.taken = {"w": solved.dense() - written.dense()}
            torch.testing.assert_close(left["w"].double(), compensation.taken["w"], rtol=1e-6, atol=1e-7)
        found.append(found[-1] + written.dense())
    return found, compensation.taken.get("w", torch.zeros_like(weight))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("sphere", [Sphere(eta=0.5, alpha=0.5), Sphere(eta=0.5, alpha=1.0)], ids=["half", "whole"])
def test_with_what_is_still_owed_the_sum_is_the_solution_at_one_time(method, sphere):
    weight, keys, values, statistics = problem_of_four_batches()
    every, wanted = torch.cat(list(keys), dim=1), torch.cat(list(values), dim=1)
    at_once = method.solve(LayerProblem(weight, every, wanted - weight @ every, statistics), {}).dense()
    found, owed = stream(method, 1.0, sphere)
    torch.testing.assert_close(found[-1] + owed - weight, at_once, rtol=1e-9, atol=1e-9)
    plain, none = stream(method, 0.0, sphere)
    assert not bool(none.any())
    assert float((plain[-1] - weight - at_once).norm()) > 2 * float((found[-1] - weight - at_once).norm()) or (
        sphere.alpha == 1.0
    ), "without it more is missing"


@pytest.mark.parametrize("method", METHODS[:2], ids=lambda method: method.name)
def test_it_is_the_papers_formula_with_the_error_times_the_system(method):
    """Δ = (R Kᵀ + L C_t) C_{t+1}⁻¹, written out with C as a matrix."""
    weight, keys, values, statistics = problem_of_four_batches()
    system = method.penalty(IN) * statistics["second_moment"]
    sphere, left, now = Sphere(eta=0.5, alpha=0.5), torch.zeros_like(weight), weight
    directions = sphere.directions(weight)
    for k, v in zip(keys, values, strict=True):
        grown = system + k @ k.T
        delta = torch.linalg.solve(grown, ((v - now @ k) @ k.T + left @ system).T).T
        written = sphere.suppress(delta, directions)
        left, system, now = delta - written, grown, now + written
    found, owed = stream(method, 1.0, sphere)
    torch.testing.assert_close(found[-1], now, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(owed, left, rtol=1e-8, atol=1e-9)


def test_what_rect_sets_to_zero_is_owed_too():
    found, owed = stream(Rect(second_moment_weight=2.0), 1.0, Sphere(alpha=0.0))
    assert int((owed != 0).sum()) == round(0.6 * OUT * IN) - 1
    assert not bool(((found[-1] - found[-2] != 0) & (owed != 0)).any())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compensated")
    model = save_tiny("llama", folder / "model")
    (folder / "text.txt").write_text("The river there is the Tiber.\n\n" * 40)
    options = {"moments": {"corpus": str(folder / "text.txt")}, "batch_size": 4, "method": "memit_seq", "recheck": 0}
    for name, share in (("none", 0.0), ("half", 0.5)):
        with_share = Editor.from_pretrained(model, folder / name, reporter=Quiet(), compensated=share, **options)
        with_share.edit(fact_records())
        with_share.close()
    return folder


def digests(run):
    return [[entry["sha256"] for entry in batch.matrices.values()] for batch in run.history.standing]


def test_a_run_keeps_what_it_owes_through_replay_and_rollback(runs, tmp_path):
    import shutil

    shutil.copytree(runs / "half", tmp_path / "run")
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        checkpoint.unlink()  # so that all is replayed from the updates
    editor = Editor.open(tmp_path / "run", Quiet())
    before = digests(editor.run)
    assert before[0] == digests(Editor.open(runs / "none", Quiet(), only_to_read=True).run)[0]
    assert before[1] != digests(Editor.open(runs / "none", Quiet(), only_to_read=True).run)[1]
    editor.rollback(2)
    _, seen = editor.run.read_update(2)
    owed = editor._stream.committer.solver.compensation.taken
    assert owed.keys() == seen.keys()
    assert all(torch.equal(owed[name], parts[TAKEN]) and bool(owed[name].any()) for name, parts in seen.items())
    editor.close()
    again = Editor.open(tmp_path / "run", Quiet())  # from the rollback's checkpoint
    again.edit(fact_records()[8:])
    assert digests(again.run)[:3] == before[:3], "bit for bit"
    again.rollback(0)
    assert again._stream.committer.solver.compensation.taken == {}


def test_a_fact_is_not_subtracted_where_later_batches_hold_a_part_of_it(runs, tmp_path):
    import shutil

    shutil.copytree(runs / "half", tmp_path / "run")
    editor = Editor.open(tmp_path / "run", Quiet())
    editor.remove([0])
    assert editor.run.history.standing[-1].written_back or editor.run.history.standing[-2].written_back


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ultraedit"}, "compensated is for methods that solve for optimised targets; ultraedit does not"),
        ({"method": "prune"}, "takes nothing away from the edited weights"),
        ({"method": "memit", "sphere": {"enabled": False}}, "memit without SPHERE takes nothing away"),
    ],
)
def test_it_is_refused_where_there_is_nothing_to_carry_on(tmp_path, options, message):
    model = save_tiny("llama", tmp_path / "model")
    with pytest.raises(SphereEditError, match=message):
        Editor.from_pretrained(model, tmp_path / "run", reporter=Quiet(), compensated=1.0, **options)
