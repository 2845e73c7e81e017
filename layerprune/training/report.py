"""The report of a run: one HTML file that needs nothing else, made from the run's records."""

from __future__ import annotations

import os
from collections.abc import Iterable
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from layerprune.training import report_figures as figures
from layerprune.training.records import RunRecord, fates, read_run, write_atomic
from layerprune.training.report_html import (
    MINUS,
    amount,
    card,
    duration,
    figure,
    joined,
    number,
    pairs,
    percent,
    table,
    tile,
)


def write_report(
    folder: str | os.PathLike[str], baseline: str | os.PathLike[str] | None = None
) -> Path:
    """Writes `report.html` into a run's folder.

    The file is self-contained: style and figures are inside, it loads nothing and runs no script.
    A dense run and a run in progress have a report too, of what is known so far.

    Args:
        folder: the run's folder.
        baseline: the folder of a dense run to compare with: its accuracy, time and curves.

    Returns:
        The path of the report.

    Raises:
        FileNotFoundError: `folder` or `baseline` is not a run.
        ValueError: a record is damaged; the message names the file.
    """
    record = read_run(folder)
    dense = None if baseline is None else read_run(baseline)
    summary, planned = record.summary, record.summary.get("epochs")
    if summary.get("finished"):
        state = "finished"
    else:
        state = f"in progress, epoch {len(record.epochs)}" + (f" of {planned}" if planned else "")
    about = [
        joined(" on ", summary.get("model"), summary.get("dataset")),
        joined(" ", "seed", summary["seed"]) if summary.get("seed") is not None else "",
        f"{planned} epoch{'s' if planned > 1 else ''}" if planned else "",
    ]
    template = resources.files("layerprune.training").joinpath("report.html.template")
    page = Template(template.read_text(encoding="utf-8")).substitute(
        title=escape(str(summary.get("name") or record.folder.resolve().name)),
        subtitle=escape(joined(" \N{MIDDLE DOT} ", *about)),
        state=escape(state),
        tiles="\n".join(_tiles(record, dense)),
        cards="\n".join(_cards(record, dense)),
    )
    path = record.folder / "report.html"
    write_atomic(path, page)
    return path


def _tiles(record: RunRecord, dense: RunRecord | None) -> Iterable[str]:
    """The headline figures; one that is not known is left out."""
    summary, reference = record.summary, dense.summary if dense else {}
    latest = record.epochs[-1] if record.epochs else {}
    accuracy = _first(summary.get("accuracy"), latest.get("test_accuracy"))
    if accuracy is not None:
        finished, before = summary.get("finished"), reference.get("accuracy")
        detail = "on the test set" if finished else "on the test set, so far"
        if finished and before is not None:
            sign = MINUS if accuracy < before else "+"
            points = f"{sign}{100 * abs(accuracy - before):.2f} points"
            detail = f"{points}; dense {percent(before, 2)}"
        yield tile("Accuracy", percent(accuracy, 2), detail)
    total = _first(summary.get("sections_total"), len(record.sections) or None)
    kept = _first(summary.get("sections_kept"), latest.get("sections_alive"), total)
    if total:
        value = f"{kept:.0f} <small>of {total}</small>"
        first = summary.get("first_elimination_fraction")
        detail = "" if first is None else f"first removed at {percent(first)} of training"
        yield tile("Sections kept", value, detail, kept / total)
    spent = _first(summary.get("train_flops_fraction"), latest.get("train_flops_fraction"))
    if spent is not None:
        tests = summary.get("test_flops_fraction")
        detail = "of dense" + (f"; {percent(tests)} for the tests" if tests else "")
        yield tile("Training FLOPs", percent(spent), detail, spent)
    seconds = _first(summary.get("train_seconds"), latest.get("seconds"))
    if seconds is not None:
        before = reference.get("train_seconds")
        if before and summary.get("finished"):
            share = seconds / before
            detail = f"of dense; {duration(seconds)}, not {duration(before)}"
            yield tile("Training time", percent(share), detail, share)
        else:
            yield tile("Training time", duration(seconds), "wall time")
    share, flops = summary.get("inference_flops_fraction"), summary.get("inference_flops")
    if share is not None:
        detail = "of dense" + ("" if flops is None else f"; {amount(flops)} a sample")
        yield tile("Inference FLOPs", percent(share), detail, share)
    parameters, before = summary.get("parameters"), summary.get("parameters_dense")
    if parameters is not None:
        share = parameters / before if before else None
        detail = "" if share is None else f"{percent(share)} of {amount(before)}"
        yield tile("Parameters", amount(parameters), detail, share)


