"""The report of a run: one HTML file that needs nothing else, made from the run's records."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from layerprune.training import report_figures as figures
from layerprune.training.records import RunRecord, read_run, write_atomic

_MINUS, _DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
_OPEN_ROWS = 24  # a longer table is folded


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
    summary = record.summary
    rows = record.epochs
    if summary.get("finished"):
        state = "finished"
    else:
        planned = summary.get("epochs")
        state = f"in progress, epoch {len(rows)}" + (f" of {planned}" if planned else "")
    about = [
        _joined(" on ", summary.get("model"), summary.get("dataset")),
        _joined(" ", "seed", summary["seed"]) if summary.get("seed") is not None else "",
        f"{summary['epochs']} epochs" if summary.get("epochs") else "",
    ]
    template = resources.files("layerprune.training").joinpath("report.html.template")
    page = Template(template.read_text(encoding="utf-8")).substitute(
        title=escape(str(summary.get("name") or record.folder.resolve().name)),
        subtitle=escape(_joined(" \N{MIDDLE DOT} ", *about)),
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
            sign = _MINUS if accuracy < before else "+"
            points = f"{sign}{100 * abs(accuracy - before):.2f} points"
            detail = f"{points}; dense {_percent(before, 2)}"
        yield _tile("Accuracy", _percent(accuracy, 2), detail)
    total = _first(summary.get("sections_total"), len(record.sections) or None)
    kept = _first(summary.get("sections_kept"), latest.get("sections_alive"), total)
    if total:
        value = f"{kept:.0f} <small>of {total}</small>"
        first = summary.get("first_elimination_fraction")
        detail = "" if first is None else f"first removed at {_percent(first)} of training"
        yield _tile("Sections kept", value, detail, kept / total)
    spent = _first(summary.get("train_flops_fraction"), latest.get("train_flops_fraction"))
    if spent is not None:
        tests = summary.get("test_flops_fraction")
        detail = "of dense" + ("" if tests is None else f"; {_percent(tests)} for the tests")
        yield _tile("Training FLOPs", _percent(spent), detail, spent)
    seconds = _first(summary.get("seconds"), latest.get("seconds"))
    if seconds is not None:
        if reference.get("seconds") and summary.get("finished"):
            share = seconds / reference["seconds"]
            detail = f"of dense; {_duration(seconds)}, not {_duration(reference['seconds'])}"
            yield _tile("Training time", _percent(share), detail, share)
        else:
            yield _tile("Training time", _duration(seconds), "wall time")
    share, flops = summary.get("inference_flops_fraction"), summary.get("inference_flops")
    if share is not None:
        detail = "of dense" + ("" if flops is None else f"; {_amount(flops)} a sample")
        yield _tile("Inference FLOPs", _percent(share), detail, share)
    parameters, before = summary.get("parameters"), summary.get("parameters_dense")
    if parameters is not None:
        share = parameters / before if before else None
        detail = "" if share is None else f"{_percent(share)} of {_amount(before)}"
        yield _tile("Parameters", _amount(parameters), detail, share)


def _cards(record: RunRecord, dense: RunRecord | None) -> Iterable[str]:
    """The sections of the page that have something to show."""
    fates = figures.fates(record)
    gone = [fate for fate in fates if fate.step is not None]
    outcome = f"{len(gone)} of {len(fates)} sections removed"
    if fates:
        yield _figure(
            "Theta of every section",
            "Theta is the probability with which a section runs. Training drives each to 0 or 1; "
            "a cross marks a removal.",
            figures.theta_over_time(record),
            f"Line chart of theta for {len(fates)} sections over time; {outcome}. "
            "The decisions table gives the values.",
        )
    if record.epochs:
        known = [r["test_accuracy"] for r in record.epochs if r["test_accuracy"] is not None]
        last = f"; the last test accuracy is {_percent(known[-1], 2)}" if known else ""
        yield _figure(
            "Accuracy and loss",
            "Per epoch." + (" Dashed: the dense baseline." if dense else ""),
            figures.accuracy_and_loss(record, dense),
            f"Line charts of accuracy and loss over {len(record.epochs)} epochs{last}.",
        )
    if fates:
        yield _figure(
            "Removal timeline and evidence",
            "Left: each section for as long as it ran; a gap in a bar is a test that let it stay. "
            "Right: the measured worth of the section at its last decision, with one standard "
            f"error, in units of its penalty. Above {_MINUS}1 the section saves less loss than it "
            "costs, and goes.",
            figures.removal_timeline(record),
            f"Bar chart of the time each section ran, with its decision; {outcome}. "
            "The decisions table gives the evidence as numbers.",
            wide=True,
        )
    if fates and any(row["train_flops_fraction"] is not None for row in record.epochs):
        yield _figure(
            "Training FLOPs",
            "Spent so far, the decision tests included, beside a dense run's.",
            figures.training_flops(record),
            "Area chart of cumulative training FLOPs against dense training"
            f"; {_percent(record.epochs[-1]['train_flops_fraction'])} of dense in the end.",
        )
    yield from _architecture(record)
    if record.events:
        yield _decisions(record)
    if record.args:
        yield _card("Settings", _pairs(record.args))
    facts = {f"{k} version": v for k, v in (record.summary.get("versions") or {}).items()}
    facts |= {k: v for k, v in record.summary.items() if isinstance(v, str | int | float)}
    if facts:
        yield _card("Figures and versions", _pairs(facts))


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
        numbers = [_amount(part.get("params")), _amount(part.get("flops"))]
        rows.append((kept, cells, [*numbers, _number(part.get("theta"))]))
    count = sum(kept for kept, _, _ in rows)
    strip = (
        f'<div class="net" role="img" aria-label="{count} of {len(rows)} sections {here}, drawn in '
        f'order from input to output">{"".join(boxes)}</div>'
    )
    table = _table(["Section", "Kind", "Outcome"], ["Parameters", "FLOPs", "Theta"], rows)
    note = "From input to output; dashed: removed. The height of a box stands for its FLOPs."
    same = record.summary.get("verify_max_abs_difference")
    if same is not None:
        equal = "bit for bit equal" if same == 0 else f"differ by at most {same:.2g}"
        note += f" Outputs of the gated and of the compacted network: {equal}."
    yield _card("Final architecture" if finished else "Architecture so far", strip + table, note)


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
        error = _number(event.get("standard_error"))
        evidence = f"{_number(event.get('difference'))} \N{PLUS-MINUS SIGN} {error}"
        border = _number(None if event.get("penalty") is None else -event["penalty"])
        numbers = [evidence, border, _number(event.get("batches")), _number(event.get("theta"))]
        rows.append((True, cells, numbers))
    heads = ["Difference \N{PLUS-MINUS SIGN} standard error", f"{_MINUS}Penalty", "Batches"]
    table = _table(["Step", "Section", "Decision", "By"], [*heads, "Theta"], rows)
    note = (
        "Difference: loss with the section minus loss without it, on the same batches. A section "
        f"whose difference lies above {_MINUS}penalty is removed."
    )
    return _card("Decisions", table, note, wide=True)


def _tile(label: str, value: str, detail: str, share: float | None = None) -> str:
    width = 0 if share is None else 100 * min(max(share, 0), 1)
    meter = "" if share is None else f'<div class="meter"><span style="width:{width:.1f}%"></span></div>'
    return (
        f'<div class="tile"><span class="label">{label}</span><span class="value">{value}</span>'
        f'<span class="detail">{detail}</span>{meter}</div>'
    )


def _card(title: str, body: str, note: str = "", wide: bool = False) -> str:
    words = f'<p class="note">{note}</p>' if note else ""
    return f'<section class="card{" wide" * wide}"><h2>{title}</h2>{words}{body}</section>'


def _figure(title: str, note: str, svg: str, described: str, wide: bool = False) -> str:
    body = f'<figure role="img" aria-label="{escape(described)}">{svg}</figure>'
    return _card(title, body, note, wide)


def _table(
    words: list[str], numbers: list[str], rows: list[tuple[bool, list[str], list[str]]]
) -> str:
    """A table with text columns, then right-aligned ones; cells are HTML. Long ones are folded."""
    head = "".join(f'<th scope="col">{name}</th>' for name in words)
    head += "".join(f'<th scope="col" class="n">{name}</th>' for name in numbers)
    lines = [
        f'<tr{"" if strong else " class=gone"}>'
        + "".join(f"<td>{cell}</td>" for cell in texts)
        + "".join(f'<td class="n">{cell}</td>' for cell in figures_)
        + "</tr>"
        for strong, texts, figures_ in rows
    ]
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    table = f'<div class="scroll">{table}</div>'
    if len(rows) <= _OPEN_ROWS:
        return table
    return f"<details><summary>Show all {len(rows)} rows</summary>{table}</details>"


def _pairs(values: Mapping[str, Any]) -> str:
    lines = []
    for key, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        lines.append(f'<tr><th scope="row">{escape(str(key))}</th><td>{escape(text)}</td></tr>')
    return f'<table class="pairs"><tbody>{"".join(lines)}</tbody></table>'


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _joined(separator: str, *parts: Any) -> str:
    return separator.join(str(part) for part in parts if part not in (None, ""))


def _percent(value: float, digits: int = 0) -> str:
    return f"{100 * value:.{digits}f}%"


def _number(value: float | None) -> str:
    return _DASH if value is None else f"{value:.3g}".replace("-", _MINUS)


def _amount(value: float | None) -> str:
    """A count with a decimal prefix and three digits: 464 k, 0.27 M."""
    if value is None:
        return _DASH
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 100 else f"{seconds / 3600:.1f} h"
