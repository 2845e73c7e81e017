"""The figures of a run's report, drawn by Matplotlib as SVG text for an HTML page.

The page's style sheet owns the neutral colours (ink, grid, paper), so that one drawing serves a
light and a dark page; the colours with a meaning are chosen to be legible on both.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogFormatter, MaxNLocator, PercentFormatter

from layerprune.training.records import RunRecord

# Stand-ins that `_svg` replaces by the page's own colours.
INK, MUTED, GRID, BAND, PAPER = "#1b2733", "#66727f", "#dde3e8", "#f1f4f7", "#fdfefe"
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", BAND: "band", PAPER: "paper"}
BLUE, ORANGE, RED = "#3f74b5", "#d98a2b", "#c8504b"
FATES = {
    "kept by test": BLUE,
    "kept by rounding": "#8fb4de",
    "undecided": "#9aa5b1",
    "removed by test": RED,
    "removed by rounding": ORANGE,
    "removed by attraction": "#8a6bb0",
}
_DEPTH = LinearSegmentedColormap.from_list("depth", ["#3d6fd1", "#1fa187", "#dba21f", "#d1495b"])
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "layerprune",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
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
_POINTS = 24_000  # points of all theta curves together: some 400 kB of SVG


@dataclass(frozen=True)
class Fate:
    """What became of a section.

    Attributes:
        section: its name.
        kind: a key of `FATES`.
        event: the decision that settled it, None while undecided.
        step: the step it was removed at, None if it was not.
    """

    section: str
    kind: str
    event: dict[str, Any] | None
    step: int | None


def fates(record: RunRecord) -> list[Fate]:
    """What became of each section of a run, in the order of the sections."""
    result = []
    for section in record.sections:
        mine = [event for event in record.events if event.get("section") == section]
        gone = [e for e in mine if e.get("decision") in ("eliminated", "rounded-off")]
        if gone:
            by = gone[0].get("by")
            kind = f"removed by {by if by in ('rounding', 'attraction') else 'test'}"
            result.append(Fate(section, kind, gone[0], gone[0]["step"]))
        elif mine:
            rounded = mine[-1].get("decision") == "rounded-on"
            kind = "kept by rounding" if rounded else "kept by test"
            result.append(Fate(section, kind, mine[-1], None))
        else:
            result.append(Fate(section, "undecided", None, None))
    return result


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


def theta_over_time(record: RunRecord) -> str:
    """Theta of every section against time, coloured by depth, eliminations marked by a cross."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _subplots(1, 1, 5.6, 4.3)
        clock = Clock.of(record)
        _shade_phases(axes, record, clock)
        count = len(record.sections)
        norm = Normalize(0, max(count - 1, 1))
        stride = max(1, len(record.theta_steps) // max(60, _POINTS // count))
        for index, fate in enumerate(fates(record)):
            steps, theta = record.theta_steps, record.theta[:, index]
            alive = steps <= fate.step if fate.step is not None else np.full(len(steps), True)
            x = list(clock(steps[alive])[::stride])
            y = list(theta[alive][::stride])
            colour = _DEPTH(norm(index))
            thick = 1.3 if count <= 30 else 0.7
            if fate.step is not None:
                x.append(clock(fate.step))
                y.append(0.0)
                cross = {"ms": 5, "mew": 1.4} if count <= 30 else {"ms": 3, "mew": 0.7}
                axes.plot(x[-1], 0, "x", color=colour, clip_on=False, zorder=4, **cross)
            elif len(steps):
                x.append(clock(steps[-1]))
                y.append(theta[-1])
            axes.plot(x, y, color=colour, lw=thick if fate.step is not None else 1.6 * thick)
        clock.dress(axes)
        axes.set_ylim(-0.02, 1.03)
        axes.set_ylabel("theta (probability that the section runs)")
        bar = figure.colorbar(ScalarMappable(norm, _DEPTH), ax=axes, pad=0.02, aspect=30)
        bar.outline.set_visible(False)
        bar.set_ticks([0, max(count - 1, 1)], labels=["first", "last"])
        bar.ax.tick_params(length=0)
        bar.ax.invert_yaxis()
        bar.set_label("section, by depth", labelpad=-18)
        return _svg(figure, "theta")


def removal_timeline(record: RunRecord) -> str:
    """A bar per section for as long as it ran, and beside it the evidence that decided on it."""
    with matplotlib.rc_context(_STYLE):
        everyone = fates(record)
        count = len(everyone)
        pitch = float(np.clip(900 / count, 5.5, 17)) / 72  # inches a section
        figure, (axes, proof) = _subplots(
            1, 2, 10.6, 1.25 + pitch * count, sharey=True, width_ratios=[1.55, 1]
        )
        clock = Clock.of(record)
        _shade_phases(axes, record, clock)
        place = {fate.section: row for row, fate in enumerate(everyone)}
        ends = [clock(clock.last if fate.step is None else fate.step) for fate in everyone]
        colours = [FATES[fate.kind] for fate in everyone]
        axes.barh(range(count), ends, height=0.62, color=colours)
        for event in record.events:
            if event.get("decision") == "kept" and event.get("section") in place:
                row = place[event["section"]]
                axes.plot(clock(event["step"]), row, "|", color=PAPER, ms=pitch * 38, mew=1.4)
        clock.dress(axes)
        every = int(np.ceil(9.5 / (pitch * 72)))
        rows = range(0, count, every)
        axes.set_yticks(rows, [everyone[row].section for row in rows])
        axes.set_ylim(count - 0.4, -0.6)
        for each in (axes, proof):
            each.tick_params(axis="y", length=0)
            each.grid(axis="y", visible=False)
        _evidence(proof, everyone, every)
        present = [kind for kind in FATES if any(fate.kind == kind for fate in everyone)]
        handles: list[Any] = [Patch(color=FATES[kind], label=kind) for kind in present]
        figure.legend(handles=handles, loc="outside upper left", ncols=6, handlelength=1.1)
        return _svg(figure, "removal")


def _evidence(axes: Axes, everyone: list[Fate], every: int) -> None:
    """Difference +- standard error of each decision in units of its penalty: -1 is the border."""
    low, high = -10.0, 10.0
    for row, fate in enumerate(everyone):
        event = fate.event or {}
        difference, penalty = event.get("difference"), event.get("penalty")
        if difference is None or not penalty:
            continue
        value, error = difference / penalty, (event.get("standard_error") or 0.0) / penalty
        low, high = min(low, value - error), max(high, value + error)
        axes.errorbar(value, row, xerr=error, fmt="o", color=FATES[fate.kind], ms=3.6, lw=1.3)
        if row % every == 0 and event.get("batches") is not None:
            at = {"xy": (1.02, row), "xycoords": axes.get_yaxis_transform(), "va": "center"}
            axes.annotate(f"{event['batches']}", fontsize=7.5, color=MUTED, **at)
    left, right = (int(np.ceil(np.log10(end))) for end in (-low, high))
    axes.set_xscale("symlog", linthresh=1, linscale=0.6)
    axes.set_xlim(-(10.0**left), 10.0**right)
    axes.set_xticks([*-(10.0 ** np.arange(left, -1, -1)), 0, *10.0 ** np.arange(right + 1)])
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}".replace("-", "\N{MINUS SIGN}"))
    axes.axvspan(-1, 10.0**right, color=BAND, lw=0, zorder=0)
    axes.axvline(-1, color=INK, lw=0.9, ls=(0, (4, 2)))
    for x, side, words in ((0.01, "left", "worth its cost"), (0.99, "right", "removal pays"),
                           (1.01, "left", "batches")):  # fmt: skip
        how = {"xycoords": "axes fraction", "ha": side, "fontsize": 7.5, "color": MUTED}
        axes.annotate(words, (x, 1.01), **how)
    axes.set_xlabel("loss with the section minus loss without it, over its penalty")


