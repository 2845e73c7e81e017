"""What the packaged recipes cost: counted for a whole run, and measured on a CPU for a few steps.

    OMP_NUM_THREADS=1 python benchmarks/recipes.py --output benchmarks/results/recipes-cpu.json

Operations are those of the dense network, counted as the pruner's ledger counts them. Every kind of
step is measured in a process of its own, on random images, with the recipe's own settings:
  dense    the recipe's --dense
  pruned   with the pruner, at the run's start: its warm-up, thetas where they begin
A batch that is too much for a CPU is cut; what is said of memory is then said of half of it, too,
so that the whole one's can be told.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from machine import facts, write_result

from layerprune import models
from layerprune.cost import forward_flops
from layerprune.ledger import BACKWARD
from layerprune.ranks import Ranks
from layerprune.sections.discovery import find_sections
from layerprune.training import recipe
from layerprune.training.assembly import build_network
from layerprune.training.checkpoint import example_inputs
from layerprune.training.data import DataSplits
from layerprune.training.session import Session
from layerprune.training.step import TrainStep

# (training images, test images, classes, channels, size)
SETS = {
    "digits": (1437, 360, 10, 1, 8),
    "mnist": (60_000, 10_000, 10, 1, 28),
    "fashion-mnist": (60_000, 10_000, 10, 1, 28),
    "cifar10": (50_000, 10_000, 10, 3, 32),
    # ImageNet is the one that a recipe reads from folders.
    "imagefolder": (1_281_167, 50_000, 1000, 3, 224),
}
MOST_FLOPS = 400e9
"""Of a step that is measured: half a minute of a core."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipes", nargs="+", default=recipe.names(), metavar="NAME")
    parser.add_argument("--steps", type=int, default=3, help="timed, after one that is not")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    rows = []
    for name in options.recipes:
        rows.append(counts(recipe.load(name)) | measurements(name, options.steps))
        print(rows[-1])
    if options.output is not None:
        write_result(options.output, {**facts("cpu"), "steps": options.steps, "rows": rows})


def counts(chosen: recipe.Recipe) -> dict:
    """What is known of a run before it begins."""
    train, test, classes, channels, size = SETS[chosen.dataset]
    kwargs = chosen.model_args | {
        "num_classes": classes,
        "in_channels": channels,
        "image_size": size,
    }
    model, example = models.build(chosen.model, **kwargs), example_inputs(kwargs)
    flops = forward_flops(model, example)[""]
    steps = (chosen.train_subset or train) // chosen.step_rows * chosen.epochs
    return {
        "recipe": chosen.name,
        "model": chosen.model,
        "model_args": chosen.model_args,
        "dataset": chosen.dataset,
        "train_images": chosen.train_subset or train,
        "test_images": test,
        "epochs": chosen.epochs,
        "batch_size": chosen.batch_size,
        "total_steps": steps,
        "sections": len(find_sections(model, example)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "forward_flops": flops,
        "dense_train_flops": (1 + BACKWARD) * flops * chosen.step_rows * steps,
    }


def measurements(name: str, steps: int) -> dict:
    """CPU seconds of a step and memory, dense and pruned."""
    chosen = recipe.load(name)
    flops = counts(chosen)["forward_flops"] * (1 + BACKWARD)
    batch = chosen.batch_size
    while flops * batch > MOST_FLOPS:
        batch //= 2
    found: dict = {"measured_batch": batch}
    for kind in ("dense", "pruned"):
        found[kind] = alone(name, kind, batch, steps)
        if batch < chosen.batch_size:
            found[kind]["half_batch"] = alone(name, kind, batch // 2, steps)
    return found


def alone(*arguments: object) -> dict:
    """`measured` in a process of its own, whose memory is nothing else's."""
    # Not by fork: this process has its own torch, with what that has allocated.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measured, arguments)


def measured(name: str, kind: str, batch: int, steps: int) -> dict:
    """The fewest CPU seconds of a training step and the most memory that the process had."""
    torch.manual_seed(0)
    imported = peak_bytes()
    chosen = replace(recipe.load(name), batch_size=batch, prune=kind == "pruned")
    train, test, classes, channels, size = SETS[chosen.dataset]
    splits = DataSplits(
        train=range(chosen.train_subset or train),  # of which the network asks for the number only
        test=range(test),
        num_classes=classes,
        in_channels=channels,
        image_size=size,
        mean=(),
        std=(),
        name=chosen.dataset,
    )
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        network = build_network(chosen, splits, device)
        step = TrainStep(Session(chosen, network, Path(folder), device, Ranks()))
        images, labels = torch.randn(batch, channels, size, size), torch.randint(classes, (batch,))
        seconds = []
        for _ in range(1 + steps):
            # The process's own time, not the clock's, and below the least of all: the machine may
            # have others to serve, who take its caches too.
            start = time.process_time()
            step(images, labels)
            seconds.append(time.process_time() - start)
    return {
        "cpu_seconds": min(seconds[1:]),
        "peak_bytes": peak_bytes(),
        "imported_bytes": imported,
    }


def peak_bytes() -> int | None:
    """The most memory that this process has had; None where the system does not say."""
    # Not getrusage's, in which Linux counts the process that this one was started from.
    status = Path("/proc", str(os.getpid()), "status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return None if found is None else 1024 * int(found[1])


if __name__ == "__main__":
    main()
