"""metrics.json and the tables made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from sphere_edit.evaluation.metrics import PROTOCOLS, PromptScore
from sphere_edit.runs.records import Batch, FinalRecheck
from sphere_edit.text import terminal

LABELS = {
    "efficacy": "Efficacy",
    "generalization": "Generalization",
    "specificity": "Specificity",
    "score": "Score (harmonic mean)",
}


def make_table(title: str, *columns: str, left: Sequence[str] = (), head: bool = True) -> Table:
    """An empty table in the house's style; columns hold numbers but for those named in ``left``."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, show_header=head
    )
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right")
    return table


def metrics_table(
    unedited: Mapping[str, Any], edited: Mapping[str, Any], title: str, intervals: Mapping[str, Any] | None = None
) -> Table:
    """The unedited and the edited model side by side, in every protocol, with what was measured of the model as a whole."""
    table = make_table(title, "", "protocol", "before", "after", "95 % or change", left=("", "protocol"))
    for suffix, protocol in PROTOCOLS.items():
        for key, label in LABELS.items():
            name = key + suffix
            if edited[name] is not None:
                within = None if intervals is None else intervals["edited"][name]
                cells = (percent(unedited[name]), percent(edited[name]), "" if within is None else between(within))
                table.add_row(
                    label, protocol, *cells, style="bold" if key == "score" else "", end_section=key == "score"
                )
    if "perplexity" in edited:
        before, after = unedited["perplexity"], edited["perplexity"]
        ratio = f"× {after / before:.3f}" if before and after else ""
        table.add_row("Perplexity", "held-out text", number(before), number(after), ratio)
        table.add_row("KL from unedited, nats", "held-out text", "", number(edited["divergence"], 4), "")
    for name, digits in (("fluency", 3), ("consistency", 3)):
        if "texts" in edited and edited["texts"][name] is not None:
            values = [number(side["texts"][name], digits) if "texts" in side else "" for side in (unedited, edited)]
            table.add_row(name.capitalize(), f"{edited['texts']['facts']} facts", *values, "")
    for name, energy in edited.get("energy", {}).items():
        before, after = unedited["energy"][name]["per_pair"], energy["per_pair"]
        table.add_row("Energy a pair", short_name(name), f"{before:.5f}", f"{after:.5f}", relative(before, after))
    return table


def single_table(scores: Mapping[str, Any], title: str) -> Table:
    """One model alone, in every protocol."""
    shown = [suffix for suffix in PROTOCOLS if scores[f"efficacy{suffix}"] is not None]
    table = make_table(title, "", *(PROTOCOLS[suffix] for suffix in shown), left=("",))
    for key, label in LABELS.items():
        table.add_row(label, *(percent(scores[f"{key}{suffix}"]) for suffix in shown))
    return table


