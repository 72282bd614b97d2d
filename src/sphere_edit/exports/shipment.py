"""An edited model that is about to leave, and the folder it leaves in: put in place whole, with its card and its manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sphere_edit.errors import SphereEditError
from sphere_edit.exports.card import Note, model_card, whole_card
from sphere_edit.exports.manifest import Base, Form, Manifest, State, digest_of, state_of
from sphere_edit.facts.fact import Fact
from sphere_edit.files import folder_in_place, write_text
from sphere_edit.models.loading import EMBEDDED, LoadedModel, whole_folder
from sphere_edit.models.source import NOTHING, Companions, companions
from sphere_edit.models.weights import EditedWeights
from sphere_edit.progress import Quiet, Reporter
from sphere_edit.runs.folder import RunFolder
from sphere_edit.runs.session import Session
from sphere_edit.text import public_name


@dataclass(frozen=True)
class Shipment:
    """A model in memory with its edits in place, and where they come from.

    Attributes:
        card: writes the model card, given what its form has to say.
        state: of which run it is; None where it is of none.
    """

    loaded: LoadedModel
    weights: EditedWeights
    card: Callable[[Note], str]
    state: State | None = None
    reporter: Reporter = field(default_factory=Quiet)

    @classmethod
    def of(cls, session: Session, run: RunFolder) -> Shipment:
        """The model of a run, whose last batch must be in place."""
        facts = retained(run)
        metrics = run.current_metrics()

        def card(note: Note) -> str:
            return model_card(run.config, run.history, facts, metrics, note)

        return cls(session.loaded, session.weights, card, state_of(run, run.history.head), session.reporter)

    def manifest(self, form: Form, **details: Any) -> Manifest:
        """What the export says of itself, but for its files."""
        dtype = str(self.loaded.dtype).removeprefix("torch.")
        base = Base(
            source=public_name(self.loaded.source),
            fingerprint=self.loaded.fingerprint,
            dtype=dtype,
            family=str(self.loaded.model.config.model_type),
        )
        matrices = {name: digest_of(self.weights.deployed(name)) for name in self.weights.names}
        return Manifest(form=form, base=base, state=self.state, matrices=matrices, details=details)

    @contextmanager
    def folder(
        self, path: Path, manifest: Manifest, note: Callable[[Path], Note], beside: Companions | None = None
    ) -> Iterator[Path]:
        """A folder to fill with the files of a form; it becomes ``path`` with its card and its manifest, or is not there at all.

        Args:
            note: what the form has to say once its files are in the folder, which it is given.
            beside: what stands beside the source's weights, if that is known already.

        Raises:
            SphereEditError: ``path`` is not an empty folder, or cannot be written.
        """
        with folder_in_place(path) as temporary:
            yield temporary
            found = self._companions() if beside is None else beside
            write_text(temporary / "README.md", whole_card(self.card(note(temporary)), self._hub_name(found), found))
            manifest.write(temporary)
            mode = (temporary / "README.md").stat().st_mode  # safetensors lets none but the owner read what it writes
            for written in temporary.rglob("*"):
                if written.is_file():
                    written.chmod(mode)

    def base_name(self) -> str:
        """What the original is called where others have to find it: its name on the hub; of a local one, the last part of its path."""
        return self._hub_name(self._companions()) or public_name(self.loaded.source)

    def _companions(self) -> Companions:
        try:
            return companions(whole_folder(self.loaded.source))
        except SphereEditError:  # made in memory, or its files are gone: there is no card to put ours above
            return NOTHING

    def _hub_name(self, beside: Companions) -> str | None:
        """The original's name on the hub, None for a model of this machine."""
        here = beside is NOTHING or self.loaded.source == EMBEDDED or Path(self.loaded.source).is_absolute()
        return None if here else self.loaded.source


def retained(run: RunFolder) -> Sequence[Fact]:
    """The facts that a run's model should know."""
    facts = run.facts()
    return [facts[index] for index in run.history.retained]
