"""Configurations that both transformers 4 and 5 read alike: where a name changed, both names are written.

transformers 4 does not know ``rope_parameters`` and takes its default rotary base instead, without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sphere_edit.files import write_json
from sphere_edit.models.source import read_object

_TOKENIZERS = {"TokenizersBackend": "PreTrainedTokenizerFast"}  # the name that both know
_OF_THE_MAKER = ("_name_or_path",)  # a path of the machine that wrote the file
_OF_THE_LOADING = ("local_files_only", "is_local", "name_or_path")


def spell_both(folder: Path) -> None:
    """Rewrite what ``save_pretrained`` of transformers 5 wrote so that transformers 4 reads the same; no private path stays."""
    for name, spelled in (("config.json", both_config), ("tokenizer_config.json", both_tokenizer)):
        if (folder / name).is_file():
            write_json(folder / name, spelled(read_object(folder / name)))


def both_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` with the names of both."""
    both = {name: value for name, value in config.items() if name not in _OF_THE_MAKER}
    dtype = both.get("dtype", both.get("torch_dtype"))
    if dtype is not None:
        both |= {"dtype": dtype, "torch_dtype": dtype}
    rope = both.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return both
    if all(isinstance(part, Mapping) for part in rope.values()):  # by kind of attention, as in Gemma 3
        local = rope.get("sliding_attention", {}).get("rope_theta")
        rope = rope.get("full_attention", {})
        both |= {} if local is None else {"rope_local_base_freq": local}
    theta, partial = rope.get("rope_theta"), rope.get("partial_rotary_factor")
    both |= {} if theta is None else {"rope_theta": theta, "rotary_emb_base": theta}
    both |= {} if partial is None else {"partial_rotary_factor": partial, "rotary_pct": partial}
    rest = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    if rest.get("rope_type", "default") != "default":
        both["rope_scaling"] = rest
    return both


def both_tokenizer(config: Mapping[str, Any]) -> dict[str, Any]:
    """A ``tokenizer_config.json`` with names that both know."""
    both = {name: value for name, value in config.items() if name not in _OF_THE_LOADING}
    if "tokenizer_class" in both:
        both["tokenizer_class"] = _TOKENIZERS.get(both["tokenizer_class"], both["tokenizer_class"])
    if isinstance(both.get("extra_special_tokens"), list):  # transformers 4 expects a mapping there
        both["additional_special_tokens"] = both.pop("extra_special_tokens")
    return both
