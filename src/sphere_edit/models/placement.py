"""Where the parts of a model go when it is larger than one device: accelerate's placement, asked for in plain words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sphere_edit.errors import SphereEditError
from sphere_edit.files import yaml_value

WAYS = ("auto", "balanced", "balanced_low_0", "sequential")  # in which accelerate fills devices
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
Place = int | str  # the number of an accelerator, the name of a device, cpu or disk
DeviceMap = str | Mapping[str, Place]
Memory = Mapping[str, int | str | None]


@dataclass(frozen=True)
class Placement:
    """How a model is spread over devices, CPU memory and disk, as it was asked for.

    Attributes:
        device_map: one of `WAYS`, or the place of each module by its name.
        max_memory: bytes of weights at each place, such as 2000000000 or "2GB"; ``disk`` has none. A place that is not in it gets none.
    """

    device_map: DeviceMap
    max_memory: Memory | None = None

    def checked(self) -> Placement:
        """The same, if it makes sense without looking at a model or at this machine (`there`).

        Raises:
            SphereEditError: it does not.
        """
        if isinstance(self.device_map, str) and self.device_map not in WAYS:
            raise SphereEditError(
                f"device_map is {', '.join(WAYS)}, or the place of each module by its name, not '{self.device_map}'"
            )
        if not isinstance(self.device_map, str) and self.max_memory is not None:
            raise SphereEditError("max_memory is for a device map that is found (auto, …), not for one that is given")
        if not self.device_map:
            raise SphereEditError("the device map is empty; expected the place of each module by its name")
        for place, size in (self.max_memory or {}).items():
            if (place == "disk") != (size is None):
                raise SphereEditError("max_memory takes a size for each place, and none for disk: cpu=8GB,disk")
            _bytes(size or 0)
        if self.max_memory is not None and not self.max_memory.keys() - {"disk"}:
            raise SphereEditError("max_memory gives no memory to compute in; add one, such as cpu=8GB")
        return self

    def there(self) -> Placement:
        """The same, if every place that it names is on this machine; a run's may be of another.

        Raises:
            SphereEditError: one is not.
        """
        for place in self.max_memory or {}:
            known_place(_numbered(place), "max_memory")
        for named in {} if isinstance(self.device_map, str) else self.device_map.values():
            known_place(named, "the device map")
        return self

    def resolved(self, model: nn.Module, source: str) -> dict[str, Place]:
        """The place of each module of a model that has no weights yet (`pretrained.skeleton`).

        Blocks, which are what transformers says must not be split, go where accelerate puts them. All else stays on the first device.

        Raises:
            SphereEditError: a given map does not fit the model, or the model does not fit the memory.
        """
        if not isinstance(self.device_map, str):
            return _covering(model, self.device_map, source)
        from accelerate.utils import get_balanced_memory, infer_auto_device_map

        classes = list(getattr(model, "_no_split_modules", None) or [])
        blocks, others = _parts(model, set(classes))
        if not blocks:
            raise SphereEditError(
                f"transformers does not say what of '{source}' belongs together ({type(model).__name__} has no _no_split_modules); "
                "give a device map by module, or leave it out"
            )
        room = self._room()
        main = next((place for place in room if isinstance(place, int)), "cpu")
        rest = sum(_size(model, name) for name in others)
        if rest > room.get(main, 0):
            raise self._too_small(source, model)
        room[main] -= rest
        alone = nn.ModuleList(model.get_submodule(name) for name in blocks)
        if self.device_map != "sequential":
            low = self.device_map == "balanced_low_0"
            room = get_balanced_memory(alone, room, classes, low_zero=low)
        places = infer_auto_device_map(alone, room, classes, clean_result=False)
        if "disk" in places.values() and self.max_memory is not None and "disk" not in self.max_memory:
            raise self._too_small(source, model)
        named = {f"{blocks[int(first)]}{rest}": place for name, place in places.items() for first, rest in [_cut(name)]}
        return {**dict.fromkeys(others, main), **named}

    def _room(self) -> dict[Place, int]:
        """Bytes at each place, by accelerate where nothing was said."""
        from accelerate.utils import get_max_memory

        if self.max_memory is None:
            return {place: int(size) for place, size in get_max_memory().items() if place != "disk"}
        return {_numbered(place): _bytes(size) for place, size in self.max_memory.items() if size is not None}

    def _too_small(self, source: str, model: nn.Module) -> SphereEditError:
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        given = "this machine" if self.max_memory is None else "max_memory"
        return SphereEditError(
            f"the {size / 1e9:.3g} GB of '{source}', with room to run its largest layer, do not fit {given}; give more, or let "
            "decoder layers lie on disk: --max-memory cpu=8GB,disk. What is no decoder layer always stays in memory"
        )


def known_place(place: Place, where: str) -> None:
    """Refuse a place that is neither cpu nor disk nor a device that is there."""
    if place in ("cpu", "disk"):
        return
    try:
        if place == "meta":
            raise RuntimeError
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError):
        raise SphereEditError(
            f"{where} names '{place}', which is not there; expected cpu, disk, or the number of an accelerator"
        ) from None


def read_map(text: str) -> str | dict[str, Any]:
    """The device map of a command line: one of `WAYS`, or a JSON or YAML file with the place of each module."""
    if text in WAYS:
        return text
    path = Path(text)
    try:
        content = yaml_value(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError):
        raise SphereEditError(
            f"--device-map takes {', '.join(WAYS)}, or a file, and '{text}' cannot be read as one"
        ) from None
    except Exception as error:  # besides YAMLError, whatever the library's constructors stumble over
        raise SphereEditError(f"{path} is neither JSON nor YAML: {' '.join(str(error).split())}") from None
    plain = isinstance(content, dict) and all(
        isinstance(name, str) and type(place) in (int, str) for name, place in content.items()
    )
    if not plain:
        raise SphereEditError(f"{path}: expected names of modules and their places, such as 'model.layers.0: cpu'")
    return content


def read_memory(text: str) -> dict[str, str | None]:
    """The memory of a command line, ``0=20GB,cpu=60GB,disk``, by place."""
    found: dict[str, str | None] = {}
    for part in text.split(","):
        place, _, size = (piece.strip() for piece in part.partition("="))
        if not place or place in found:
            raise SphereEditError(f"--max-memory takes a size for each place, 0=20GB,cpu=60GB,disk, not '{text}'")
        found[place] = size or None
    return found


def spoken(places: Mapping[str, Place]) -> str:
    """A map in a few words: how many of its parts are where."""
    counts: dict[Place, int] = {}
    for place in places.values():
        counts[place] = counts.get(place, 0) + 1
    return ", ".join(f"{count} parts on {place}" for place, count in counts.items())


def main_of(places: Mapping[str, Place] | None) -> torch.device:
    """Where a model that is spread computes what lies elsewhere: its first accelerator, or the CPU."""
    found = next((place for place in (places or {}).values() if place not in ("cpu", "disk")), "cpu")
    return torch.empty(0, device=found).device


def place_of(name: str, places: Mapping[str, Place]) -> Place:
    """Where a map puts a module or a parameter: the longest of its names that leads to it says."""
    return places[max((key for key in places if _within(name, key)), key=len)]


def _numbered(place: str) -> Place:
    return int(place) if place.isdigit() else place


def _bytes(size: int | str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*", str(size).upper())
    if match is None or match[2] not in _UNITS:
        raise SphereEditError(f"max_memory takes sizes such as 20GB, 512MiB or 2000000000, not '{size}'")
    return int(float(match[1]) * _UNITS[match[2]])


def _parts(model: nn.Module, classes: set[str], prefix: str = "") -> tuple[list[str], list[str]]:
    """Names of the outermost modules of some classes, and of the largest modules and parameters that hold none of these."""
    blocks: list[str] = []
    others = [prefix + name for name, _ in model.named_parameters(recurse=False)]
    for name, child in model.named_children():
        if type(child).__name__ in classes:
            blocks.append(prefix + name)
        elif any(type(module).__name__ in classes for module in child.modules()):
            found = _parts(child, classes, f"{prefix}{name}.")
            blocks, others = blocks + found[0], others + found[1]
        else:
            others.append(prefix + name)
    return blocks, others


def _size(model: nn.Module, name: str) -> int:
    """Bytes of a module, a parameter or a buffer by its name; tied ones count where they come first."""
    return sum(
        tensor.numel() * tensor.element_size()
        for every in (model.named_parameters(), model.named_buffers())
        for full, tensor in every
        if full == name or full.startswith(f"{name}.")
    )


def _cut(name: str) -> tuple[str, str]:
    """A name within the list of blocks: the number of its block, and the rest."""
    first, dot, rest = name.partition(".")
    return first, dot + rest


def _covering(model: nn.Module, given: Mapping[str, Place], source: str) -> dict[str, Place]:
    """A given map, if its names are the model's and cover it."""
    modules = {name for name, _ in model.named_modules()}
    if unknown := [key for key in given if key not in modules]:
        raise SphereEditError(f"the device map names '{unknown[0]}', and '{source}' has no module of this name")
    if bare := [name for name in model.state_dict() if not any(_within(name, key) for key in given)]:
        raise SphereEditError(f"the device map of '{source}' has no place for '{bare[0]}'")
    return {name: place for key, place in given.items() for name in _alone(model, key, given)}


def _alone(model: nn.Module, key: str, given: Mapping[str, Place]) -> Iterator[str]:
    """The largest modules within a name of the map for which no longer name of it says anything."""
    if not any(other != key and _within(other, key) for other in given):
        yield key
        return
    for child, _ in model.get_submodule(key).named_children():
        name = f"{key}.{child}".lstrip(".")
        if name not in given:
            yield from _alone(model, name, given)


def _within(name: str, key: str) -> bool:
    return not key or name == key or name.startswith(f"{key}.")