def _cards(record: RunRecord, dense: RunRecord | None) -> Iterable[str]:
    """The sections of the page that have something to show."""
    everyone = fates(record)
    gone = [fate for fate in everyone if fate.step is not None]
    outcome = f"{len(gone)} of {len(everyone)} sections removed"
    if everyone:
        yield figure(
            "Theta of every section",
            "Theta is the probability with which a section runs. Training drives each to 0 or 1; "
            "a cross marks a removal.",
            figures.theta_over_time(record),
            f"Line chart of theta for {len(everyone)} sections over time; {outcome}. "
            "The decisions table gives the values.",
        )
    if record.epochs:
        known = [r["test_accuracy"] for r in record.epochs if r["test_accuracy"] is not None]
        last = f"; the last test accuracy is {percent(known[-1], 2)}" if known else ""
        yield figure(
            "Accuracy and loss",
            "Per epoch." + (" Dashed: the dense baseline." if dense else ""),
            figures.accuracy_and_loss(record, dense),
            f"Line charts of accuracy and loss over {len(record.epochs)} epochs{last}.",
        )
    if everyone:
        yield figure(
            "Removal timeline and evidence",
            "Left: each section for as long as it ran; a gap in a bar is a test that left it open. "
            "Right: the measured worth of the section at its last decision, with one standard "
            f"error, in units of its penalty. Above {MINUS}1 the section saves less loss than it "
            "costs, and goes.",
            figures.removal_timeline(record),
            f"Bar chart of the time each section ran, with its decision; {outcome}. "
            "The decisions table gives the evidence as numbers.",
            wide=True,
        )
    shares = [row["train_flops_fraction"] for row in record.epochs]
    if everyone and shares and None not in shares:
        yield figure(
            "Training FLOPs",
            "Spent so far, the decision tests included, beside a dense run's.",
            figures.training_flops(record),
            f"Area chart of cumulative training FLOPs; the last epoch is at {percent(shares[-1])} "
            "of dense training.",
        )
    yield from _architecture(record)
    if record.events:
        yield _decisions(record)
    if record.args:
        yield card("Settings", pairs(record.args))
    facts = {f"{k} version": v for k, v in (record.summary.get("versions") or {}).items()}
    facts |= {k: v for k, v in record.summary.items() if isinstance(v, str | int | float)}
    if facts:
        yield card("Figures and versions", pairs(facts))


def _architecture(record: RunRecord) -> Iterable[str]:
    """The network that came out: a strip with a box per section, and a table."""
    parts = record.summary.get("architecture") or []
    if not parts:
        return
    finished = record.summary.get("finished")
    here = "kept" if finished else "in place"
    most = max([part.get("flops") or 0 for part in parts]) or 1
    boxes, rows = [], []
    for part in parts:
        kept, name = bool(part.get("kept")), str(part.get("name"))
        height = 14 + 34 * (part.get("flops") or 0) / most
        boxes.append(
            f'<i class="{"on" if kept else "off"}" style="height:{height:.0f}px" '
            f'title="{escape(name)}: {here if kept else "removed"}"></i>'
        )
        cells = [escape(name), escape(str(part.get("kind", ""))), here if kept else "removed"]
        numbers = [amount(part.get("params")), amount(part.get("flops"))]
        rows.append((kept, cells, [*numbers, number(part.get("theta"))]))
    count = sum(kept for kept, _, _ in rows)
    strip = (
        f'<div class="net" role="img" aria-label="{count} of {len(rows)} sections {here}, drawn in '
        f'order from input to output">{"".join(boxes)}</div>'
    )
    listed = table(["Section", "Kind", "Outcome"], ["Parameters", "FLOPs", "Theta"], rows)
    note = "From input to output; dashed: removed. The height of a box stands for its FLOPs."
    same = record.summary.get("verify_max_abs_difference")
    if same is not None:
        equal = "bit for bit equal" if same == 0 else f"differ by at most {same:.2g}"
        note += f" Outputs of the gated and of the compacted network: {equal}."
    yield card("Final architecture" if finished else "Architecture so far", strip + listed, note)


def _decisions(record: RunRecord) -> str:
    rows = []
    for event in record.events:
        gone = event.get("decision") in ("eliminated", "rounded-off")
        colour = figures.RED if gone else figures.BLUE
        dot = f'<span class="dot" style="background:{colour}"></span>'
        cells = [
            escape(str(event.get("step", ""))),
            escape(str(event.get("section", ""))),
            dot + escape(str(event.get("decision", ""))),
            escape(str(event.get("by", ""))),
        ]
        error = number(event.get("standard_error"))
        evidence = f"{number(event.get('difference'))} \N{PLUS-MINUS SIGN} {error}"
        border = number(None if event.get("penalty") is None else -event["penalty"])
        numbers = [evidence, border, number(event.get("batches")), number(event.get("theta"))]
        rows.append((True, cells, numbers))
    heads = ["Difference \N{PLUS-MINUS SIGN} standard error", f"{MINUS}Penalty", "Batches"]
    listed = table(["Step", "Section", "Decision", "By"], [*heads, "Theta"], rows)
    note = (
        "Difference: loss with the section minus loss without it, on the same batches. A section "
        f"whose difference lies above {MINUS}penalty is removed."
    )
    return card("Decisions", listed, note, wide=True)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
