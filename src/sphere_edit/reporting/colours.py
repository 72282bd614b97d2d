"""A colour for every method, on every figure the same."""

from __future__ import annotations

import colorsys
import hashlib
from collections.abc import Iterator
from itertools import islice

from sphere_edit.editing.methods import METHODS

# Okabe and Ito's colours and others, told apart by readers with any colour vision
_CHOSEN = {
    "alphaedit": "#0072B2",
    "memit": "#D55E00",
    "memit_seq": "#009E73",
    "emmet": "#CC79A7",
    "rect": "#E69F00",
    "prune": "#56B4E9",
    "rome": "#7F3C8D",
    "ft": "#000000",
    "ultraedit": "#8A8A00",
    "encore": "#A6761D",
    "lyaplock": "#E7298A",
    "nas": "#5F3813",
    "revive": "#6A3DFF",
    "frugal": "#66A61E",
}
_CANDIDATES = 200
_APART = 75.0  # least distance of a made colour from all others; black and white are 765 apart


def colour_of(method: str) -> str:
    """A method's colour as ``#RRGGBB``: chosen here, or made from its name, apart from those of all methods that were registered before it."""
    known = dict(_CHOSEN)
    for name in [*METHODS, method]:
        if name not in known:
            known[name] = _made(name, list(known.values()))
    return known[method]


def _made(name: str, taken: list[str]) -> str:
    """The first of a name's own colours that is far enough from those taken, or the farthest."""
    own = list(islice(_candidates(name), _CANDIDATES))
    room = {colour: min(_distance(colour, other) for other in taken) for colour in own}
    return next((colour for colour in own if room[colour] >= _APART), max(own, key=lambda colour: room[colour]))


def _candidates(name: str) -> Iterator[str]:
    """Colours of every hue, dark enough for lines on white, in an order that hangs on the name alone."""
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    number = 0
    while True:
        hue = (start + number * 0.61803398875) % 1.0  # the golden section comes near no hue twice in few steps
        rgb = colorsys.hls_to_rgb(hue, (0.4, 0.28, 0.52)[number % 3], (0.9, 0.6)[number % 2])
        yield "#" + "".join(f"{round(255 * part):02X}" for part in rgb)
        number += 1


def _distance(one: str, other: str) -> float:
    """How different two colours look: a Euclidean distance with weights that hang on the mean red ("redmean")."""
    (r, g, b), (r2, g2, b2) = (tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5)) for colour in (one, other))
    red = (r + r2) / 2
    return float(((2 + red / 256) * (r - r2) ** 2 + 4 * (g - g2) ** 2 + (2 + (255 - red) / 256) * (b - b2) ** 2) ** 0.5)
