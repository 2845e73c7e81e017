"""Runs a study's cells in processes of their own; what is done already is not done again."""

from __future__ import annotations

import json
import math
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from machine import write_result

from layerprune.training.assembly import pick_device
from layerprune.training.data import DataSplits
from layerprune.training.evaluation import BATCH
from layerprune.training.sampling import test_loader
from study.grid import FLOPS, REFERENCE, REINSERTION, Cell, Study
from study.latency import inference_seconds
from study.methods import Setup
from study.reinsertion import reinserted
from study.trial import Held, load_images, plain_network, run

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
        facts: what the cells are trained on.
    """

    study: Study
    data_dir: str | None
    folder: Path
    device: str | None
    threads: int
    facts: dict

    def result(self, cell: Cell) -> dict | None:
        """A cell's result, if it has been run with the settings that it has now."""
        path = self.folder / cell.file
        if not path.is_file():
            return None
        found = json.loads(path.read_text())
        return found if found.pop("settings") == self.settings(cell) else None

    def settings(self, cell: Cell) -> list:
        """What a cell's result depends on, as JSON; of the cells that it needs, what it takes."""
        chosen, init = self.study.recipe_of(cell)
        needed = [self.result(one) for one in cell.needs()]
        taken = [one and [one["kept"], one["train_flops"]] for one in needed]
        return [chosen.as_dict(), init, self.study.tasks[cell.task].held_out, taken]

    def images(self, cell: Cell) -> tuple[DataSplits, Held]:
        """A cell's images, and those held out from them."""
        chosen, _ = self.study.recipe_of(cell)
        return load_images(chosen, self.data_dir, self.study.tasks[cell.task].held_out)


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
    done: set[Cell] = set()
    for cell in cells:
        if job.result(cell) is not None and done.issuperset(cell.needs()):
            done.add(cell)
    waiting = [cell for cell in cells if cell not in done]
    total, failed = len(cells), []
    running: dict[Future, Cell] = {}
    pool = _pool(job, processes)
    try:
        while waiting or running:
            ready = [cell for cell in waiting if done.issuperset(cell.needs())]
            for cell in ready[: processes - len(running)]:
                waiting.remove(cell)
                running[pool.submit(run_cell, job, cell)] = cell
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                if isinstance(future.exception(), BrokenExecutor):
                    # A process was killed: what ran in the others is lost too.
                    failed += running.values()
                    tell(f"{future.exception()}: {', '.join(map(str, running.values()))}")
                    running.clear()
                    pool = _pool(job, processes)
                    break
                cell = running.pop(future)
                told, error = future.result()
                if error is None:
                    done.add(cell)
                else:
                    failed.append(cell)
                tell(f"[{len(done)}/{total}] {cell}: {told if error is None else error}")
    finally:
        pool.shutdown()
    return failed + waiting


def _pool(job: Job, processes: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, context, torch.set_num_threads, (job.threads,))


def run_cell(job: Job, cell: Cell) -> tuple[str, str | None]:
    """Runs one cell and writes its result; returns what to say of it, and what went wrong."""
    started = time.perf_counter()
    try:
        chosen, init = job.study.recipe_of(cell)
        splits, held_out = job.images(cell)
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
            told = f"{len(result['reinserted'])} sections put in"
        else:
            result, _ = run(cell.method, setup, held_out)
            told = (
                f"accuracy {result['accuracy']:.4f}, {result['sections_kept']} sections, "
                f"{result['train_flops']:.1%} of the operations"
            )
        known = {
            "settings": job.settings(cell),
            "seconds": time.perf_counter() - started,
            "facts": job.facts,
        }
        write_result(job.folder / cell.file, asdict(cell) | result | known)
    except Exception:
        return "", traceback.format_exc(limit=-3)
    return told, None


def _epochs(job: Job, cell: Cell, epochs: int) -> int:
    """As many as take at least the reference's operations, at the rate of the recipe's epochs."""
    reference, own = (job.result(needed)["train_flops"] for needed in cell.needs())
    return min(max(1, math.ceil(epochs * reference / own)), LONGEST * epochs)


def collected(job: Job) -> dict:
    """All results of a study, as one, with inference times, which are measured now."""
    cells = [cell for cell in with_needs(job.study.cells()) if job.result(cell) is not None]
    rows = [job.result(cell) for cell in cells]
    facts = [row.pop("facts") for row in rows]
    seconds = _inference_seconds(job, cells, rows)
    for cell, row, own in zip(cells, rows, facts, strict=True):
        row["inference_seconds"] = seconds[cell]
        row |= {key: own[key] for key in ("commit", "device")}
    return {
        "study": job.study.name,
        **(facts[0] if facts else job.facts),
        "tasks": {
            name: {
                "recipe": task.recipe.as_dict(),
                "held_out": task.held_out,
                "seeds": list(task.seeds),
            }
            for name, task in job.study.tasks.items()
        },
        "variations": {
            name: task.variations for name, task in job.study.tasks.items() if task.variations
        },
        "rows": rows,
    }


def _inference_seconds(job: Job, cells: list[Cell], rows: list[dict]) -> dict[Cell, float]:
    """Of every cell's plain network; those of a task that have the same shape are one."""
    device, found = pick_device(job.device), {}
    for task in job.study.tasks:
        kept = {c: row["kept"] for c, row in zip(cells, rows, strict=True) if c.task == task}
        if not kept:
            continue
        splits, _ = job.images(next(iter(kept)))
        shapes, networks = {}, {}
        for cell, names in kept.items():
            chosen, _ = job.study.recipe_of(cell)
            shapes[cell] = (chosen.model, repr(chosen.model_args), *names)
            if shapes[cell] not in networks:
                network, _ = plain_network(chosen, splits, device, names)
                networks[shapes[cell]] = network.model
        layout = torch.channels_last if chosen.channels_last else torch.preserve_format
        images, _ = next(iter(test_loader(splits, BATCH)))
        seconds = inference_seconds(networks, images.to(device, memory_format=layout))
        found |= {cell: seconds[shape] for cell, shape in shapes.items()}
    return found
