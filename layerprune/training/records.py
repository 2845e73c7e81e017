"""The files of a run's folder: their columns, how they are read, cut and replaced.

`summary.csv` has a row an epoch, `theta.csv` a row every few steps with a column per section,
`events.jsonl` a JSON object per decision; `args.yaml` and `summary.json` are a mapping each.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from layerprune.training.untrusted import TABLE_LIMIT, parsed_json, parsed_yaml, read_text

EPOCHS_FILE, THETA_FILE, EVENTS_FILE = "summary.csv", "theta.csv", "events.jsonl"
EPOCH_COLUMNS = (
    "epoch",
    "step",
    "lr",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "ema_loss",
    "ema_accuracy",
    "sections_alive",
    "mean_theta",
    "train_flops_fraction",
    "seconds",
)
_KEPT = {"settled": "kept by test", "rounded-on": "kept by rounding"}


@dataclass(frozen=True)
class RunRecord:
    """What a run wrote, read back.

    Attributes:
        folder: the run's folder.
        args: its settings (`args.yaml`), or None where there is no such file.
        epochs: rows of `summary.csv`; "epoch" and "step" are int, others float or None.
        sections: section names in order; empty for a dense run.
        theta_steps: int64 [T], the steps at which theta was recorded.
        theta: float64 [T, number of sections].
        events: decisions in order, as dicts.
        summary: `summary.json`; empty if none was written yet.
    """

    folder: Path
    args: dict[str, Any] | None
    epochs: list[dict[str, Any]]
    sections: tuple[str, ...]
    theta_steps: np.ndarray
    theta: np.ndarray
    events: list[dict[str, Any]]
    summary: dict[str, Any]


def read_run(folder: str | os.PathLike[str]) -> RunRecord:
    """Reads the records of a run, finished or in progress.

    A last line that is not complete (the run is writing it, or was killed) is left out.

    Args:
        folder: the run's folder.

    Raises:
        FileNotFoundError: no such folder, or it does not hold a run.
        ValueError: a damaged file; the message names it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such run folder: {folder}")
    if not (folder / EPOCHS_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} is not a run: it has no {EPOCHS_FILE}. Give the folder that "
            "`layerprune train` wrote to (--output)"
        )
    args = _parsed(folder / "args.yaml", lambda text: _mapping(parsed_yaml(text)), None)
    summary = _parsed(folder / "summary.json", lambda text: _mapping(parsed_json(text)), {})
    epochs = _parsed(folder / EPOCHS_FILE, _epoch_rows, [])
    events = _parsed(folder / EVENTS_FILE, _event_rows, [])
    sections, steps, theta = _parsed(folder / THETA_FILE, _theta_rows, _theta_rows("step\n"))
    return RunRecord(folder, args, epochs, sections, steps, theta, events, summary)


@dataclass(frozen=True)
class Fate:
    """What became of a section.

    Attributes:
        section: its name.
        kind: "kept by test", "kept by rounding", "undecided" or "removed by " and one of "test",
            "rounding", "attraction".
        event: the last decision about it, None if there was none.
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
        else:
            last = mine[-1] if mine else {}
            kind = _KEPT.get(str(last.get("decision")), "undecided")
            result.append(Fate(section, kind, last or None, None))
    return result


def _parsed(path: Path, parse: Callable[[str], Any], missing: Any) -> Any:
    """The file's content through `parse`, or `missing` without such a file."""
    if not path.exists():
        return missing
    try:
        return parse(read_text(path, TABLE_LIMIT))
    except (ValueError, LookupError, csv.Error) as error:
        raise ValueError(f"{path} is damaged or another run's: {error}") from error


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected a mapping, got {type(value).__name__}")
    return value


def _event_rows(text: str) -> list[dict[str, Any]]:
    return [_mapping(parsed_json(line)) for line in complete_lines(text)]


def _epoch_rows(text: str) -> list[dict[str, Any]]:
    header, *rows = csv.reader(complete_lines(text))
    if tuple(header) != EPOCH_COLUMNS:
        raise ValueError(f"its columns are {header}, not {list(EPOCH_COLUMNS)}")
    whole = {"epoch", "step"}
    return [
        {
            column: (int(field) if column in whole else float(field)) if field else None
            for column, field in zip(header, row, strict=True)
        }
        for row in rows
    ]


def _theta_rows(text: str) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    header, *rows = csv.reader(complete_lines(text))
    steps = np.array([int(row[0]) for row in rows], dtype=np.int64)
    theta = np.array([[float(x) for x in row[1:]] for row in rows], dtype=np.float64)
    return tuple(header[1:]), steps, theta.reshape(len(rows), len(header) - 1)


def complete_lines(text: str) -> list[str]:
    """The complete lines: what follows the last newline was not written to its end."""
    return text.split("\n")[:-1]


def csv_line(fields: Iterable[Any]) -> str:
    """One line of a CSV file, with its newline; None becomes an empty field."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(fields)
    return line.getvalue()


def cut_after(path: Path, header: str, step: int) -> str:
    """The text of a record file without what was written after `step`, byte for byte.

    Args:
        path: `summary.csv`, `theta.csv` or `events.jsonl`; it need not exist.
        header: the file's first line, which has to be there; empty for `events.jsonl`.
        step: rows and events of later steps are left out.

    Raises:
        ValueError: another header (the file is another run's), or a damaged line.
    """

    def kept(text: str) -> str:
        lines = [line + "\n" for line in complete_lines(text)]
        if not header:
            return "".join(line for line in lines if parsed_json(line)["step"] <= step)
        if lines[:1] != [header]:
            raise ValueError(f"expected the columns {header.strip()}, as this run's model has them")
        column = next(csv.reader([header])).index("step")
        rows = (x for x in lines[1:] if int(next(csv.reader([x]))[column]) <= step)
        return header + "".join(rows)

    return _parsed(path, kept, header)


def write_atomic(path: Path, text: str) -> None:
    """Replaces the file at `path` by `text` (UTF-8): a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
