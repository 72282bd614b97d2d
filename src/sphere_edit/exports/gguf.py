"""A GGUF file with the edited tensors replaced, for llama.cpp, Ollama and LM Studio; all other tensors and the metadata stay bit for bit.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: a head that ends with type and offset of each tensor, and
the tensors' data. A tensor that keeps its type is written over in a copy. One of a type that rounds more coarsely than an edit changes
becomes Q8_0: its entry in the head gets the new type, and those behind it their new offsets, so that the head keeps its length.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sphere_edit.errors import SphereEditError
from sphere_edit.exports.card import Note
from sphere_edit.exports.gauge import Gauge
from sphere_edit.exports.manifest import Manifest
from sphere_edit.exports.shipment import Shipment
from sphere_edit.files import plain_errors
from sphere_edit.models.gguf import embedded_model_file
from sphere_edit.models.loading import EMBEDDED, load_beside
from sphere_edit.models.offload import fetched
from sphere_edit.models.source import refuse_pointer
from sphere_edit.models.weights import EditedWeights
from sphere_edit.runs.weights import RunWeights

_KEPT = ("F32", "F16", "BF16", "Q8_0")  # types that an edited tensor keeps
_ROUNDING = {"F32": 2e-3, "F16": 2e-3, "BF16": 4e-3}  # relative, and twice what it is: other types by their bits
_ENTRY = (0, 1, 2, 3)  # parts of a tensor's entry before its type and offset: length and text of its name, dimensions


@dataclass(frozen=True)
class Place:
    """An edited matrix in a base file: the tensor that holds it, and the type it is written in."""

    tensor: Any
    kind: str

    @property
    def name(self) -> str:
        """What GGUF calls it."""
        return str(self.tensor.name)

    @property
    def keeps(self) -> bool:
        """Whether it stays of its type."""
        return self.kind == str(self.tensor.tensor_type.name)

    def content(self, weight: Tensor) -> bytes:
        """The bytes of a weight ``[d_out, d_in]`` in this type."""
        from gguf import GGMLQuantizationType, quants

        found = quants.quantize(weight.detach().float().cpu().numpy(), GGMLQuantizationType[self.kind])
        if self.kind == "F16" and not np.isfinite(found).all():
            raise SphereEditError(f"{self.name} does not fit F16 after the edit; give a base file of BF16 or F32")
        return found.tobytes()


def base_of(shipment: Shipment, base: Path | None) -> Path:
    """The file whose tensors are to be replaced: the one given, or the one that the run's model came from.

    Raises:
        SphereEditError: none was given, and the model came from none.
    """
    source = shipment.loaded.source
    if base is not None:
        return base
    if source == EMBEDDED:
        return embedded_model_file()
    if source.endswith(".gguf"):
        return Path(source)
    raise SphereEditError(
        f"--as gguf needs --base FILE.gguf, '{source}' as a GGUF file: the edited tensors are put into a copy of it"
    )


def write_gguf(shipment: Shipment, folder: Path, base: Path, gauge: Gauge | None = None) -> list[str]:
    """Write a copy of the GGUF file ``base`` with the edited tensors in it to a new folder.

    Args:
        gauge: measures the file once it is written, as our own loader reads it.

    Returns:
        what a user should know of it, in sentences.

    Raises:
        SphereEditError: ``base`` is no GGUF file, or of another model; the folder is not empty or cannot be written.
    """
    reader = _reader(base)
    places = _places(reader, shipment, base)
    _check_embedding(reader, shipment, base)
    kinds = {name: {"tensor": place.name, "type": place.kind} for name, place in places.items()}
    file = f"{base.stem}-edited.gguf"
    manifest = shipment.manifest("gguf", file=file, base_file=base.name, tensors=kinds)

    def note(written: Path) -> Note:
        text = (
            f"`{file}` is a copy of `{base.name}`. Edited are {', '.join(_told(place) for place in places.values())}."
        )
        if gauge is None:
            return Note("gguf", text)
        measured = gauge.measure(load_beside(written / file, shipment.loaded), "the GGUF file")
        return Note("gguf", text, {"this file, loaded as float32": measured})

    with shipment.folder(folder, manifest, note) as temporary:
        _write(reader, base, temporary / file, places, shipment.weights)
    coarse = [place for place in places.values() if not place.keeps]
    if not coarse:
        return []
    types = " or ".join(sorted({place.kind for place in coarse}, reverse=True))
    if len(coarse) == 1:
        return [f"{coarse[0].name} of {base.name} rounds more coarsely than an edit changes, and is {types} now"]
    return [
        f"{len(coarse)} tensors of {base.name} round more coarsely than an edit changes, and are {types} now: {coarse[0].name}, …"
    ]


def differing(folder: Path, manifest: Manifest, weights: RunWeights) -> Iterator[str]:
    """Which tensors of an exported file are not the run's, one sentence each."""
    assert manifest.state is not None
    file = folder / manifest.details["file"]
    tensors = {tensor.name: tensor for tensor in _reader(file).tensors}
    for name, entry in manifest.details["tensors"].items():
        tensor = tensors[entry["tensor"]]
        wanted = Place(tensor, entry["type"]).content(weights.deployed(name, manifest.state.batch))
        if tensor.data.tobytes() != wanted:
            yield f"{name} ({entry['tensor']}) in {file} is not that of the run"


