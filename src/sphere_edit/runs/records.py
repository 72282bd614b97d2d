"""What stands in a run's ``config.json`` and in the lines of its journal, typed.

On disk some fields go by the names that runs were first written with (``asked``, ``again``); those are aliases here and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import re
from itertools import accumulate
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from typing_extensions import NotRequired, Self, TypedDict

from sphere_edit.editing.diagnosing import MatrixEntry
from sphere_edit.errors import SphereEditError
from sphere_edit.models.architecture import Architecture
from sphere_edit.numerics.projection import Sphere
from sphere_edit.runs.layout import Layout

SCHEMA = 3
_MATRIX = re.compile(r"\w[\w.]*")  # files are named after matrices
_SINCE = {"patience": 1, "contexts": None}  # settings of targets that earlier code had not, as what it did

Kind = Literal["edit", "rewrite", "repair", "removal"]


class TargetsEntry(TypedDict):
    """How a batch's targets were found: means over its facts, None where nothing was measured (`sources.Report`).

    ``probabilities`` is ``probability_after`` fact by fact; runs begun before it was kept lack it.
    """

    loss_before: float | None
    loss_after: float | None
    probability_after: float | None
    evaluations: list[int]
    probabilities: NotRequired[list[float]]


class RepairEntry(TypedDict):
    """What a repair saw at each of its steps (`repair.Descent`)."""

    steps: int
    divergences: list[float]
    losses: list[float]


class ReturnedEntry(TypedDict):
    """Whether a removed fact's prompt gives the unedited model's answer again (`evaluation.returned.Returned`).

    ``fact`` is its index; ``answer`` is the unedited model's, ``said`` what the model says now.
    """

    fact: int
    answer: str
    said: str
    returned: bool
    new: bool
    kl: float
    kl_paraphrases: float | None


class EnergyEntry(TypedDict):
    """The hyperspherical energy of one matrix."""

    total: float
    per_pair: float


class Record(BaseModel):
    """One line of the journal. Fields that a later version adds are kept and passed on."""

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)
    event: str
    time: str | None = None  # when it was committed, UTC; None in runs that did not keep it

    def as_entry(self) -> dict[str, Any]:
        """Plain values under the names on disk; what was never set is left out."""
        return {"event": self.event, **self.model_dump(mode="json", by_alias=True, exclude_unset=True)}


class FactsAccepted(Record):
    """The facts of one call of edit."""

    event: Literal["facts"] = "facts"
    session: int
    count: int
    sha256: str
    source: str
    protocol: str
    left_out: list[str]
    inputs: dict[str, str] | None = None  # with the first: hashes of what the run was started with, by file


class Unedited(Record):
    """The unedited model's scores of a session's facts; with the first session, what was measured of it as a whole.

    ``sha256`` is that of the file which holds them.
    """

    event: Literal["unedited"] = "unedited"
    session: int
    summary: dict[str, float | None]
    sha256: str | None = None
    perplexity: float | None = None
    divergence: float | None = None
    energy: dict[str, EnergyEntry] | None = None


class _Written(Record):
    """What a batch wrote, whether it stands or not.

    Attributes:
        number: of the batch, from 1.
        kind: ``edit`` new facts (and rewrite forgotten ones with them), ``rewrite`` forgotten ones alone, ``repair`` ordinary text, or
            take facts back (``removal``).
        facts: the new facts, by index.
        superseded: earlier facts that they replace.
        rechecked: earlier facts that were asked before the batch.
        unanswered: those of them whose new answer the model did not give; None for runs that did not keep it.
        rewritten: those of these that are written again.
        columns: how many columns of keys each member has, in the order of `members`; None for runs that did not keep it, and where
            there are none.
        removed: facts that are taken back, with those that they superseded.
        written_back: removed facts whose prompts are given the unedited model's own answers.
        restored: the earlier batch whose weights and state are taken up again; such a batch has no ΔW.
    """

    number: int = Field(alias="batch")
    kind: Kind
    facts: list[int]
    superseded: list[int]
    rechecked: list[int] = Field(alias="asked")
    rewritten: list[int] = Field(alias="again")
    unanswered: list[int] | None = None
    columns: list[int] | None = None
    removed: list[int] = []
    written_back: list[int] = []
    restored: int | None = None
    repair: RepairEntry | None = None
    targets: TargetsEntry
    matrices: dict[str, MatrixEntry]
    seconds: dict[str, float]

    @model_validator(mode="before")
    @classmethod
    def _kind_of_older_runs(cls, entry: Any) -> Any:
        """Runs begun before batches had a kind tell it by their fields."""
        if isinstance(entry, dict) and "kind" not in entry:
            return {**entry, "kind": "repair" if "repair" in entry else "edit" if entry.get("facts") else "rewrite"}
        return entry

    @property
    def answered(self) -> list[int]:
        """The earlier facts that gave their new answer before the batch."""
        missing = set(self.rewritten if self.unanswered is None else self.unanswered)
        return [index for index in self.rechecked if index not in missing]

    @property
    def members(self) -> list[int]:
        """All facts whose keys stand in the batch, column after column: the new ones, those written again, those written back."""
        return [*self.facts, *self.rewritten, *self.written_back]

    @property
    def mentioned(self) -> list[int]:
        """All facts that the record speaks of."""
        return [*self.members, *self.superseded, *self.rechecked, *self.removed]

    def columns_of(self, chosen: set[int], width: int) -> list[int]:
        """Which of ``width`` columns of keys belong to some of the members; they belong to all alike where the run did not keep it."""
        members = self.members
        sizes = self.columns or [width // len(members)] * len(members)
        firsts = [0, *accumulate(sizes)]
        return [
            column
            for member, first, after in zip(members, firsts[:-1], firsts[1:], strict=True)
            if member in chosen
            for column in range(first, after)
        ]


class Batch(_Written):
    """A batch that stands; ``update`` is the digest of the file that holds its ΔW (`files.content_digest`)."""

    event: Literal["batch"] = "batch"
    update: str | None = None
    peak_memory: int | None = None


class GuardStop(_Written):
    """A batch that the guard withdrew, and why; the facts still waiting are withdrawn with it."""

    event: Literal["guard"] = "guard"
    reason: str


class FinalRecheck(Record):
    """At the end of a stream: who was asked, and who did not give the new answer."""

    event: Literal["look back"] = "look back"
    after: int
    rechecked: list[int] = Field(alias="asked")
    forgotten: list[int]
    seconds: dict[str, float]


class RemovalCheck(Record):
    """Which of the facts of a removal give the unedited model's answers again, after a batch."""

    event: Literal["removal check"] = "removal check"
    after: int
    facts: list[ReturnedEntry]
    seconds: dict[str, float]

    @property
    def missing(self) -> list[int]:
        """The facts whose prompts do not give the unedited model's answers."""
        return [entry["fact"] for entry in self.facts if not entry["returned"]]


