"""The figures that a study is held to, and whether they are met."""

from __future__ import annotations

from collections.abc import Sequence

from figures import figure

from study import worth
from study.grid import EPOCHS, FLOPS, REFERENCE
from study.statistics import MARGIN, Comparison, Runs, mean, paired, ratio, select

RIVALS = ("stochastic-depth", "l0", "taylor", "simultaneous")
"""What the reference is to beat with the operations that it takes itself."""
SAME_DEPTH = "scratch"
DEEP = "resnet56"
"""How the name ends of the task whose savings are held to targets."""
DEPTHS = range(15, 55)
"""Sections to start with, over which as many are to be kept."""


def targets(result: dict) -> list[dict]:
    """All that can be told from the runs that are there."""
    rows, tasks = result["rows"], list(result["tasks"])
    found = []
    for task in tasks:
        for rival in RIVALS:
            found += _beats(task, rows, rival, FLOPS)
        for budget in (EPOCHS, FLOPS):
            found += _beats(task, rows, SAME_DEPTH, budget)
    for task in tasks:
        if task.endswith(DEEP):
            found += _savings(task, select(rows, task, REFERENCE), select(rows, task, "dense"))
    for task in tasks:
        found += _over_seeds(task, select(rows, task, REFERENCE))
        found += _over_depths(task, rows, result["variations"].get(task, {}))
    for task in tasks:
        found += _optimal(task, rows)
    return found


def points(found: Comparison) -> str:
    """A difference of accuracies in words."""
    if found.seeds == 1:
        return f"{100 * found.mean:+.2f}, one seed"
    ends = f"{100 * found.low:+.2f} to {100 * found.high:+.2f}"
    return f"{100 * found.mean:+.2f} ({ends}), {found.seeds} seeds"


def _beats(task: str, rows: Sequence[dict], rival: str, budget: str) -> list[dict]:
    ours, theirs = select(rows, task, REFERENCE), select(rows, task, rival, budget=budget)
    found = paired(ours, theirs)
    if found is None:
        return []
    given = "equal operations" if budget == FLOPS else "equal epochs"
    name = f"{task}: accuracy less that of `{rival}` at {given}, points, lower end"
    spent = f"its FLOPs {ratio(theirs, ours, 'train_flops'):.0%} of these"
    return [figure(name, 100 * found.low, ">", 0) | {"reading": f"{points(found)}; {spent}"}]


def _savings(task: str, ours: Runs, dense: Runs) -> list[dict]:
    found = paired(ours, dense)
    if found is None:
        return []
    name = f"{task}: accuracy less that of `dense`, points, lower end"
    return [
        figure(name, 100 * found.low, ">", -100 * MARGIN) | {"reading": points(found)},
        figure(
            f"{task}: training FLOPs of the dense run's, %",
            100 * mean(ours, "train_flops"),
            "<=",
            40,
        ),
        figure(
            f"{task}: training time of the dense run's, %",
            100 * ratio(ours, dense, "train_seconds"),
            "<=",
            50,
        ),
    ]


def _over_seeds(task: str, ours: Runs) -> list[dict]:
    if len(ours) < 2:
        return []
    counts = sorted(row["sections_kept"] for row in ours.values())
    name = f"{task}: sections kept, most less fewest of all seeds"
    reading = {"reading": ", ".join(map(str, counts))}
    return [figure(name, counts[-1] - counts[0], "<=", 2) | reading]


def _over_depths(task: str, rows: Sequence[dict], variations: dict) -> list[dict]:
    kept = {}
    varied = [name for name in variations if name.endswith(" sections")]
    seeds = [select(rows, task, REFERENCE, name).keys() for name in varied]
    for setting in ("", *varied):
        runs = select(rows, task, REFERENCE, setting)
        runs = {seed: row for seed, row in runs.items() if all(seed in some for some in seeds)}
        start = next((row["sections"] for row in runs.values()), 0)
        if start in DEPTHS:
            kept[start] = mean(runs, "sections_kept")
    if len(kept) < 2:
        return []
    name = f"{task}: sections kept, means over depths to start with, most less fewest"
    reading = ", ".join(f"{count:.1f} of {start}" for start, count in sorted(kept.items()))
    gap = max(kept.values()) - min(kept.values())
    return [figure(name, gap, "<=", 3) | {"reading": reading}]


def _optimal(task: str, rows: Sequence[dict]) -> list[dict]:
    found = []
    kept, back = worth.left(rows, task), worth.put_in(rows, task, kept=False)
    if kept:
        name = f"{task}: kept sections that do not pay, beyond two standard errors"
        fails = sum(section.surely_fails for section in kept)
        found.append(figure(name, fails, "<=", 0) | {"reading": f"{len(kept)} sections"})
    if back:
        name = f"{task}: eliminated sections that would pay, beyond two standard errors"
        pays = sum(section.surely_pays for section in back)
        found.append(figure(name, pays, "<=", 0) | {"reading": f"{len(back)} sections"})
    return found
