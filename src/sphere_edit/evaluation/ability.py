"""General ability, through lm-evaluation-harness: any of its tasks by name, on the model as it stands.

Tasks come from three places, in this order: a definition (lm-eval YAML) in the user's task folder; one of the four that ship
here (GSM8K, RTE, Natural Questions, BoolQ: the paper's), if its data file lies in that folder; the harness itself, which gets
its data from the hub.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml

from sphere_edit.errors import SphereEditError
from sphere_edit.models.loading import LoadedModel

_BATCH = 8  # requests of a task run together
_DRAWS = 1000  # of the bootstrap, where the harness has no formula for a standard error
_METRICS = ("acc", "exact_match", "f1", "em", "word_perplexity")  # the one that counts, by preference


@dataclass(frozen=True)
class AbilityScore:
    """One task on one model.

    Attributes:
        metric: its name in the harness.
        value: the mean over documents.
        error: the mean's standard error; None where the harness has none for the metric.
        chance: what guessing would score: one in the number of choices, 0 where the answer is written.
        documents: how many were asked.
        version: of the task.
    """

    metric: str
    value: float
    error: float | None
    chance: float
    documents: int
    version: str

    @property
    def at_chance(self) -> bool:
        """Whether the score is within two standard errors of guessing, so that nothing can be lost."""
        return self.value - self.chance <= 2 * (self.error or 0.0)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "at_chance": self.at_chance}


class AbilityTasks:
    """Some tasks with their data, ready to be asked again and again.

    Raises:
        SphereEditError: lm-eval is not installed, a task is unknown, or its data cannot be had.
    """

    def __init__(self, names: Sequence[str], task_dir: str | Path | None = None, limit: int | None = None):
        self.names, self.limit = list(names), limit
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise SphereEditError(
                "general ability is measured by lm-evaluation-harness: pip install 'sphere-edit[ability]'"
            ) from None
        folder = None if task_dir is None else Path(task_dir).expanduser()
        if folder is not None and not folder.is_dir():
            raise SphereEditError(f"there is no task folder '{task_dir}'")
        with _quiet():
            self._manager = TaskManager(include_path=None if folder is None else str(folder))
            own = [name for name in names if folder is None or not (folder / f"{name}.yaml").is_file()]
            shipped = {name: found for name in own if folder and (found := _shipped(name, folder)) is not None}
            known = set(self._manager.all_tasks)
            for name in names:
                if name not in shipped and name not in known:
                    raise SphereEditError(_unknown(name, folder))
            self._loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}}
            self._members: dict[str, list[str]] = {}
            for name in names:
                self._load(name, shipped.get(name, name))

    def _load(self, name: str, task: Any) -> None:
        try:
            found = self._manager.load([task])
        except Exception as error:  # whatever the harness, the data set or the hub raised
            reason = " ".join(str(error).split())[:300]
            raise SphereEditError(
                f"task '{name}' cannot be loaded: {reason}. With its data in a folder, give --task-dir"
            ) from None
        for kind, members in self._loaded.items():
            members.update(found[kind])
        self._members[name] = list(found["tasks"])

    def score(self, loaded: LoadedModel, seed: int) -> dict[str, AbilityScore]:
        """Ask the model as it stands, by the harness's own Hugging Face model class; by task, or by group where a group was named."""
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        with _quiet(), torch.no_grad():
            for task in self._loaded["tasks"].values():
                if task.get_config("num_fewshot") is None:
                    task.set_config(key="num_fewshot", value=0)
                task.set_fewshot_seed(seed=seed)
            model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, backend="causal", batch_size=_BATCH)
            try:
                found = evaluate(model, self._loaded, limit=self.limit, bootstrap_iters=_DRAWS)
            except (
                AssertionError,
                ValueError,
            ) as error:  # how the harness says that a task and a model do not go together
                raise SphereEditError(
                    f"{', '.join(self.names)} cannot be asked of this model: {' '.join(str(error).split())[:300]}"
                ) from None
        assert found is not None
        return {
            one: _score_of(one, [one] if one in members else members, found)
            for name, members in self._members.items()
            for one in ([name] if name in found["results"] else members)
        }


def _shipped(name: str, folder: Path) -> dict[str, Any] | None:
    """The definition that ships under a name, if its data file lies in the folder."""
    file = resources.files("sphere_edit") / "data" / "tasks" / f"{name}.yaml"
    if not file.is_file():
        return None
    definition: dict[str, Any] = yaml.safe_load(file.read_text("utf-8"))
    data = folder / definition.pop("files")
    if not data.is_file():
        return None
    split = definition["test_split"]
    options = {**definition.get("dataset_kwargs", {}), "data_files": {split: str(data)}}
    return {**definition, "dataset_kwargs": options}


def shipped_tasks() -> list[str]:
    """Names of the tasks whose definitions ship."""
    folder = resources.files("sphere_edit") / "data" / "tasks"
    return sorted(Path(file.name).stem for file in folder.iterdir() if file.name.endswith(".yaml"))


def _unknown(name: str, folder: Path | None) -> str:
    if name in shipped_tasks():
        return f"task '{name}': its data file is not in '{folder}'"
    return (
        f"there is no task '{name}'. lm-eval ls tasks lists the harness's; {', '.join(shipped_tasks())} need only "
        "their data in --task-dir"
    )


def _score_of(name: str, members: Sequence[str], found: Mapping[str, Any]) -> AbilityScore:
    """A task's or a group's result; ``members`` are the tasks in it."""
    results = found["results"][name]
    values = {key: value for key, value in results.items() if isinstance(value, float) and "_stderr" not in key}
    key = min(values, key=_preference)
    metric, _, filtered = key.partition(",")
    error = results.get(f"{metric}_stderr,{filtered}")
    guesses: list[float] = []
    documents = 0
    for member in members:
        samples = found["samples"][member]
        choices = found["configs"][member]["output_type"] == "multiple_choice"
        guesses += [1 / len(sample["resps"]) if choices else 0.0 for sample in samples]
        documents += len({sample["doc_id"] for sample in samples})
    return AbilityScore(
        metric,
        float(values[key]),
        float(error) if isinstance(error, float) and math.isfinite(error) else None,
        sum(guesses) / len(guesses),
        documents,
        str(found["versions"].get(name, "")),
    )


def _preference(key: str) -> int:
    metric = key.split(",")[0]
    return _METRICS.index(metric) if metric in _METRICS else len(_METRICS)


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness's log at warnings and above."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