def ability_table(scores: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """General ability by task, before and, where it was edited, after, with standard errors."""
    edited = "edited" in scores
    columns = ("task", "metric", "documents", "before", *(("after",) if edited else ()), "guessing")
    table = make_table(f"General ability, {title}", *columns, left=("task", "metric"))
    for name, before in scores["unedited"].items():
        after = scores.get("edited", {}).get(name)
        cells = [with_error(before), *([with_error(after) if after else "–"] if edited else [])]
        table.add_row(name, before["metric"], str(before["documents"]), *cells, guessing(before))
    return table


def with_error(score: Mapping[str, Any]) -> str:
    """An ability's score with its standard error, a share of right answers in percent."""
    scale, digits, unit = (100, 1, " %") if score["share"] else (1, 3, "")
    error = "" if score["error"] is None else f" ± {scale * score['error']:.{digits}f}"
    return f"{scale * score['value']:.{digits}f}{error}{unit}"


def guessing(score: Mapping[str, Any]) -> str:
    """What guessing would score, and whether the unedited model's ``score`` is no better."""
    if score["chance"] is None:
        return "–"
    return percent(100 * score["chance"]) + (" (at chance)" if score["at_chance"] else "")


def trials_table(trials: Sequence[Mapping[str, Any]], title: str) -> Table:
    """What each setting came to in a calibration, the chosen one first; a trial as its summary says it."""
    columns = ("settings", "strict", "generalization", "specificity", "KL, nats", "score")
    table = make_table(f"Calibration, {title}: all facts in one batch", *columns, left=("settings",))
    for trial in trials:
        said = "; ".join(f"{name} {value}" for name, value in trial["settings"].items()) or "defaults"
        numbers = [percent(trial[name]) for name in ("strict", "generalization", "specificity")]
        table.add_row(one_line(said), *numbers, f"{trial['divergence']:.4f}", f"{trial['score']:.3f}")
    return table


_TARGET_COLUMNS = (("loss_before", 2), ("loss_after", 3), ("probability_after", 3))


def batches_table(batches: Sequence[Batch]) -> Table:
    """What the journal says of each batch."""
    table = make_table(
        "Batches",
        "batch",
        "facts",
        "superseded",
        "again",
        "loss before",
        "after",
        "target prob.",
        "‖ΔW‖/‖W‖",
        "‖ΔW U‖/‖ΔW‖",
        "seconds",
    )
    for batch in batches:
        matrices = batch.matrices.values()
        sizes = [m["relative_norm"] for m in matrices]
        shares = [m["principal_norm"] / m["update_norm"] for m in matrices if m["update_norm"]]
        targets: Mapping[str, Any] = batch.targets
        table.add_row(
            str(batch.number),
            "repair" if batch.kind == "repair" else str(len(batch.facts)),
            str(len(batch.superseded)),
            str(len(batch.rewritten)),
            *("–" if targets[key] is None else f"{targets[key]:.{digits}f}" for key, digits in _TARGET_COLUMNS),
            span(sizes),
            span(shares),
            f"{sum(batch.seconds.values()):.1f}",
        )
    return table


def facts_table(per_fact: Sequence[Mapping[str, Any]], count: int) -> Table:
    """Some facts of ``metrics.json``, those that did not take first, then those not held strictly, then the oldest."""

    def verdicts(row: Mapping[str, Any]) -> tuple[bool, bool]:
        score = PromptScore(**row["edited"]["rewrite"])
        return score.prefers, score.correct

    columns = ("prompt", "new answer", "says now", "batch", "likelihood", "strict")
    table = make_table(f"Facts ({count} of {len(per_fact)}, failures first)", *columns, left=columns)
    for row in sorted(per_fact, key=lambda row: (*verdicts(row), row["index"]))[:count]:
        marks = ["yes" if verdict else "no" for verdict in verdicts(row)]
        prompt = row["prompt"].replace("{}", row["subject"])
        said = terminal(one_line(row["edited"]["rewrite"]["said"]))
        table.add_row(terminal(prompt), terminal(row["target_new"].strip()), said, str(row["batch"]), *marks)
    return table


def timings(records: Sequence[Batch | FinalRecheck]) -> str:
    """Seconds by stage, over all of these records of a journal."""
    total: dict[str, float] = {}
    for record in records:
        for stage, seconds in record.seconds.items():
            total[stage] = total.get(stage, 0.0) + seconds
    return ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in total.items())


def one_line(text: str | None) -> str:
    """What a model said, without line breaks; a dash where it was not asked."""
    return "–" if text is None else " ".join(text.split())


def percent(value: float | None) -> str:
    """A percentage, or a dash where there was nothing to measure."""
    return "–" if value is None else f"{value:.1f} %"


def number(value: float | None, digits: int = 2) -> str:
    """A number with some decimals, or "not finite" where the model's loss was not."""
    return "not finite" if value is None else f"{value:.{digits}f}"


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


def short_name(name: str) -> str:
    """``model.layers.4.mlp.down_proj`` → ``4.mlp.down_proj``."""
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[first:])
