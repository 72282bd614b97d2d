"""General ability, through lm-evaluation-harness: any of its tasks by name, on the model as it stands.

Tasks come from three places, in this order: a definition (lm-eval YAML) in the user's task folder; one of the four that ship
here (GSM8K, RTE, Natural Questions, BoolQ: the paper's), if its data file lies in that folder; the harness itself, which gets
its data from the hub.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml

from sphere_edit.errors import SphereEditError
from sphere_edit.models.loading import LoadedModel

_BATCH = 8  # requests of a task run together
_DRAWS = 1000  # of the bootstrap, where the harness has no formula for a standard error
_SHARES = ("acc", "acc_norm", "exact_match", "em")  # shares of right answers; the first that a task has counts


@dataclass(frozen=True)
class AbilityScore:
    """One task on one model.

    Attributes:
        metric: its name in the harness.
        value: the mean over documents.
        error: the mean's standard error; None where the harness has none for the metric.
        rising: whether more is better.
        share: whether it is a share of right answers, from 0 to 1.
        chance: what guessing would score: one in the number of choices, 0 where the answer is written; None if it is no share.
        documents: how many were asked.
        version: of the task.
    """

    metric: str
    value: float
    error: float | None
    rising: bool
    share: bool
    chance: float | None
    documents: int
    version: str

    @property
    def at_chance(self) -> bool:
        """Whether the score is within two standard errors of guessing, so that nothing can be lost."""
        return self.chance is not None and self.value - self.chance <= 2 * (self.error or 0.0)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "at_chance": self.at_chance}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> AbilityScore:
        """The score that ``as_dict`` described."""
        return cls(**{field.name: record[field.name] for field in fields(cls)})


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
            self.hashes = {name: _hash(task, limit) for name, task in sorted(self._loaded["tasks"].items())}

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
            tokenizer = copy.deepcopy(loaded.tokenizer)  # the harness sets a padding token
            model = HFLM(pretrained=loaded.model, tokenizer=tokenizer, backend="causal", batch_size=_BATCH)
            try:
                found = evaluate(model, self._loaded, limit=self.limit, bootstrap_iters=_DRAWS)
            except (AssertionError, ValueError) as error:  # so the harness says that a task does not suit a model
                raise SphereEditError(
                    f"{', '.join(self.names)} cannot be asked of this model: {' '.join(str(error).split())[:300]}"
                ) from None
        assert found is not None
        return {
            one: _score_of(one, [one] if one in members else members, found)
            for name, members in self._members.items()
            for one in ([name] if _measured(name, found) else members)
        }


def _hash(task: Any, limit: int | None) -> str:
    """What a task asks, told apart from whatever else goes by its name: its definition and its documents."""
    definition = {key: value for key, value in task.dump_config().items() if key != "dataset_kwargs"}  # holds paths
    documents = list(itertools.islice(task.eval_docs, limit))
    return hashlib.sha256(json.dumps([definition, documents], sort_keys=True, default=str).encode()).hexdigest()[:16]


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
    if name in shipped_tasks() and folder is not None:
        return f"task '{name}': its data file is not in '{folder}'"
    return (
        f"there is no task '{name}'. lm-eval ls tasks lists the harness's; {', '.join(shipped_tasks())} need only "
        "their data in --task-dir"
    )


def _score_of(name: str, members: Sequence[str], found: Mapping[str, Any]) -> AbilityScore:
    """A task's or a group's result; ``members`` are the tasks in it."""
    results, values = found["results"][name], _measured(name, found)
    if not values:
        raise SphereEditError(f"task '{name}' measures nothing that is a number")
    key = min(values, key=_preference)
    metric, _, filtered = key.partition(",")
    error = results.get(f"{metric}_stderr,{filtered}")
    guesses: list[float] = []
    documents, rising, share = 0, True, metric in _SHARES
    for member in members:
        samples = found["samples"][member]
        choices = found["configs"][member]["output_type"] == "multiple_choice"
        guesses += [1 / len(sample["resps"]) if choices else 0.0 for sample in samples]
        rising = rising and found["higher_is_better"].get(member, {}).get(metric) is not False
        documents += len({sample["doc_id"] for sample in samples})
    return AbilityScore(
        metric,
        float(values[key]),
        float(error) if isinstance(error, float) and math.isfinite(error) else None,
        rising,
        share,
        sum(guesses) / len(guesses) if share else None,
        documents,
        str(found["versions"].get(name, "")),
    )


def _measured(name: str, found: Mapping[str, Any]) -> dict[str, float]:
    """A task's or a group's numbers by metric and filter; a group may have none of its own."""
    results = found["results"].get(name, {})
    return {key: value for key, value in results.items() if isinstance(value, float) and "_stderr" not in key}


def _preference(key: str) -> int:
    metric = key.split(",")[0]
    return _SHARES.index(metric) if metric in _SHARES else len(_SHARES)


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
