"""How numbers and names read, in tables and on pages alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sphere_edit.counting import counted
from sphere_edit.evaluation.ability import AbilityScore


def percent(value: float | None) -> str:
    """A percentage, or a dash where there was nothing to measure."""
    return "–" if value is None else f"{value:.1f} %"


def decimals(value: float | None, digits: int, sign: str = "") -> str:
    """A number with some decimals, with its sign if ``sign`` is "+"; a dash where there is none."""
    return "–" if value is None else f"{value:{sign}.{digits}f}"


def between(interval: Sequence[float]) -> str:
    """A confidence interval of percentages."""
    return f"{interval[0]:.1f}–{interval[1]:.1f}"


def span(values: Sequence[float]) -> str:
    """The smallest and largest of some numbers."""
    if not values:
        return "–"
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low}–{high}"


def relative(before: float, after: float) -> str:
    """Change in percent of the value before."""
    return f"{100 * (after - before) / before:+.3f} %" if before else ""


def times(before: float | None, after: float | None) -> str:
    """A value as a multiple of the value before; nothing where either is missing."""
    return f"× {after / before:.3f}" if before and after else ""


def yes(verdict: bool) -> str:
    """A verdict."""
    return "yes" if verdict else "no"


def one_line(text: str | None) -> str:
    """What a model said, without line breaks; a dash where it was not asked."""
    return "–" if text is None else " ".join(text.split())


def short_name(name: str) -> str:
    """``model.layers.4.mlp.down_proj`` → ``4.mlp.down_proj``."""
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[first:])


def with_error(score: AbilityScore) -> str:
    """An ability's score with its standard error, a share of right answers in percent."""
    scale, digits, unit = (100, 1, " %") if score.share else (1, 3, "")
    error = "" if score.error is None else f" ± {scale * score.error:.{digits}f}"
    return f"{scale * score.value:.{digits}f}{error}{unit}"


def guessing(score: AbilityScore) -> str:
    """What guessing would score, and whether the unedited model's ``score`` is no better."""
    if score.chance is None:
        return "–"
    return percent(100 * score.chance) + (" (at chance)" if score.at_chance else "")


def by_stage(seconds: Mapping[str, float]) -> str:
    """Seconds by stage."""
    return ", ".join(f"{stage} {spent:.1f} s" for stage, spent in seconds.items())


def happened(kind: str, about: Mapping[str, int | str], single: bool) -> str:
    """An event of a run (`stories.Event`), or of a ``single`` fact."""
    said = {name: counted(int(value), _NOUNS[name]) if name in _NOUNS else value for name, value in about.items()}
    return (_OF_FACT if single else _OF_RUN)[kind].format(**said)


_NOUNS = {"facts": "fact", "asked": "fact", "steps": "step"}
_WAYS = {
    "restored": "the state of batch {base} taken up again",
    "subtracted": "what was written subtracted",
    "written back": "what the unedited model makes of the prompt written in its place",
}
_OF_RUN = {
    "facts": "{facts} came, from {source}",
    "edit": "{facts} edited, {again} rewritten, {superseded} superseded",
    "rewrite": "{again} of the facts rewritten",
    "repair": "ordinary text repaired, {steps}",
    "guard": "stopped by the guard: {reason}",
    "recheck": "{asked} asked, {missing} did not give their new answer",
    "check": "of those removed, {asked} asked, {missing} did not give the unedited model's answer",
    "rollback": "rolled back to here",
    **{kind: "{facts} removed: " + way for kind, way in _WAYS.items()},
}
_OF_FACT = {
    "facts": "came, from {source}",
    "edit": "edited",
    "rewrite": "rewritten",
    "superseded": "superseded by fact {by}",
    "knew": "asked, and gave its new answer",
    "missed": "asked, and did not give its new answer",
    "returned": "asked, and gave the unedited model's answer again",
    "not returned": "asked, and did not give the unedited model's answer",
    "guard": "withdrawn, for the guard stopped the run: {reason}",
    "rollback": "withdrawn by a rollback to here",
    **{kind: "removed: " + way for kind, way in _WAYS.items()},
}
