"""The records of a run: tables, decisions, TensorBoard scalars and a summary, all in its folder.

Everything the report shows is read back from these files. Each row reaches the operating system
at once, so a killed run loses none, and a resumed run first cuts what the interrupted one wrote
beyond its last checkpoint: the files of a resumed and of an uninterrupted run are the same.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from layerprune.training.records import (
    EPOCH_COLUMNS,
    EPOCHS_FILE,
    EVENTS_FILE,
    THETA_FILE,
    RunRecord,
    csv_line,
    cut_after,
    read_run,
    write_atomic,
)

__all__ = ["EPOCH_COLUMNS", "RunLog", "RunRecord", "read_run", "write_atomic"]

_SCALARS = {
    "lr": "lr",
    "train_loss": "train/loss",
    "train_accuracy": "train/accuracy",
    "test_loss": "test/loss",
    "test_accuracy": "test/accuracy",
    "ema_loss": "test/ema_loss",
    "ema_accuracy": "test/ema_accuracy",
    "sections_alive": "layerprune/sections_alive",
    "train_flops_fraction": "layerprune/train_flops_fraction",
}


class RunLog:
    """Writes the records of one run.

    `summary.csv` has a row an epoch (`EPOCH_COLUMNS`), `theta.csv` a row whenever `log_theta` is
    called (the step, then one column per section; there is no such file without sections),
    `events.jsonl` a JSON object per decision, `summary.json` the latest figures, `tensorboard/`
    the scalars. Only one process of a distributed run makes a log.

    Args:
        folder: the run's folder; made if missing.
        section_names: names of all sections the model started with, in order; empty for a dense
            run.
        resume_step: the step of the checkpoint that the run goes on from. Rows and events of
            later steps are cut. None begins a new run.

    Raises:
        FileExistsError: a new run was asked for in a folder that holds one.
        ValueError: the folder to resume in holds the records of another model.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        section_names: Sequence[str],
        resume_step: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.section_names = tuple(section_names)
        self.folder.mkdir(parents=True, exist_ok=True)
        files = {EPOCHS_FILE: csv_line(EPOCH_COLUMNS), EVENTS_FILE: ""}
        if self.section_names:
            files[THETA_FILE] = csv_line(("step", *self.section_names))
        for name in (EPOCHS_FILE, EVENTS_FILE, THETA_FILE):
            if resume_step is None and (self.folder / name).exists():
                raise FileExistsError(
                    f"{self.folder} already holds a run ({name}): resume it, or choose another "
                    "output folder"
                )
        # All files are examined before the first is changed.
        kept = {
            name: header
            if resume_step is None
            else cut_after(self.folder / name, header, resume_step)
            for name, header in files.items()
        }
        self._files = {}
        for name, text in kept.items():
            write_atomic(self.folder / name, text)
            self._files[name] = open(self.folder / name, "a", encoding="utf-8", buffering=1)
        self._tensorboard = SummaryWriter(
            str(self.folder / "tensorboard"),
            # TensorBoard hides earlier events from this step on.
            purge_step=None if resume_step is None else resume_step + 1,
        )

    def log_epoch(self, row: Mapping[str, float | None]) -> None:
        """Adds a row to `summary.csv` and its scalars to TensorBoard, and forces both to disk.

        Args:
            row: values for `EPOCH_COLUMNS`; "epoch" and "step" are required, others may be None
                or missing (the field is then empty). Accuracies are fractions, `seconds` is the
                wall time since the run began.

        Raises:
            ValueError: an unknown column, or no epoch or step.
        """
        unknown = sorted(set(row) - set(EPOCH_COLUMNS))
        if unknown or row.get("epoch") is None or row.get("step") is None:
            raise ValueError(
                f"an epoch's row needs 'epoch' and 'step' and allows only {list(EPOCH_COLUMNS)}; "
                f"got {sorted(row)}"
            )
        self._files[EPOCHS_FILE].write(csv_line(row.get(column) for column in EPOCH_COLUMNS))
        for column, key in _SCALARS.items():
            if row.get(column) is not None:
                self._tensorboard.add_scalar(key, row[column], int(row["step"]))
        self.flush()

    def log_theta(self, step: int, values: Sequence[float]) -> None:
        """Adds a row to `theta.csv`: call it every k steps, k being the same in all of the run.

        Args:
            step: optimizer steps done.
            values: theta of every section the model started with, in the order of the names; an
                eliminated one's is 0. Six decimals are kept.

        Raises:
            ValueError: not one value per section.
        """
        if len(values) != len(self.section_names):
            raise ValueError(
                f"{len(values)} thetas for {len(self.section_names)} sections: pass one for each "
                "section the model started with, the eliminated included"
            )
        if not self.section_names:
            return
        rounded = [round(float(value), 6) for value in values]
        self._files[THETA_FILE].write(csv_line((step, *rounded)))
        for name, value in zip(self.section_names, rounded, strict=True):
            self._tensorboard.add_scalar(f"layerprune/theta/{name}", value, step)

    def log_events(self, events: Iterable[Any]) -> None:
        """Adds decisions to `events.jsonl`.

        Args:
            events: dataclass instances or mappings with at least `step` and `section`.
        """
        for event in events:
            fields = dict(event) if isinstance(event, Mapping) else dataclasses.asdict(event)
            self._files[EVENTS_FILE].write(json.dumps(_plain(fields), allow_nan=False) + "\n")

    def write_summary(self, values: Mapping[str, Any]) -> None:
        """Replaces `summary.json` atomically; numbers that are not finite become null."""
        text = json.dumps(_plain(values), indent=2, allow_nan=False)
        write_atomic(self.folder / "summary.json", text + "\n")

    def flush(self) -> None:
        """Forces all rows to disk: call it before a checkpoint that they precede."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self._tensorboard.flush()

    def close(self) -> None:
        """Closes the files; the log can not be written to any more."""
        for file in self._files.values():
            file.close()
        self._tensorboard.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: no NaN or infinity, mappings and sequences plain."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
