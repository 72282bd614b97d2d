"""transformers' own loader, with its errors in plain words."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from sphere_edit.errors import SphereEditError
from sphere_edit.files import cache_dir, plain_errors
from sphere_edit.models.configuration import CAUSAL
from sphere_edit.models.quiet import quiet
from sphere_edit.models.soundness import refuse_scales


def from_pretrained(
    source: str,
    where: str,
    dtype: torch.dtype | str,
    trust: bool = False,
    loader: str = CAUSAL,
    quantised: Mapping[str, Any] | None = None,
    gguf: str | None = None,
    places: Mapping[str, int | str] | None = None,
) -> tuple[Any, Any]:
    """A model and its tokenizer from a folder or hub id ``where``; ``source`` is what the user called it.

    Args:
        trust: whether code that comes with the model may be run.
        loader: the auto class of transformers that builds it.
        quantised: how its weights are quantised, which is undone.
        gguf: the name of a GGUF file in the folder, to be read in its place.
        places: where each of its modules goes (`placement.Placement.resolved`); all on the CPU without.

    Raises:
        SphereEditError: it cannot be loaded, or its files lack weights that its configuration describes.
    """
    # transformers is imported here and not above, so that `sphere-edit --help` answers at once
    import transformers

    file = {} if gguf is None else {"gguf_file": gguf}
    options: dict[str, Any] = {"use_safetensors": True}
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, trust_remote_code=trust, **file)
            if gguf is not None:
                options = dict(file)
                if hasattr(transformers, "GgufConfig"):  # before 5.21, GGUF was always dequantised
                    options["quantization_config"] = transformers.GgufConfig(dequantize=True)
            elif quantised is not None:
                options["config"] = _undone(where, quantised, trust)
            folder = None if places is None else _spread_over(options, places)
            model, found = getattr(transformers, loader).from_pretrained(
                where, dtype=dtype, trust_remote_code=trust, output_loading_info=True, **options
            )
            if folder is not None:
                weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
            if quantised is not None:  # saving would take the steps of loading back, and quantise the weights again
                model._weight_conversions = None
    except Exception as error:  # whatever the library, its tokenizers and its checks of a configuration raise
        if is_out_of_memory(error):
            raise
        raise SphereEditError(f"model '{source}' cannot be loaded: {first_lines(error)}") from None
    refuse_scales(found["unexpected_keys"], source, model.config.to_dict())
    lacking = [*sorted(found["missing_keys"]), *(str(key[0]) for key in found["mismatched_keys"])]
    if lacking:  # transformers would put random numbers in their place
        raise SphereEditError(
            f"model '{source}' lacks {len(lacking)} of the weights that its config.json describes, or has them in another shape; the "
            f"first: {lacking[0]}. Is it a whole checkpoint of a causal language model?"
        )
    return tokenizer, model


def _spread_over(options: dict[str, Any], places: Mapping[str, int | str]) -> str | None:
    """Let the loader put modules there; the folder for what the disk gets and the model's files do not have as it is (experts)."""
    options["device_map"] = dict(places)
    if "disk" not in places.values():
        return None
    parent = cache_dir() / "offload"
    with plain_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        options["offload_folder"] = tempfile.mkdtemp(dir=parent)
    return str(options["offload_folder"])


def _undone(where: str, quantised: Mapping[str, Any], trust: bool) -> Any:
    from transformers import AutoConfig

    from sphere_edit.models.dequantising import undo

    config = AutoConfig.from_pretrained(where, trust_remote_code=trust)
    undo(config, quantised)
    return config


def skeleton(where: str, loader: str, trust: bool = False, dtype: torch.dtype | None = None) -> Any:
    """A model without weights: its modules, with the names, shapes and dtypes of its parameters.

    Args:
        dtype: of the parameters, where it is not the configuration's.

    Raises:
        SphereEditError: transformers cannot build it.
    """
    import transformers

    try:
        with quiet(), torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=trust)
            return getattr(transformers, loader).from_config(
                config, trust_remote_code=trust, dtype=dtype or config.dtype
            )
    except Exception as error:  # whatever the library and its checks of a configuration raise
        raise SphereEditError(
            f"no model can be built from the configuration of '{where}': {first_lines(error)}"
        ) from None


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device ran out of memory, which the command line tells in its own way."""
    return type(error).__name__ == "OutOfMemoryError"


@contextmanager
def usable(source: str) -> Iterator[None]:
    """Whatever a loaded model or its tokenizer stumbles over at their first use is told as a fault of the model's files."""
    try:
        yield
    except SphereEditError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise SphereEditError(
            f"model '{source}' loads and cannot be used; its configuration or tokenizer is damaged, or does not fit its weights: "
            f"{type(error).__name__}: {first_lines(error)}"
        ) from None


def first_lines(error: Exception) -> str:
    """What an error of a library says, in one line of 400 characters at most."""
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else text[:400] + " …"
