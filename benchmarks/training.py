"""The study of what pruning while training saves, and against what.

    python benchmarks/training.py small --data-dir FOLDER    # on a CPU, a run on each core
    python benchmarks/training.py full --data-dir FOLDER     # on a GPU
    python benchmarks/training.py small --tasks digits-resnet32 --methods dense ours --seeds 7

A study is a grid of tasks (images and a network), methods and seeds, read from
benchmarks/study/NAME.yaml or a file of one's own. Cells are trained side by side, one in a process,
and each leaves a JSON file in --work; a study that was stopped, or given more seeds, goes on with
what is missing. Together they make --output, from which `benchmarks/tables.py` and
`benchmarks/plots.py` make what docs/performance.md shows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from machine import facts, write_result
from study import grid
from study.execution import Job, collected, run_all
from study.trial import load_images


def main() -> None:
    options = arguments()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    processes = options.jobs or (1 if device.startswith("cuda") else os.cpu_count() or 1)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    replaced = dict(map(replacement, options.dataset))
    try:
        study = grid.load(
            options.study,
            tasks=options.tasks,
            methods=options.methods,
            seeds=options.seeds,
            datasets=replaced,
        )
        work = options.work or Path("runs", "+".join([f"study-{study.name}", *options.dataset]))
        work.mkdir(parents=True, exist_ok=True)
        threads = torch.get_num_threads()
        job = Job(study, options.data_dir, work, device, threads, facts(device))
        for task in study.tasks.values():  # what cannot be read is better told now
            load_images(task.recipe, options.data_dir, task.held_out)
        check_output(options.output, sum(1 for _ in study.cells()))
    except ValueError as error:
        sys.exit(f"training.py: {error}")
    failed = run_all(job, processes, lambda line: print(line, flush=True))
    if options.output is not None:
        write_result(options.output, collected(job))
    if failed:
        sys.exit(f"{len(failed)} cells have no result; the same command runs them again")


def check_output(path: Path | None, cells: int) -> None:
    """Refuses to put the results of a part of a study in the place of those of more of it."""
    if path is not None and path.is_file():
        there = len(json.loads(path.read_text()).get("rows", ()))
        if there > cells:
            raise grid.StudyError(
                f"{path} holds {there} runs, and these are {cells}: choose another --output"
            )


def replacement(pair: str) -> tuple[str, str]:
    old, equals, new = pair.partition("=")
    if not equals:
        raise grid.StudyError(f"--dataset takes OLD=NEW, as in fashion-mnist=mnist; got {pair!r}")
    return old, new


def at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"at least 1, got {number}")
    return number


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", help="small, defaults, full, cifar10, imagenet, or a YAML file")
    parser.add_argument("--data-dir", help="the folder that holds the data set")
    parser.add_argument("--tasks", nargs="+", help="these of the study's tasks only")
    parser.add_argument("--methods", nargs="+", help="these methods only, and what they need")
    parser.add_argument("--seeds", type=int, nargs="+", help="in place of the study's")
    parser.add_argument(
        "--dataset",
        nargs="+",
        default=[],
        metavar="OLD=NEW",
        help="train on another data set, as in fashion-mnist=mnist",
    )
    parser.add_argument("--device", help="where to train; a GPU where there is one")
    parser.add_argument(
        "--jobs", type=at_least_one, help="runs at a time; on a CPU one for each core"
    )
    parser.add_argument(
        "--work", type=Path, help="where cells' results go; without it runs/study-NAME"
    )
    parser.add_argument("--output", type=Path, help="JSON file of all results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
