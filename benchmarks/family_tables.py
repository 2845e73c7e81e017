"""Tables of the models whose sections were found and verified, for README.md and docs/models.md."""

from __future__ import annotations

import re

from markdown_table import of, table

BRANCH = "a block's branch, beside its shortcut"
SECTION_IS = {
    ("twin",): BRANCH,
    ("branch", "opaque"): f"a whole block, or {BRANCH}",
    ("opaque",): "a whole block",
    ("branch",): "attention, MLP and the like, each by itself",
}
"""By the kinds that a model has."""


def summary(result: dict) -> str:
    """A line for the models of a library that are gated alike."""
    alike: dict[tuple, list[dict]] = {}
    for row in result["rows"]:
        alike.setdefault((row["library"], kinds(row)), []).append(row)
    columns = {
        "models": lambda rows: ", ".join(row["label"] for row in rows),
        "of": lambda rows: rows[0]["library"],
        "a section is": lambda rows: SECTION_IS[kinds(rows[0])],
        "kind": lambda rows: ", ".join(f"`{kind}`" for kind in kinds(rows[0])),
        "removed against gated": lambda rows: verified(
            max(row["difference"] for row in rows), sum(row["structures"] for row in rows)
        ),
    }
    return table(columns, list(alike.values()))


def every(result: dict) -> str:
    """A line for each model."""
    columns = {
        "model": lambda row: f"{row['label']} (`{row['class']}`)",
        "of": of("library", "{}"),
        "sections": lambda row: f"{len(row['sections'])}: " + ", ".join(patterns(row["sections"])),
        "kind": lambda row: ", ".join(f"`{kind}`" for kind in kinds(row)),
        "left out": lambda row: ", ".join(patterns({"name": name} for name in row["left_out"])),
        "removed against gated": lambda row: verified(row["difference"], row["structures"]),
    }
    return table(columns, result["rows"])


def kinds(row: dict) -> tuple[str, ...]:
    return tuple(dict.fromkeys(section["kind"] for section in row["sections"]))


def patterns(sections) -> list[str]:
    """Names with `#` for numbers, each once."""
    return list(dict.fromkeys(f"`{re.sub(r'[0-9]+', '#', each['name'])}`" for each in sections))


def verified(difference: float, structures: int) -> str:
    if difference == 0:
        return f"bit-equal, {structures} structures"
    return f"**{difference:.1e}**, {structures} structures"
