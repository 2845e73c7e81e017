"""Figures of accuracy against what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from layerprune.training.report_canvas import INK, MUTED
from study.grid import FLOPS, REFERENCE
from study.looks import LOOKS, panels
from study.statistics import Group, Runs, groups, mean, ratio, select, spread
from study.targets import RIVALS

FRONT = {"color": INK, "lw": 1.1, "ls": (0, (3, 2)), "zorder": 1}


Cost = Callable[[Runs, Runs], "float | None"]
"""Of a method's runs, given the dense ones too; None where it cannot be told."""


@dataclass(frozen=True)
class Point:
    """A method among others.

    Attributes:
        group: its runs.
        cost: what they took.
        accuracy: their mean accuracy.
    """

    group: Group
    cost: float
    accuracy: float


def pareto(points: Iterable[Point]) -> list[Point]:
    """Those that no other one matches in cost and accuracy and beats in one, by cost."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front


def accuracy_against(
    label: str, cost: Callable[[Runs, Runs], float | None], result: dict
) -> Figure | None:
    """Accuracy of all methods against what they cost, a panel per task, the Pareto front marked.

    Args:
        label: the cost in words.
        cost: what to set it against.
        result: the study's.
    """
    found = {task: _points(result["rows"], task, cost) for task in result["tasks"]}
    found = {task: points for task, points in found.items() if points}
    if not found:
        return None
    figure, axes = panels(len(found))
    for panel, (task, points) in zip(axes, found.items(), strict=True):
        _front(panel, points)
        for point in points:
            _mark(panel, point)
        _dress(panel, task, label)
    _legend(figure, [point.group for points in found.values() for point in points])
    return figure


def overview(result: dict) -> Figure | None:
    """The first figure to look at: the tasks that a rival was trained on too."""
    rows = result["rows"]
    tasks = {
        task: told
        for task, told in result["tasks"].items()
        if any(select(rows, task, rival) for rival in RIVALS)
    }
    label = "training FLOPs, of the dense run's"
    return accuracy_against(label, share("train_flops"), result | {"tasks": tasks})


def _points(rows: Sequence[dict], task: str, cost: Cost) -> list[Point]:
    dense = select(rows, task, "dense")
    found = [(group, cost(group.runs, dense)) for group in groups(rows, task)]
    return [Point(g, c, mean(g.runs, "accuracy")) for g, c in found if c is not None]


def share(key: str) -> Cost:
    """A cost that a row has as a share of the dense run's."""
    return lambda runs, dense: mean(runs, key)


def time(key: str) -> Cost:
    """A time, as a share of the dense run's with the same seed."""
    return lambda runs, dense: ratio(runs, dense, key)


def _front(axes: Axes, points: list[Point]) -> None:
    """A staircase over what methods reach for a cost, to the panel's dearest."""
    front = pareto(points)
    x = [*(p.cost for p in front), max(p.cost for p in points)]
    y = [*(p.accuracy for p in front), front[-1].accuracy]
    axes.plot(x, y, drawstyle="steps-post", **FRONT)


def _mark(axes: Axes, point: Point) -> None:
    """A marker with the standard deviation over seeds, hollow where operations are made equal."""
    colour, marker = LOOKS[point.group.method]
    ours = point.group.method == REFERENCE
    axes.errorbar(
        point.cost,
        point.accuracy,
        yerr=spread(point.group.runs, "accuracy"),
        fmt=marker,
        color=colour,
        mfc="white" if point.group.budget == FLOPS else colour,
        ms=13 if ours else 6,
        elinewidth=1.6 if ours else 0.7,
        zorder=4 if ours else 3,
    )


def _dress(axes: Axes, task: str, label: str) -> None:
    axes.set_title(task, fontsize=9, loc="left")
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.set_ylabel("test accuracy")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.4g}%")


def _legend(figure: Figure, found: Iterable[Group]) -> None:
    found = list(found)
    there = {group.method for group in found}
    handles = [
        Line2D([], [], color=colour, marker=marker, ls="", ms=10 if name == REFERENCE else 6)
        for name, (colour, marker) in LOOKS.items()
        if name in there
    ]
    labels = [name for name in LOOKS if name in there]
    if any(group.budget == FLOPS for group in found):
        handles.append(Line2D([], [], color=MUTED, marker="o", mfc="white", ls="", ms=6))
        labels.append("hollow: at equal operations")
    handles.append(Line2D([], [], **FRONT))
    labels.append("Pareto front")
    columns = 4 if len(figure.axes) < 3 else 7
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
