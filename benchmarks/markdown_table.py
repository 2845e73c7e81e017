"""Rows of results as a table in markdown."""

from __future__ import annotations

from collections.abc import Callable

Column = Callable[[dict], str]


def table(columns: dict[str, Column], rows: list[dict]) -> str:
    """A column that has nothing to say of a row stays empty there."""
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(make(row) for make in columns.values()) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def of(key: str, form: str) -> Column:
    """A column that is an entry of the row."""
    return lambda row: form.format(row[key]) if row.get(key) is not None else ""


def figures(found: list[dict]) -> str:
    """Figures against their targets; where one of them has a reading, it says more."""
    columns = {
        "figure": of("name", "{}"),
        "target": of("target", "{}"),
        "measured": of("measured", "{:.3f}"),
        "met": lambda figure: "yes" if figure["met"] else "**no**",
    }
    if any("reading" in figure for figure in found):
        columns["measured"] = lambda figure: f"{round(figure['measured'], 3):g}"
        columns["of"] = of("reading", "{}")
    return table(columns, found)
