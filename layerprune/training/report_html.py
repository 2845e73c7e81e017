"""Pieces of the report's page: cards, tables and numbers as HTML text.

Titles, notes and cells are HTML already: whoever passes a name from a run escapes it first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
_OPEN_ROWS = 24  # a longer table is folded


def tile(label: str, value: str, detail: str, share: float | None = None) -> str:
    """A headline figure; `share` in [0, 1] draws a meter below it."""
    meter = ""
    if share is not None:
        width = 100 * min(max(share, 0), 1)
        meter = f'<div class="meter"><span style="width:{width:.1f}%"></span></div>'
    return (
        f'<div class="tile"><span class="label">{label}</span><span class="value">{value}</span>'
        f'<span class="detail">{detail}</span>{meter}</div>'
    )


def card(title: str, body: str, note: str = "", wide: bool = False) -> str:
    """A framed part of the page; a wide one takes both columns."""
    words = f'<p class="note">{note}</p>' if note else ""
    return f'<section class="card{" wide" * wide}"><h2>{title}</h2>{words}{body}</section>'


def figure(title: str, note: str, svg: str, described: str, wide: bool = False) -> str:
    """A card with a drawing, which `described` (plain text) tells to those who cannot see it."""
    body = f'<figure role="img" aria-label="{escape(described)}">{svg}</figure>'
    return card(title, body, note, wide)


def table(
    words: list[str], numbers: list[str], rows: list[tuple[bool, list[str], list[str]]]
) -> str:
    """A table with columns of text, then of right-aligned numbers; a long one is folded.

    Args:
        words: heads of the columns of text.
        numbers: heads of the columns of numbers.
        rows: for each row whether it is in full ink, and its cells under both kinds of heads.
    """
    head = "".join(f'<th scope="col">{name}</th>' for name in words)
    head += "".join(f'<th scope="col" class="n">{name}</th>' for name in numbers)
    lines = [
        ("<tr>" if strong else '<tr class="gone">')
        + "".join(f"<td>{cell}</td>" for cell in left)
        + "".join(f'<td class="n">{cell}</td>' for cell in right)
        + "</tr>"
        for strong, left, right in rows
    ]
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    whole = f'<div class="scroll"><table>{body}</table></div>'
    if len(rows) <= _OPEN_ROWS:
        return whole
    return f"<details><summary>Show all {len(rows)} rows</summary>{whole}</details>"


def pairs(values: Mapping[str, Any]) -> str:
    """A table of names and values, which are escaped here."""
    lines = []
    for key, value in values.items():
        if isinstance(value, float):
            text = f"{value:.6g}"
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
        lines.append(f'<tr><th scope="row">{escape(str(key))}</th><td>{escape(text)}</td></tr>')
    return f'<table class="pairs"><tbody>{"".join(lines)}</tbody></table>'


def joined(separator: str, *parts: Any) -> str:
    """The parts that are neither None nor empty, with the separator between them."""
    return separator.join(str(part) for part in parts if part not in (None, ""))


def percent(value: float, digits: int = 0) -> str:
    """A fraction as a percentage."""
    return f"{100 * value:.{digits}f}%"


def number(value: float | None) -> str:
    """A number with three significant digits, a dash where it is not known."""
    if value is None:
        return DASH
    return (str(value) if isinstance(value, int) else f"{value:.3g}").replace("-", MINUS)


def amount(value: float | None) -> str:
    """A count with a decimal prefix and three digits: 464 k, 0.27 M."""
    if value is None:
        return DASH
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 100 else f"{seconds / 3600:.1f} h"