class Evaluation(Record):
    """Scores of the facts asked after a batch, and what was measured of the model as a whole.

    ``sha256`` is that of the file which holds them.
    """

    event: Literal["evaluation"] = "evaluation"
    after: int
    facts: int
    final: bool
    summary: dict[str, float | None]
    sha256: str | None = None
    perplexity: float | None
    divergence: float | None
    energy: dict[str, EnergyEntry]
    routes: dict[str, float] | None = None
    unedited_texts: dict[str, Any] | None = None
    texts: dict[str, Any] | None = None


class Ability(Record):
    """General ability after a batch, 0 for the unedited model: scores by task, and the tasks' hashes."""

    event: Literal["ability"] = "ability"
    after: int
    tasks: dict[str, str]
    limit: int | None
    scores: dict[str, dict[str, Any]]


class Rollback(Record):
    """The weights were put back to what they were after batch ``to``."""

    event: Literal["rollback"] = "rollback"
    to: int


class Finished(Record):
    """Nothing is left to do; of the process that came so far, the most bytes held on its device, and what its shapes said."""

    event: Literal["finished"] = "finished"
    after: int
    peak_memory: int | None = None
    expected_memory: int | None = None


AnyRecord = Annotated[
    FactsAccepted
    | Unedited
    | Batch
    | GuardStop
    | FinalRecheck
    | RemovalCheck
    | Evaluation
    | Ability
    | Rollback
    | Finished,
    Field(discriminator="event"),
]
_RECORDS: TypeAdapter[Any] = TypeAdapter(AnyRecord)


