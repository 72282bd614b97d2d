"""What a model's configuration says: where its text model's values stand, and which class builds it, before any weights are fetched."""

from __future__ import annotations

import sys
from typing import Any


def text_config(model: Any) -> Any:
    """The configuration of a model's text decoder: the model's own, or a part of an image-text model's."""
    return model.config.get_text_config(decoder=True)


def positions(model: Any) -> int:
    """How many tokens a row may have; as many as there are numbers, where the configuration does not say."""
    return getattr(text_config(model), "max_position_embeddings", None) or sys.maxsize
