"""What the figures of a study share: a look for each method, and panels."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from layerprune.training.report_canvas import INK, subplots
from study.grid import REFERENCE

OURS = "#0072b2"
# Okabe and Ito's colours; a marker of its own tells each method without them.
LOOKS = {
    "dense": (INK, "s"),
    REFERENCE: (OURS, "*"),
    "taylor": ("#d55e00", "v"),
    "simultaneous": ("#009e73", "^"),
    "stochastic-depth": ("#e69f00", "o"),
    "stochastic-depth-dense": ("#e69f00", "h"),
    "l0": ("#cc79a7", "D"),
    "random": ("#8c8c8c", "X"),
    "grasp": ("#8c8c8c", "P"),
    "scratch": ("#56b4e9", "p"),
    "retrained": ("#56b4e9", "d"),
}
WIDTH, HEIGHT = 3.3, 2.9  # of a panel, in inches


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """So many panels, three in a row; the last row is filled up by nothing."""
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    figure, axes = subplots(
        rows, columns, WIDTH * max(columns, 2), 0.6 + HEIGHT * rows, squeeze=False
    )
    every = list(axes.flat)
    for unused in every[count:]:
        unused.set_axis_off()
    return figure, every[:count]