def parse_record(line: bytes, where: str) -> Record:
    """A line of the journal.

    Raises:
        SphereEditError: it is no record of this version, saying what is wrong with it and ``where`` it stands.
    """
    try:
        record: Record = _RECORDS.validate_json(line)
    except ValidationError as error:
        raise SphereEditError(f"{where} is damaged ({first_fault(error)}); restore it from a backup") from None
    return record


class ModelIdentity(BaseModel):
    """Which model a run edits."""

    source: str
    fingerprint: str
    family: str
    parameters: int
    dtype: str


class CorpusIdentity(BaseModel):
    """Which text its statistics come from."""

    origin: str
    sha256: str
    passages: int
    tokens: int
    heldout_passages: int


class RunConfig(BaseModel):
    """The content of ``config.json``: everything that affects results, decided before the first batch."""

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)
    NAME: ClassVar[str] = "config.json"

    version: int = Field(SCHEMA, alias="schema")
    created: str
    model: ModelIdentity
    preset: str | None = None
    settings: dict[str, Any]
    method_options: dict[str, Any]
    sphere: Sphere | None
    layers: list[int]
    matrices: list[str]
    templates: list[str]
    corpus: CorpusIdentity
    versions: dict[str, str]
    device: str
    threads: int
    layout: Layout | None = None  # runs begun before it was kept lack it

    _begun_without: tuple[str, ...] = PrivateAttr(())  # settings of targets that there were not yet

    @model_validator(mode="wrap")
    @classmethod
    def _as_it_was_begun(cls, content: Any, read: ModelWrapValidatorHandler[Self]) -> Self:
        """Settings of targets that a run does not have came after it: what they were then, whatever a method's are by now."""
        settings = content.get("settings") if isinstance(content, dict) else None
        targets = settings.get("targets") if isinstance(settings, dict) else None
        if settings is None or not isinstance(targets, dict) or targets.keys() >= _SINCE.keys():
            return read(content)
        config = read({**content, "settings": {**settings, "targets": {**_SINCE, **targets}}})
        config._begun_without = tuple(_SINCE.keys() - targets.keys())
        return config

    @property
    def architecture(self) -> Architecture | None:
        """The layout of the model, where the run keeps it."""
        return None if self.layout is None else self.layout.architecture()

    def as_content(self) -> dict[str, Any]:
        """Plain values, for the file."""
        content = self.model_dump(mode="json", by_alias=True, exclude={"layout"} if self.layout is None else None)
        for name in self._begun_without:  # and is hashed without
            del content["settings"]["targets"][name]
        return content

    @property
    def digest(self) -> str:
        """SHA-256 over all of it but when the run began and where its model is."""
        content = self.as_content()
        del content["created"], content["model"]["source"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def method(self) -> str:
        """The name of the run's method."""
        return str(self.settings["method"])


def parse_config(content: object, where: str) -> RunConfig:
    """The content of a ``config.json``.

    Raises:
        SphereEditError: it was written by another version, or something is missing in it.
    """
    schema = content.get("schema") if isinstance(content, dict) else None
    if not isinstance(schema, int):
        raise SphereEditError(f"{where}/{RunConfig.NAME} is damaged; put it back from a backup")
    if schema != SCHEMA:
        age, advice = ("a newer", "upgrade") if schema > SCHEMA else ("an older", "go on with that one")
        raise SphereEditError(f"{where} was written by {age} sphere-edit (schema {schema}); {advice}")
    try:
        config = RunConfig.model_validate(content)
    except ValidationError as error:
        raise SphereEditError(
            f"{where}/{RunConfig.NAME} is damaged ({first_fault(error)}); put it back from a backup"
        ) from None
    if strange := [name for name in config.matrices if not _MATRIX.fullmatch(name)]:
        raise SphereEditError(f"{where}/{RunConfig.NAME} is damaged ({strange[0]!r} is no name of a matrix)")
    if not isinstance(config.settings.get("method"), str):
        raise SphereEditError(
            f"{where}/{RunConfig.NAME} is damaged ('settings' names no method); put it back from a backup"
        )
    return config


def first_fault(error: ValidationError) -> str:
    """What is wrong first, and with which field."""
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    return f"'{name}': {first['msg']}" if name else str(first["msg"])
