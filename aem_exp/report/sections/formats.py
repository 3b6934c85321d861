"""Formats of numbers and tables in a report."""

import math
from collections.abc import Sequence
from typing import Any

from aem_exp.report.analysis import mean
from aem_exp.report.render import Table


def format_points(value: float, sign: bool = False) -> str:
    """Format a share (0 to 1) in points (0 to 100)."""
    return "-" if math.isnan(value) else f"{100 * value:{'+' if sign else ''}.1f}"


def format_interval(interval: Any, sign: bool = True) -> str:
    return (
        f"[{format_points(interval.low, sign)}, {format_points(interval.high, sign)}]" if interval is not None else "-"
    )


def drop_empty_column(table: Table) -> Table:
    """The table without its first column, if that column is empty."""
    if any(row[0] for row in table.rows):
        return table
    return Table(table.title, table.columns[1:], [row[1:] for row in table.rows], table.note)


def format_mean(values: Sequence[float], digits: int = 0) -> str:
    return f"{mean(values):,.{digits}f}" if values else "-"