def _reader(path: Path) -> Any:
    from gguf import GGUFReader

    if not path.is_file():
        raise SphereEditError(f"there is no file '{path}'")
    refuse_pointer(path)
    try:
        with plain_errors(path, "read"):
            reader = GGUFReader(path)
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise SphereEditError(
            f"{path} cannot be read as GGUF ({' '.join(str(error).split())[:200]}); download it again"
        ) from None
    split = reader.get_field("split.count")
    if reader.byte_order != "I" or (split is not None and int(split.contents()) > 1):
        raise SphereEditError(
            f"{path} is one of several files, or of the other byte order; give the model in one file (llama-gguf-split --merge)"
        )
    return reader


def _places(reader: Any, shipment: Shipment, base: Path) -> dict[str, Place]:
    """Where the file has the edited matrices, each of which must be what the run's model had there before."""
    names, weights = _names(reader, base), shipment.weights
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    found = {}
    for name in weights.names:
        stored = names.get_name(name)
        tensor = tensors.get(f"{stored}.weight")
        if tensor is None:
            raise SphereEditError(
                f"{base} has no tensor for {name}; it is of another model, or of a kind that the gguf package does not know"
            )
        _compare(tensor, weights.original(name), base, name)
        kind = str(tensor.tensor_type.name)
        found[name] = Place(tensor, kind if kind in _KEPT else "Q8_0" if tensor.shape[0] % 32 == 0 else "F16")
    return found


def _names(reader: Any, base: Path) -> Any:
    """How the gguf package names the modules of this file's architecture."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    fields = [reader.get_field("general.architecture")]
    kind = None if fields[0] is None else str(fields[0].contents())
    known = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    depth = reader.get_field(f"{kind}.block_count")
    if kind not in known or depth is None:
        raise SphereEditError(
            f"{base} is of the architecture '{kind}', which the gguf package does not know; upgrade it"
        )
    return get_tensor_name_map(MODEL_ARCH(known[kind]), int(depth.contents()))


def _check_embedding(reader: Any, shipment: Shipment, base: Path) -> None:
    """The token embeddings too must be the model's: another model of the family can have much the same matrices."""
    tensor = next((one for one in reader.tensors if one.name == "token_embd.weight"), None)
    if tensor is not None:
        embedding = fetched(shipment.loaded.model.get_input_embeddings(), "weight")
        _compare(tensor, embedding.detach()[: int(tensor.shape[-1])], base, "the token embedding")


def _compare(tensor: Any, original: Tensor, base: Path, what: str) -> None:
    """Refuse a tensor that is not the original up to the rounding of its type."""
    from gguf import quants

    kind = str(tensor.tensor_type.name)
    shape = tuple(int(size) for size in reversed(tensor.shape))
    if shape != tuple(original.shape):
        raise SphereEditError(
            f"{base} is of another model: {tensor.name} is {shape}, and {what} is {tuple(original.shape)}"
        )
    try:
        stored = torch.from_numpy(np.array(quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
    except NotImplementedError:
        raise SphereEditError(
            f"{base} keeps {tensor.name} as {kind}, which the gguf package does not read; give a file in F16, BF16 or Q8_0"
        ) from None
    wanted = original.float().cpu()
    distance = float((stored.reshape(wanted.shape) - wanted).norm() / wanted.norm().clamp_min(1e-30))
    bits = re.search(r"\d", kind)
    allowed = _ROUNDING.get(kind, 2.0 / 2 ** int(bits[0]) if bits else 0.5)
    if not distance <= allowed:
        raise SphereEditError(
            f"{base} is of another model: {tensor.name} ({kind}) is {distance:.1%} away from {what}, where rounding explains {allowed:.1%}"
        )


def _told(place: Place) -> str:
    before = place.tensor.tensor_type.name
    return f"`{place.name}` ({place.kind})" if place.keeps else f"`{place.name}` ({place.kind}, was {before})"


def _write(reader: Any, base: Path, target: Path, places: Mapping[str, Place], weights: EditedWeights) -> None:
    contents = {place.name: (place, place.content(weights.deployed(name))) for name, place in places.items()}
    if all(place.keeps for place in places.values()):
        with plain_errors(target):
            shutil.copyfile(base, target)
            with target.open("rb+") as file:
                for place, content in contents.values():
                    file.seek(int(place.tensor.data_offset))
                    file.write(content)
        return
    with plain_errors(target), target.open("wb") as file:
        for piece in _laid_out_anew(reader, contents):
            file.write(piece)


def _laid_out_anew(reader: Any, contents: Mapping[str, tuple[Place, bytes]]) -> Iterator[bytes]:
    """The file piece by piece: the head with new types and offsets, then every tensor's data in the order in which it lay."""
    from gguf import GGMLQuantizationType

    head = bytearray(reader.data[: reader.data_offset].tobytes())
    ordered = sorted(reader.tensors, key=lambda tensor: int(tensor.data_offset))
    start, data = 0, []
    for tensor in ordered:
        place, content = contents.get(tensor.name, (None, None))
        content = tensor.data.tobytes() if content is None else content
        entry = int(tensor.field.offset) + sum(int(tensor.field.parts[part].nbytes) for part in _ENTRY)
        kind = tensor.tensor_type if place is None else GGMLQuantizationType[place.kind]
        head[entry : entry + 4] = int(kind).to_bytes(4, "little")
        head[entry + 4 : entry + 12] = start.to_bytes(8, "little")
        padded = len(content) + -len(content) % int(reader.alignment)
        data.append((tensor, content if place is not None else None, padded))
        start += padded
    yield bytes(head)
    for tensor, content, padded in data:
        filled = tensor.data.tobytes() if content is None else content
        yield filled + bytes(padded - len(filled))
