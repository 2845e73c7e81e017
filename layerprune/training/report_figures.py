"""The figures of a run's report: theta, removals with their evidence, accuracy and FLOPs."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

from layerprune.training.records import Fate, RunRecord, fates
from layerprune.training.report_canvas import (
    BAND,
    BLUE,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    RED,
    STYLE,
    Clock,
    shade_phases,
    subplots,
    to_svg,
)

FATES = {
    "kept by test": BLUE,
    "kept by rounding": "#8fb4de",
    "undecided": "#9aa5b1",
    "removed by test": RED,
    "removed by rounding": ORANGE,
    "removed by attraction": "#8a6bb0",
}
# Below 50 colours Matplotlib draws the colour bar as shapes, above as a bitmap.
_DEPTH = LinearSegmentedColormap.from_list(
    "depth", ["#3d6fd1", "#1fa187", "#dba21f", "#d1495b"], N=48
)
_POINTS = 24_000  # points of all theta curves together: some 400 kB of SVG


def theta_over_time(record: RunRecord) -> str:
    """Theta of every section against time, coloured by depth, eliminations marked by a cross."""
    with matplotlib.rc_context(STYLE):
        figure, axes = subplots(1, 1, 5.6, 4.3)
        clock = Clock.of(record)
        shade_phases(axes, record, clock)
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
        bar.solids.set_edgecolor("face")  # no seams
        bar.set_ticks([0, max(count - 1, 1)], labels=["first", "last"])
        bar.ax.tick_params(length=0)
        bar.ax.invert_yaxis()
        bar.set_label("section, by depth", labelpad=-18)
        return to_svg(figure, "theta")


def removal_timeline(record: RunRecord) -> str:
    """A bar per section for as long as it ran, and beside it the evidence that decided on it."""
    with matplotlib.rc_context(STYLE):
        everyone = fates(record)
        count = len(everyone)
        pitch = float(np.clip(900 / count, 5.5, 17)) / 72  # inches a section
        figure, (axes, proof) = subplots(
            1, 2, 10.6, 1.25 + pitch * count, sharey=True, width_ratios=[1.55, 1]
        )
        clock = Clock.of(record)
        shade_phases(axes, record, clock)
        place = {fate.section: row for row, fate in enumerate(everyone)}
        ends = [clock(clock.last if fate.step is None else fate.step) for fate in everyone]
        colours = [FATES[fate.kind] for fate in everyone]
        axes.barh(range(count), ends, height=0.62, color=colours)
        for event in record.events:
            if event.get("decision") in ("kept", "reopened") and event.get("section") in place:
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
        return to_svg(figure, "removal")


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
    with matplotlib.rc_context(STYLE):
        figure, panels = subplots(2, 1, 5.6, 4.4, sharex=True)
        clock = Clock.of(record)
        for axes, quantity in zip(panels, ("accuracy", "loss"), strict=True):
            shade_phases(axes, record, clock, named=quantity == "accuracy")
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
        _accuracy_scale(panels[0], record)
        panels[0].legend(loc="lower right")
        _loss_scale(panels[1])
        clock.dress(panels[1])
        return to_svg(figure, "accuracy")


def _accuracy_scale(axes: Axes, record: RunRecord) -> None:
    """Percent up to 100, without the steep first fifth, beside which differences would vanish."""
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.4g}%")
    known = [row["test_accuracy"] for row in record.epochs if row["test_accuracy"] is not None]
    low, high = axes.get_ylim()
    if len(known) >= 5:
        floor = float(np.quantile(known, 0.2))
        low = floor - 0.25 * (max(known) - floor)
    middle = (low + high) / 2
    axes.set_ylim(min(low, middle - 0.01), min(max(high, middle + 0.01), 1.003))


def _loss_scale(axes: Axes) -> None:
    """Logarithmic where the losses spread over more than a factor of five."""
    losses = [y for line in axes.get_lines() if len(line.get_ydata()) for y in line.get_ydata()]
    losses = [y for y in losses if y > 0]
    if losses and max(losses) > 5 * min(losses):
        axes.set_yscale("log")
        subs = (1, 2, 5) if max(losses) < 100 * min(losses) else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def training_flops(record: RunRecord) -> str:
    """FLOPs spent so far against those that dense training would have spent, in units of all."""
    with matplotlib.rc_context(STYLE):
        figure, axes = subplots(1, 1, 5.6, 4.3)
        clock = Clock.of(record)
        shade_phases(axes, record, clock)
        steps = np.array([0, *(row["step"] for row in record.epochs)])
        shares = np.array([0, *(row["train_flops_fraction"] for row in record.epochs)])
        spent = shares * steps / clock.end
        dense = steps / clock.end
        axes.plot([0, clock(clock.end)], [0, 1], color=MUTED, ls=(0, (4, 2)), label="dense")
        axes.fill_between(clock(steps), spent, dense, color=BLUE, alpha=0.13, lw=0, label="saved")
        axes.plot(clock(steps), spent, color=BLUE, lw=2, label="this run")
        clock.dress(axes)
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_ylabel("training FLOPs, of a dense run's")
        axes.legend(loc="upper left", bbox_to_anchor=(0.0, 0.93))
        return to_svg(figure, "flops")


def _curve(axes: Axes, record: RunRecord, column: str, colour: str, label: str, **how: Any) -> None:
    """A column of the epochs' table on the record's own clock; a single epoch is a dot."""
    clock = Clock.of(record)
    points = [(clock(r["step"]), r[column]) for r in record.epochs if r[column] is not None]
    if points:
        marker = "o" if len(points) == 1 else None
        how |= {"color": colour, "label": label, "marker": marker, "clip_on": not marker}
        axes.plot(*zip(*points, strict=True), **how)
