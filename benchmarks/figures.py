"""The figures that results are held to, and whether they are met."""

from __future__ import annotations

import operator
from collections.abc import Callable

RELATIONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
}


def figure(name: str, measured: float, relation: str, target: float) -> dict:
    """One of them, as it stands in a result."""
    return {
        "name": name,
        "target": f"{relation} {target:g}",
        "measured": measured,
        "met": RELATIONS[relation](measured, target),
    }


def median(row: dict, kind: str, part: str) -> float:
    """A row's time of a kind, in microseconds."""
    return row["times"][kind][part]["median_us"]


def times_compile(row: dict) -> float | None:
    """How many times as fast as torch.compile, in the mode that is faster, the whole is."""
    compiled = [kind for kind in ("compile", "max-autotune") if kind in row["times"]]
    if not compiled:
        return None
    return min(median(row, kind, "both") for kind in compiled) / median(row, "ours", "both")


def operation_figures(rows: list[dict]) -> list[dict]:
    """Those of the operations: of the gated residual in bfloat16, of the draw and of the step."""
    found = []
    for family in dict.fromkeys(row["family"] for row in rows):
        mine = [row for row in rows if row["family"] == family]
        for shape in dict.fromkeys(row["shape"] for row in _residuals(mine)):
            of_shape = [row for row in _residuals(mine) if row["shape"] == shape]
            found += _residual_figures(f"{family}, {shape}", of_shape)
        for row in mine:
            if "launches" in row:
                name = f"{family}, {row['operation']}"
                ran = row["launches"]
                found.append(figure(f"{name}: kernels", ran["kernels"], "==", 1))
                if ran["kernels"]:  # a profile that saw none tells nothing of their time
                    found.append(figure(f"{name}: device time, us", ran["device_us"], "<=", 8))
    return found + _family_figures(rows)


def _residuals(rows: list[dict]) -> list[dict]:
    return [
        row for row in rows if row["operation"] == "gated_residual" and row["dtype"] == "bfloat16"
    ]


def _residual_figures(name: str, rows: list[dict]) -> list[dict]:
    found = [
        figure(
            f"{name}: {part}, bytes/s of a copy's, least of all shares",
            min(row["of_copy"][part] for row in rows),
            ">=",
            0.9,
        )
        for part in ("forward", "backward")
    ]
    for share, target in ((1, 1.1), (0.5, 1.35)):
        for row in rows:
            gain = times_compile(row)
            if row["share"] == share and gain is not None:
                title = f"{name}: times torch.compile's dense sum, {share:.0%} of the rows"
                found.append(figure(title, gain, ">=", target))
    return found


def _family_figures(rows: list[dict]) -> list[dict]:
    """Triton's time over the compiled kernels', the largest of all shares."""
    times: dict[str, dict[tuple, float]] = {"compiled": {}, "triton": {}}
    for row in _residuals(rows):
        times[row["family"]][row["shape"], row["share"]] = median(row, "ours", "both")
    shared = times["compiled"].keys() & times["triton"].keys()
    found = []
    for shape in sorted({shape for shape, _ in shared}):
        ratios = [
            times["triton"][key] / times["compiled"][key] for key in shared if key[0] == shape
        ]
        title = f"{shape}: Triton's time over the compiled kernels', largest of all shares"
        found.append(figure(title, max(ratios), "<=", 1.1))
    return found


def training_figures(rows: list[dict]) -> list[dict]:
    """Those of a training step, from its rows for each kind of sections."""
    seconds = {row["sections"]: row["median_s"] for row in rows}
    waits = {row["sections"]: sum(row["waits"].values()) for row in rows}
    fixed, gated = seconds["removed"], seconds["plain"] - seconds["removed"]
    found = [
        figure(
            "theta 1: time over the plain step's", seconds["open"] / seconds["plain"], "<=", 1.02
        ),
        figure(
            "theta 1/2: time over that of the fixed part and half of the sections' part",
            seconds["half"] / (fixed + gated / 2),
            "<=",
            1.05,
        ),
    ]
    if all(row["kernels"] for row in rows):  # else the profile saw nothing, waits included
        more = max(waits["open"], waits["half"]) - waits["plain"]
        title = "calls in a gated step that make the host wait, beyond a plain step's"
        found.append(figure(title, more, "<=", 0))
    return found
