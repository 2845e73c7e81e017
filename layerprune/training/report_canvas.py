"""What the figures of a run's report share: style, time axis, and SVG text for an HTML page.

The page's style sheet owns the neutral colours (ink, grid, paper), so that one drawing serves a
light and a dark page; the colours with a meaning are chosen to be legible on both.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from layerprune.training.records import RunRecord

# Stand-ins that `to_svg` replaces by the page's own colours.
INK, MUTED, GRID, BAND, PAPER = "#1b2733", "#66727f", "#dde3e8", "#f1f4f7", "#fdfefe"
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", BAND: "band", PAPER: "paper"}
BLUE, ORANGE, RED = "#3f74b5", "#d98a2b", "#c8504b"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "layerprune",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.parse_math": False,  # a $ in a name is a $
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
}


@dataclass(frozen=True)
class Clock:
    """The time axis: epochs once one is over, else steps.

    Attributes:
        per_epoch: steps an epoch, None before the first is over.
        end: the last step of the axis.
        last: the last step recorded.
    """

    per_epoch: float | None
    end: int
    last: int

    @classmethod
    def of(cls, record: RunRecord) -> Clock:
        """The clock of a run, which ends where the run will end if that is known."""
        rows = record.epochs
        per_epoch = None
        if len(rows) > 1:
            per_epoch = (rows[-1]["step"] - rows[0]["step"]) / (len(rows) - 1)
        elif rows:
            per_epoch = rows[0]["step"] / max(rows[0]["epoch"], 1)
        last = max([1, *(row["step"] for row in rows), *record.theta_steps[-1:].tolist()])
        total = (record.summary.get("phases") or {}).get("total_steps")
        return cls(per_epoch or None, max(total or 0, last), last)

    def __call__(self, step: Any) -> Any:
        """The place of a step (or an array of them) on the axis."""
        return step / self.per_epoch if self.per_epoch else step

    def dress(self, axes: Axes) -> None:
        """Sets limits, ticks and label of the time axis."""
        axes.set_xlim(0, self(self.end))
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True))
        axes.set_xlabel("epoch" if self.per_epoch else "step")


def shade_phases(axes: Axes, record: RunRecord, clock: Clock, named: bool = True) -> None:
    """Shades warm-up and learning behind a plot over time and names the phases."""
    phases = record.summary.get("phases") or {}
    warm, learned = phases.get("warm_up_end"), phases.get("learning_end")
    if warm is None or learned is None:
        return
    spans = (("warm-up", 0, warm), ("learning", warm, learned), ("cool-down", learned, clock.end))
    for name, begin, end in spans:
        if name == "learning":
            axes.axvspan(clock(begin), clock(end), color=BAND, lw=0, zorder=0)
        # A name that would run into its neighbour's is left out.
        if named and end - begin > 0.12 * clock.end:
            middle = (clock((begin + end) / 2), 1.01)
            edge = axes.get_xaxis_transform()
            axes.annotate(name, middle, xycoords=edge, ha="center", fontsize=7.5, color=MUTED)


def subplots(rows: int, columns: int, width: float, height: float, **how: Any) -> tuple[Any, Any]:
    """A figure outside pyplot's global state, and its axes; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **how)


def to_svg(figure: Figure, prefix: str) -> str:
    """The figure as SVG to put into HTML: no XML head, no metadata, ids of its own."""
    buffer = io.StringIO()
    empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=empty)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style type=\"text/css\">.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text)  # the page decides
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    for colour, name in _VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    return text.replace("<svg ", '<svg aria-hidden="true" ', 1)
