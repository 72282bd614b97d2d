"""A model's folder written again: the source's own files, with the bytes of some tensors replaced."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphere_edit.errors import SphereEditError
from sphere_edit.files import plain_errors, write_json
from sphere_edit.models.identity import tensor_bytes
from sphere_edit.models.loading import LoadedModel, whole_folder
from sphere_edit.models.offload import Stored
from sphere_edit.models.quiet import quiet
from sphere_edit.models.source import (
    INDEX,
    NOTHING,
    companions,
    read_config,
    stored_tensors,
    weight_files,
)
from sphere_edit.models.spelling import spell_both
from sphere_edit.models.stored import Piece, StoredParameters
from sphere_edit.models.weights import EditedWeights

_DTYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
_SPELLED = {stored: name.removeprefix("torch.") for name, stored in _DTYPES.items()}


class Replica:
    """What a folder of an edited model is made of, decided before anything is written.

    Attributes:
        source: the folder of the model's own files, None where there is none (a model made in memory).
        why_anew: why the weights cannot be the source's own with some bytes replaced; empty where they can.
        companions: the files that come along.
        dtype: of the floats in them.
    """

    def __init__(self, loaded: LoadedModel, weights: EditedWeights, dtype: torch.dtype | None = None):
        self._loaded, self._weights = loaded, weights
        self.dtype, self._other = dtype or loaded.dtype, dtype not in (None, loaded.dtype)
        code = any(
            type(part).__module__.startswith("transformers_modules") for part in (loaded.model, loaded.tokenizer)
        )
        self.source: Path | None = None
        self.companions = NOTHING
        self._places: dict[str, tuple[Piece, ...]] = {}
        try:
            source = whole_folder(loaded.source, code)
            self.companions, self.source = companions(source, code), source
            stored = StoredParameters(loaded.model, stored_tensors(source))
            for name in weights.names:
                self._places[name] = self._place(stored, name)
            self.why_anew = ""
        except SphereEditError as error:
            self.why_anew = str(error)

    def _place(self, stored: StoredParameters, name: str) -> tuple[Piece, ...]:
        """Where the source holds the original matrix ``name``: agreed in name, dtype, shape and every byte."""
        original, parameter = self._as_stored(name, self._weights.original(name)), self._weights.stored_as[name]
        found = stored.pieces(parameter)
        if not found:
            form = "in another form than the model" if stored.tensors(parameter) else "under no name that is known"
            raise SphereEditError(f"the files of '{self._loaded.source}' hold {parameter} {form}")
        dtype, there = _DTYPES[str(original.dtype)], found[0].tensor.dtype
        if there != dtype:
            wanted = "is wanted" if self._other else "was loaded"
            raise SphereEditError(
                f"the model {wanted} as {_SPELLED[dtype]}, and its files are {_SPELLED.get(there, there)}"
            )
        for piece in found:
            tensor, part = piece.tensor, piece.of(original)
            same = tensor.dtype == dtype and tensor.shape == tuple(part.shape)
            if not same or tensor.content() != tensor_bytes(part):
                raise SphereEditError(
                    f"the files of '{self._loaded.source}' hold {parameter} in another form than the model"
                )
        return found

    def _as_stored(self, name: str, weight: Tensor) -> Tensor:
        if not self._other:
            return self._weights.as_parameters({name: weight})[self._weights.stored_as[name]]
        (stored,) = self._weights.as_parameters({name: weight}, torch.float32).values()
        return self._cast(name, stored)

    def write(self, folder: Path) -> None:
        """Put configuration, tokenizer, companions and weights into an empty folder.

        Raises:
            SphereEditError: it cannot be written.
        """
        if self.why_anew:
            self._write_anew(folder)
        else:
            self._write_weights(folder)
        for path in self.companions.taken:
            name = path.relative_to(self.source or path.parent)
            if self.why_anew and name.name in ("config.json", INDEX):
                continue
            with plain_errors(folder / name):
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, folder / name)

    def _write_weights(self, folder: Path) -> None:
        assert self.source is not None
        for file in weight_files(self.source):
            with plain_errors(folder / file.name):
                shutil.copyfile(file, folder / file.name)
        for name, places in self._places.items():
            deployed = self._as_stored(name, self._weights.deployed(name))
            for piece in places:
                copy = folder / piece.tensor.file.name
                with plain_errors(copy), copy.open("rb+") as opened:
                    opened.seek(piece.tensor.start)
                    opened.write(tensor_bytes(piece.of(deployed)))

    def _write_anew(self, folder: Path) -> None:
        """All weights from memory by transformers; the configuration stays the source's, but for the numbers' name."""
        model = self._loaded.model
        weights = {name: self._cast(name, value) for name, value in Stored(model).items()} if self._other else None
        with quiet():
            model.save_pretrained(folder, state_dict=weights)
            if self.source is None:
                self._loaded.tokenizer.save_pretrained(folder)
        of_source = read_config(folder if self.source is None else self.source)
        write_json(folder / "config.json", plain_config(of_source, self.dtype))
        if self.source is None:
            spell_both(folder)

    def _cast(self, name: str, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        cast = value.to(self.dtype)
        if not bool(cast.isfinite().all()):
            raise SphereEditError(
                f"{name} does not fit {_spelled(self.dtype)}; export with --dtype bfloat16 or float32"
            )
        return cast


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plain_config(config: Mapping[str, Any], numbers: torch.dtype) -> dict[str, Any]:
    """A source's configuration for weights written from memory: in their dtype, quantised no more."""
    dtype = _spelled(numbers)
    kept = _plain(config)
    spelled: Sequence[str] = [name for name in ("dtype", "torch_dtype") if name in kept] or ["dtype", "torch_dtype"]
    return kept | dict.fromkeys(spelled, dtype)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without what it says of quantisation, be it of a part alone."""
    return {
        name: _plain(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if name not in ("quantization_config", "compression_config")
    }
