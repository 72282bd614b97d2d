"""Several processes on one run: the same bits as one, whatever ends in the middle."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from families import save_tiny
from mixtures import save_mixture
from sphere_edit import ranks
from sphere_edit.editing.methods import METHODS
from sphere_edit.editor import Editor, opened
from sphere_edit.errors import SphereEditError
from sphere_edit.files import cache_dir
from sphere_edit.progress import Quiet
from test_every_method import COMMON, OPTIONS, records
from together import contents, together

SETTINGS: dict[str, Any] = {
    **COMMON,
    "templates": 1,
    "tokens_per_batch": 64,  # many chunks
    "targets": {"steps": 6, "lr": 0.5, "tokens": 40},
    "moments": {"sampled_tokens": 1024},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    tiny = {family: save_tiny(family, folder / family) for family in ("llama", "gpt2")}
    return {**tiny, "mixture": save_mixture("qwen2_moe", folder / "mixture")}


def begin(model: Path, run: Path, method: str, **more: Any) -> None:
    settings = {**SETTINGS, "method": method, "options": OPTIONS.get(method, {}), **more}
    editor = Editor.from_pretrained(model, run, reporter=Quiet(), **settings)
    editor.edit(records(6))
    editor.close()


def fresh_cache() -> None:
    """Nothing that another run has measured; what a model samples says nothing new."""
    for kind in cache_dir().iterdir():
        if kind.name != "samples":
            shutil.rmtree(kind)


def compare(folder: Path, model: Path, method: str, sizes: tuple[int, ...], **more: Any) -> None:
    begin(model, folder / "1", method, **more)
    alone = contents(folder / "1")
    assert any(name.startswith("updates/") for name in alone)
    for size in sizes:
        fresh_cache()
        assert together(size, lambda size=size: begin(model, folder / str(size), method, **more)) == [0] * size
        shared = contents(folder / str(size))
        assert shared.keys() == alone.keys()
        for name, content in alone.items():
            assert shared[name] == content, f"{name} of {size} ranks is not that of one"


@pytest.mark.parametrize(("family", "method"), [("llama", "frugal"), ("mixture", "alphaedit")])
def test_two_ranks_give_the_bits_of_one(family, method, models, tmp_path):
    compare(
        tmp_path,
        models[family],
        method,
        (2,),
        evaluation={"generation": "plain", "texts": 2},
        **matrices(family, method),
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixture"])
@pytest.mark.parametrize("method", METHODS)
def test_ranks_give_the_bits_of_one(family, method, models, tmp_path):
    compare(tmp_path, models[family], method, (2, 4), **matrices(family, method))


def test_two_ranks_remove_a_fact_as_one_does(models, tmp_path):
    begin(models["llama"], tmp_path / "1", "frugal", recheck=1)
    shutil.copytree(tmp_path / "1", tmp_path / "2")

    def work(run: Path) -> None:
        with opened(run, Quiet()) as editor:
            editor.remove([1, 4])

    work(tmp_path / "1")
    assert together(2, lambda: work(tmp_path / "2")) == [0, 0]
    alone, shared = contents(tmp_path / "1"), contents(tmp_path / "2")
    assert any(line.get("kind") == "removal" for line in alone["journal.jsonl"])
    assert shared.keys() == alone.keys()
    for name, content in alone.items():
        assert shared[name] == content, name


def matrices(family: str, method: str) -> dict[str, Any]:
    """Of a mixture the routed experts, for methods that can edit them."""
    return {"matrices": "experts" if METHODS[method]().by_experts else "down"} if family == "mixture" else {}


# --- what is dealt ------------------------------------------------------------------------------------------------


def said(folder: Path) -> list[Any]:
    """What each rank wrote down, by rank."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def tell(folder: Path, value: Any) -> None:
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(value))


def test_parts_go_to_ranks_in_turn_and_all_get_all(tmp_path):
    def work() -> None:
        mine: list[int] = []

        def double(part: int) -> torch.Tensor:
            mine.append(part)
            assert ranks.count() == 1, "within its part a rank is alone"
            assert ranks.dealt([1, 2, 3], str) == ["1", "2", "3"]
            return torch.eye(3)[1:, 1:] * part  # a view

        found = ranks.dealt(range(7), double)
        assert all(torch.equal(value, part * torch.eye(2)) for part, value in enumerate(found))
        lazy = ranks.in_turn(range(9), mine.append)
        next(lazy)
        told: list[float] = []
        with ranks.told(told.append) as advance:
            ranks.dealt(range(4), lambda part: advance(10.0**part))
        tell(
            tmp_path,
            [mine, ranks.once(os.getpid) == os.getpid(), ranks.once(lambda: os.environ["RANK"], by=4), sum(told)],
        )

    assert together(3, work) == [0, 0, 0]
    assert said(tmp_path) == [
        [[0, 3, 6, 0], True, "1", 1111.0],
        [[1, 4, 1], False, "1", 1111.0],
        [[2, 5, 2], False, "1", 1111.0],
    ]


