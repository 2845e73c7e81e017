"""The demonstration: one recipe trained twice with one seed, dense and pruned, side by side."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layerprune.training import data
from layerprune.training.assembly import build_network, pick_device
from layerprune.training.engine import train
from layerprune.training.recipe import Recipe, RecipeError
from layerprune.training.records import write_atomic
from layerprune.training.report import write_report
from layerprune.training.report_html import amount, duration
from layerprune.training.runfolder import RunFolderError, holds_run

__all__ = ["Comparison", "run"]

PARTS = ("dense", "pruned")


@dataclass(frozen=True)
class Comparison:
    """What came out.

    Attributes:
        summary: the content of the demonstration's ``summary.json``.
        table: both runs, in plain text.
        report: path of the pruned run's report, which has the dense one beside it.
    """

    summary: dict[str, Any]
    table: str
    report: Path


def run(
    recipe: Recipe,
    data_dir: str | os.PathLike[str] | None,
    output: str | os.PathLike[str],
    *,
    device: str | None = None,
    progress: bool = True,
) -> Comparison:
    """Trains ``output/dense`` and ``output/pruned``; an older demonstration there is replaced.

    Raises:
        RecipeError: the recipe does not prune.
        RunFolderError: one of the two folders holds something that is no run.
        And what `layerprune.training.train` raises.
    """
    if not recipe.prune:
        raise RecipeError(f"recipe {recipe.name} does not prune (prune: false): take another one")
    folder = Path(output)
    folders = [folder / part for part in PARTS]
    for part in folders:
        if part.exists() and not holds_run(part) and not _is_empty(part):
            raise RunFolderError(
                f"{part} holds something that is no run: move it, or choose another --output"
            )
    # What can be refused is refused before an older demonstration goes.
    splits = data.load(
        recipe.dataset, data_dir, train_subset=recipe.train_subset, augment=recipe.augment
    )
    build_network(recipe, splits, pick_device(device))
    for part in folders:
        shutil.rmtree(part, ignore_errors=True)
    (folder / "summary.json").unlink(missing_ok=True)
    results = []
    for part, prune in zip(folders, (False, True), strict=True):
        if progress:
            print(
                f"{part.name}: {recipe.model} on {recipe.dataset}, {recipe.epochs} epochs",
                flush=True,
            )
        chosen = replace(recipe, prune=prune)
        results.append(train(chosen, data_dir, part, device=device, progress=progress))
    dense, pruned = results
    summary = {
        "dense_accuracy": dense["accuracy"],
        "accuracy": pruned["accuracy"],
        "sections_total": pruned["sections_total"],
        "sections_kept": pruned["sections_kept"],
        "train_flops_fraction": pruned["train_flops_fraction"],
        "train_time_fraction": pruned["train_seconds"] / dense["train_seconds"],
        "inference_flops_fraction": pruned["inference_flops_fraction"],
        "verify_max_abs_difference": pruned["verify_max_abs_difference"],
        "seed": recipe.seed,
    }
    write_atomic(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    report = write_report(folders[1], folders[0])
    return Comparison(summary, comparison_table(dense, pruned), report)


def comparison_table(dense: Mapping[str, Any], pruned: Mapping[str, Any]) -> str:
    """A table of two runs' summaries, in plain text."""
    quantities = (
        ("accuracy", "accuracy", lambda value: f"{100 * value:.2f} %"),
        ("sections", "sections_kept", str),
        ("parameters", "parameters", amount),
        ("inference FLOPs", "inference_flops", amount),
        ("training FLOPs", "train_flops", amount),
        ("training time", "train_seconds", duration),
    )
    rows = [("", *PARTS, "ratio")]
    for words, key, shown in quantities:
        before, after = dense[key], pruned[key]
        ratio = "" if key == "accuracy" else f"{after / before:.2f}"
        rows.append((words, shown(before), shown(after), ratio))
    rows[1] = (*rows[1][:3], f"{100 * (pruned['accuracy'] - dense['accuracy']):+.2f} points")
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())