def accuracy_and_loss(record: RunRecord, baseline: RunRecord | None) -> str:
    """Accuracy and loss of training and test set per epoch, the dense baseline's test beside."""
    with matplotlib.rc_context(_STYLE):
        figure, panels = _subplots(2, 1, 5.6, 4.4, sharex=True)
        clock = Clock.of(record)
        for axes, quantity in zip(panels, ("accuracy", "loss"), strict=True):
            _shade_phases(axes, record, clock, named=quantity == "accuracy")
            if baseline is not None:
                _curve(axes, baseline, f"test_{quantity}", MUTED, "test, dense", ls=(0, (4, 2)))
            _curve(axes, record, f"train_{quantity}", ORANGE, "train", lw=1.1)
            _curve(axes, record, f"test_{quantity}", BLUE, "test", lw=1.8)
            removals = [clock(f.step) for f in fates(record) if f.step is not None]
            if removals:
                edge = axes.get_xaxis_transform()
                thin = {"ms": 9, "mew": 1.2 if len(removals) <= 30 else 0.5}
                axes.plot(removals, [0.0] * len(removals), "|", color=RED, transform=edge,
                          clip_on=False, label="section removed", **thin)  # fmt: skip
            axes.set_ylabel(quantity)
        panels[0].yaxis.set_major_formatter(PercentFormatter(1))
        known = [r["test_accuracy"] for r in record.epochs if r["test_accuracy"] is not None]
        if len(known) >= 5:  # the steep first fifth would leave no room for the differences
            floor = float(np.quantile(known, 0.2))
            panels[0].set_ylim(bottom=floor - 0.25 * (max(known) - floor) - 1e-3)
        panels[0].set_ylim(top=min(panels[0].get_ylim()[1], 1.003))
        panels[0].legend(loc="lower right")
        if any((row["test_loss"] or 0) > 0 for row in record.epochs):
            panels[1].set_yscale("log")
            panels[1].yaxis.set_major_formatter(LogFormatter())
            panels[1].yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.2, 0.5)))
        clock.dress(panels[1])
        return _svg(figure, "accuracy")