def test_an_error_of_one_rank_is_that_of_all(tmp_path):
    def work() -> None:
        def fail(part: int) -> int:
            if part in (1, 2):
                raise SphereEditError(f"part {part}")
            return part

        caught = []
        for attempt in (lambda: ranks.dealt(range(4), fail), lambda: ranks.once(lambda: fail(2)), lambda: fail(1)):
            try:
                attempt()
            except SphereEditError as error:
                caught.append(str(error))
        tell(tmp_path, caught)

    assert together(2, work) == [0, 0]
    assert said(tmp_path) == [["part 1", "part 2", "part 1"]] * 2


def test_only_the_first_rank_writes_and_a_different_weight_is_told(models, tmp_path):
    def work() -> None:
        if os.environ["RANK"] == "1":
            real = torch.addmm
            torch.addmm = lambda *args: real(*args) * (1 + 1e-6)
        begin(models["llama"], tmp_path / "run", "memit")

    assert together(2, work) == [2, 2]
    with opened(tmp_path / "run", Quiet()) as editor:
        assert editor.run.history.head == 0, "nothing of such a batch stands"


# --- what ends in the middle --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_dies_ends_the_run_and_any_number_goes_on(lost, models, tmp_path):
    begin(models["llama"], tmp_path / "whole", "alphaedit")

    def dying() -> None:
        from sphere_edit.editing.batch import Solver

        real, rank = Solver.write, int(os.environ["RANK"])

        def write(self: Any, *args: Any) -> Any:
            if rank == lost and (tmp_path / "broken" / "updates").exists():
                os._exit(9)
            return real(self, *args)

        Solver.write = write
        try:
            begin(models["llama"], tmp_path / "broken", "alphaedit")
        except ranks.LostRank as error:
            tell(tmp_path, str(error))
            raise

    broken = together(2, dying)
    assert broken == ([9, 2] if lost == 0 else [2, 9])
    (why,) = said(tmp_path)
    assert "another of the 2 processes of this run has ended" in why
    assert "--resume" in why

    def go_on() -> None:
        with opened(tmp_path / "broken", Quiet()) as editor:
            assert editor.run.history.head == 1
            editor.resume()

    assert together(3, go_on) == [0, 0, 0]
    whole, again = contents(tmp_path / "whole"), contents(tmp_path / "broken")
    assert whole == again


def test_what_is_said_by_the_rank_that_ended_alone(tmp_path):
    def work() -> None:
        if os.environ["RANK"] == "1":
            raise SphereEditError("no room on this machine")
        try:
            ranks.once(lambda: None)
        except ranks.LostRank as error:
            tell(tmp_path, str(error))

    together(2, work)
    assert ", rank 1: no room on this machine." in said(tmp_path)[0]


def test_commands_of_one_process_are_refused_to_several(monkeypatch, capsys):
    from sphere_edit.cli import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["sphere-edit", "show", "runs/none"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "'show' is the work of one process, and 2 were started together" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_torchrun(models, tmp_path):
    """The command as one types it: one voice, and the journal of a single process."""
    facts = tmp_path / "facts.jsonl"
    facts.write_text("".join(json.dumps(record) + "\n" for record in records(6)))
    config = tmp_path / "settings.yaml"
    config.write_text(json.dumps({**SETTINGS, "method": "memit", "options": OPTIONS["memit"]}))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command = ["-m", "sphere_edit", "edit", str(models["llama"]), str(facts), "--config", str(config), "-o"]
    alone = subprocess.run([sys.executable, *command, str(tmp_path / "1")], capture_output=True, text=True, check=False)
    both = subprocess.run(
        [*launch, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *command, str(tmp_path / "2")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (alone.returncode, both.returncode) == (0, 0), both.stderr
    assert both.stdout.count("Run folder:") == 1
    ours, theirs = contents(tmp_path / "1"), contents(tmp_path / "2")
    assert ours.keys() == theirs.keys()
    for name in ours:
        if not name.startswith(("report", "figures")):  # pages say how long it took
            assert ours[name] == theirs[name], name
