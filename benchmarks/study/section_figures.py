"""Figures of how many sections there are, over training and under other settings."""

from __future__ import annotations

from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from layerprune.training.report_canvas import GRID, INK, subplots
from study.grid import REFERENCE
from study.looks import LOOKS, OURS, panels
from study.statistics import Runs, select
from study.tables import PRUNING


def sections_left(result: dict) -> Figure | None:
    """Sections left over training, a line per seed; lines of several seeds are set off a little."""
    found = {
        task: {m: runs for m in PRUNING if (runs := select(result["rows"], task, m))}
        for task in result["tasks"]
    }
    found = {task: methods for task, methods in found.items() if methods}
    if not found:
        return None
    figure, axes = panels(len(found))
    for panel, (task, methods) in zip(axes, found.items(), strict=True):
        for number, (method, runs) in enumerate(methods.items()):
            for place, row in enumerate(runs.values()):
                times = [time for time, *_ in row["eliminations"]]
                left = [row["sections"] - gone for gone in range(len(times) + 1)]
                off = 0.12 * (number - 1) + 0.03 * place
                panel.step(
                    [0, *times, 1],
                    [count + off for count in (*left, left[-1])],
                    where="post",
                    color=LOOKS[method][0],
                    lw=1.3 if method == REFERENCE else 0.8,
                    zorder=3 if method == REFERENCE else 2,
                )
        panel.set_title(task, fontsize=9, loc="left")
        panel.set_xlim(0, 1)
        panel.set_ylim(bottom=0)
        panel.set_xlabel("share of training")
        panel.set_ylabel("sections left")
        panel.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        panel.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    there = [m for m in PRUNING if any(m in methods for methods in found.values())]
    handles = [Line2D([], [], color=LOOKS[method][0]) for method in there]
    figure.legend(handles, there, loc="outside lower center", ncols=len(there))
    return figure


def sections_kept(result: dict) -> Figure | None:
    """Sections that `ours` keeps under other settings: every seed, their mean, and accuracy."""
    found = {
        task: {
            setting or "as the task is": runs
            for setting in ("", *changes)
            if (runs := select(result["rows"], task, REFERENCE, setting))
        }
        for task, changes in result["variations"].items()
    }
    found = {task: settings for task, settings in found.items() if settings}
    if not found:
        return None
    lengths = [len(settings) for settings in found.values()]
    figure, axes = subplots(
        len(found),
        2,
        7.2,
        0.9 * len(found) + 0.24 * sum(lengths),
        sharey="row",
        squeeze=False,
        height_ratios=lengths,
    )
    for (counted, scored), (task, settings) in zip(axes, found.items(), strict=True):
        _by_setting(counted, settings, "sections_kept")
        _by_setting(scored, settings, "accuracy")
        counted.set_title(task, fontsize=9, loc="left")
        counted.set_yticks(range(len(settings)), list(settings))
        counted.set_ylim(len(settings) - 0.4, -0.6)
        counted.set_xlim(left=0)
        counted.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        counted.set_xlabel("sections kept")
        scored.xaxis.set_major_locator(MaxNLocator(5))
        scored.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.4g}%")
        scored.set_xlabel("test accuracy")
    return figure


def _by_setting(axes: Axes, settings: dict[str, Runs], key: str) -> None:
    axes.tick_params(axis="y", length=0)
    for place, runs in enumerate(settings.values()):
        values = [row[key] for row in runs.values()]
        heights = [place + 0.11 * (i - (len(values) - 1) / 2) for i in range(len(values))]
        axes.plot(values, heights, "o", color=OURS, ms=3.6, mew=0, alpha=0.65)
        axes.plot(fmean(values), place, "|", color=INK, ms=12, mew=1.4)
    axes.axhspan(-0.5, 0.5, color=GRID, alpha=0.5, lw=0, zorder=0)
