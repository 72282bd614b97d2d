"""Tables of what `sphere_edit.diagnosis` found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from sphere_edit.reporting.results import make_table
from sphere_edit.reporting.words import relative, short_name

NOTE = "A small change of energy is necessary for retention, not sufficient."


def energy_tables(reports: Sequence[Mapping[str, Any]], power: int, eta: float) -> list[Table]:
    """Each matrix as it is, and what became of it where there is something to compare with."""
    tables = [_states(reports, power, eta)]
    if any(report["change"] for report in reports):
        tables += [_changes(reports), _theory(reports)]
    return tables


def _states(reports: Sequence[Mapping[str, Any]], power: int, eta: float) -> Table:
    columns = ("matrix", "shape", f"HE_{power}", "per pair", "σ max", "effective rank", f"principal (η {eta:g})")
    table = make_table("Weights", *columns, left=("matrix",))
    for report in reports:
        state = report["before"]
        table.add_row(
            short_name(report["name"]),
            f"{report['rows']} × {report['columns']}",
            f"{state['energy']:.1f}",
            f"{state['energy_per_pair']:.5f}",
            f"{state['spectral_norm']:.3f}",
            f"{state['effective_rank']:.0f}",
            str(state["principal_rank"]),
        )
    return table


def _changes(reports: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        "matrix",
        "ΔHE",
        "relative",
        "‖ΔW‖/‖W‖",
        "σ max of ΔW",
        "of W after",
        "its rank",
        "principal share",
        "collateral",
    )
    table = make_table("What became of them", *columns, left=("matrix",))
    for report in reports:
        change, before = report["change"], report["before"]
        collateral = change["collateral_ratio"]
        table.add_row(
            short_name(report["name"]),
            f"{change['energy_change']:+.3f}",
            relative(before["energy"], change["after"]["energy"]),
            f"{change['relative_norm']:.4f}",
            f"{change['update_spectral_norm']:.3f}",
            f"{change['after']['spectral_norm']:.3f}",
            f"{change['update_effective_rank']:.0f}",
            f"{100 * change['principal_share']:.1f} %",
            "–" if collateral is None else f"{collateral:.2e}",
        )
    return table


def _theory(reports: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        "matrix",
        "ΔHE",
        "first order",
        "at most (Th. 2)",
        "‖ΔW‖ at least (Th. 1)",
        "is",
        "response at least",
        "is",
    )
    table = make_table("First-order theory", *columns, left=("matrix",))
    table.caption, table.caption_justify = NOTE, "left"
    for report in reports:
        change = report["change"]
        bounds = change["bounds"]
        size = bounds["largest_change"] / bounds["gradient_norm"] if bounds["gradient_norm"] else 0.0
        responses = [bounds["least_response"], bounds["response"]]
        table.add_row(
            short_name(report["name"]),
            f"{change['energy_change']:+.3f}",
            f"{bounds['first_order']:+.3f}",
            f"{bounds['largest_change']:.3f}",
            f"{bounds['least_forgetting']:.4f}",
            f"{size:.4f}",
            *("–" if value is None else f"{value:.4f}" for value in responses),
        )
    return table