def training_flops(record: RunRecord) -> str:
    """FLOPs spent so far against those that dense training would have spent, in units of all."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _subplots(1, 1, 5.6, 4.3)
        clock = Clock.of(record)
        _shade_phases(axes, record, clock)
        rows = [row for row in record.epochs if row["train_flops_fraction"] is not None]
        steps = np.array([0, *(row["step"] for row in rows)])
        spent = steps / clock.end * np.array([0, *(row["train_flops_fraction"] for row in rows)])
        dense = steps / clock.end
        axes.plot([0, clock(clock.end)], [0, 1], color=MUTED, ls=(0, (4, 2)), label="dense")
        axes.fill_between(clock(steps), spent, dense, color=BLUE, alpha=0.13, lw=0, label="saved")
        axes.plot(clock(steps), spent, color=BLUE, lw=2, label="this run")
        clock.dress(axes)
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_ylabel("training FLOPs, of a dense run's")
        axes.legend(loc="upper left", bbox_to_anchor=(0.0, 0.93))
        return _svg(figure, "flops")


def _curve(axes: Axes, record: RunRecord, column: str, colour: str, label: str, **how: Any) -> None:
    """A column of the epochs' table on the record's own clock; a single epoch is a dot."""
    clock = Clock.of(record)
    points = [(clock(r["step"]), r[column]) for r in record.epochs if r[column] is not None]
    if points:
        marker = "o" if len(points) == 1 else None
        how |= {"color": colour, "label": label, "marker": marker, "ms": 4}
        axes.plot(*zip(*points, strict=True), **how)


def _shade_phases(axes: Axes, record: RunRecord, clock: Clock, named: bool = True) -> None:
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


def _subplots(rows: int, columns: int, width: float, height: float, **how: Any) -> tuple[Any, Any]:
    """A figure outside pyplot's global state, and its axes; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **how)


def _svg(figure: Figure, prefix: str) -> str:
    """The figure as SVG to put into HTML: no XML head, no metadata, ids of its own."""
    buffer = io.StringIO()
    empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=empty)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style type=\"text/css\">.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'<svg ([^>]*?)(?:width|height)="[^"]*pt"', r"<svg \1", text)
    text = re.sub(r'<svg ([^>]*?)(?:width|height)="[^"]*pt"', r"<svg \1", text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    for colour, name in _VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    return text.replace("<svg ", '<svg aria-hidden="true" ', 1)
