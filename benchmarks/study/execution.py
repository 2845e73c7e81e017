"""Runs a study's cells in processes of their own; what is done already is not done again."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from machine import facts, write_result

from layerprune.training.assembly import pick_device
from study.grid import FLOPS, REFERENCE, REINSERTION, Cell, Study
from study.methods import Setup
from study.reinsertion import reinserted
from study.trial import load_images, run

LONGEST = 3
"""Times the recipe's epochs that a method may train to spend the reference's operations."""


@dataclass(frozen=True)
class Job:
    """What the processes need to know.

    Attributes:
        study: what is run.
        data_dir: the folder that holds the data set.
        folder: where results go.
        device: where to train.
        threads: of each process.
    """

    study: Study
    data_dir: str | None
    folder: Path
    device: str | None
    threads: int

    def result(self, cell: Cell) -> dict | None:
        """A cell's result, if it has been run with the settings that it has now."""
        path = self.folder / cell.file
        if not path.is_file():
            return None
        found = json.loads(path.read_text())
        return found if found.pop("settings") == self.settings(cell) else None

    def settings(self, cell: Cell) -> list:
        """What a cell's result depends on, as JSON."""
        chosen, init = self.study.recipe_of(cell)
        return [chosen.as_dict(), init, self.study.tasks[cell.task].held_out]


def with_needs(cells: Iterable[Cell]) -> list[Cell]:
    """Cells and what they need, each after what it needs."""
    ordered: dict[Cell, None] = {}

    def add(cell: Cell) -> None:
        for needed in cell.needs():
            add(needed)
        ordered.setdefault(cell)

    for cell in cells:
        add(cell)
    return list(ordered)


def run_all(job: Job, processes: int, tell: Callable[[str], None]) -> list[Cell]:
    """Runs what is missing of a study; returns the cells that failed or lack what they need."""
    cells = with_needs(job.study.cells())
    done = {cell for cell in cells if job.result(cell) is not None}
    waiting = [cell for cell in cells if cell not in done]
    total, failed = len(cells), []
    running: dict[Future, Cell] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (job.threads,)) as pool:
        while waiting or running:
            ready = [cell for cell in waiting if done.issuperset(cell.needs())]
            for cell in ready[: processes - len(running)]:
                waiting.remove(cell)
                running[pool.submit(run_cell, job, cell)] = cell
            if not running:
                return failed + waiting
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                told, error = future.result()
                if error is None:
                    done.add(cell)
                else:
                    failed.append(cell)
                tell(f"[{len(done)}/{total}] {cell}: {told if error is None else error}")
    return failed


def run_cell(job: Job, cell: Cell) -> tuple[str, str | None]:
    """Runs one cell and writes its result; returns what to say of it, and what went wrong."""
    started = time.perf_counter()
    try:
        chosen, init = job.study.recipe_of(cell)
        splits, held_out = load_images(chosen, job.data_dir, job.study.tasks[cell.task].held_out)
        setup = Setup(
            chosen,
            splits,
            pick_device(job.device),
            epochs=_epochs(job, cell, chosen.epochs) if cell.budget == FLOPS else None,
            init=init,
            reference=job.result(Cell(cell.task, REFERENCE, seed=cell.seed)),
        )
        if cell.method == REINSERTION:
            result = reinserted(setup, held_out)
            told = f"{len(result['reinserted'])} sections put back"
        else:
            result, _ = run(cell.method, setup, held_out)
            told = (
                f"accuracy {result['accuracy']:.4f}, {result['sections_kept']} sections, "
                f"{result['train_flops']:.1%} of the operations"
            )
    except Exception:
        return "", traceback.format_exc(limit=-3)
    known = {
        "settings": job.settings(cell),
        "seconds": time.perf_counter() - started,
        "facts": facts(job.device),
    }
    write_result(job.folder / cell.file, asdict(cell) | result | known)
    return told, None


def _epochs(job: Job, cell: Cell, epochs: int) -> int:
    """As many as take at least as many operations as the reference took."""
    reference, own = (job.result(needed)["train_flops"] for needed in cell.needs())
    return min(max(1, math.ceil(epochs * reference / own)), LONGEST * epochs)


def collected(job: Job) -> dict:
    """All results of a study, as one."""
    found = [job.result(cell) for cell in with_needs(job.study.cells())]
    rows = [row for row in found if row is not None]
    first = rows[0]["facts"] if rows else {}
    for row in rows:
        own = row.pop("facts")
        row["commit"] = own["commit"]
    return {
        "study": job.study.name,
        **first,
        "processes_on_cpus": os.cpu_count(),
        "tasks": {
            name: {"recipe": task.recipe.as_dict(), "held_out": task.held_out}
            for name, task in job.study.tasks.items()
        },
        "variations": {name: task.variations for name, task in job.study.tasks.items()},
        "rows": rows,
    }
