"""The end of a run: the compacted network, its check, the summary and the report."""

from __future__ import annotations

import platform
from typing import Any

import torch

from layerprune import models
from layerprune._version import __version__
from layerprune.cost import forward_flops
from layerprune.ledger import BACKWARD, Ledger
from layerprune.sections import find_sections
from layerprune.training import checkpoint
from layerprune.training.checkpoint import absent, example_inputs
from layerprune.training.data import DataSplits
from layerprune.training.evaluation import compaction_difference, test_images
from layerprune.training.records import fates, read_run
from layerprune.training.report import write_report
from layerprune.training.runfolder import FINAL, RunFolderError
from layerprune.training.runlog import RunLog
from layerprune.training.session import Session

__all__ = ["finish", "versions"]


def versions() -> dict[str, str]:
    """Versions of what a run depends on."""
    return {
        "layerprune": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def finish(session: Session, splits: DataSplits, log: RunLog) -> dict[str, Any]:
    """Compacts the trained network, writes it to ``model/``, checks it, and sums the run up.

    Returns:
        The content of ``summary.json``.
    """
    structure = session.structure()
    structure["eliminated"] = absent(structure)
    if session.pruner is not None:
        session.pruner.strip()
    folder = session.folder / FINAL
    checkpoint.save(folder, session.model.state_dict(), structure)
    difference = None
    if session.pruner is not None:
        # What is checked is what was written.
        images = test_images(splits, session.recipe.workers)
        difference = compaction_difference(folder, images, session.device)
    summary = _summary(session, structure) | {"verify_max_abs_difference": difference}
    log.write_summary(summary | {"finished": True})
    write_report(session.folder)
    return summary | {"finished": True}


def _summary(session: Session, structure: dict[str, Any]) -> dict[str, Any]:
    recipe, network = session.recipe, session.network
    record = read_run(session.folder)
    if not record.epochs:
        raise RunFolderError(f"{session.folder / 'summary.csv'} has lost its rows: train anew")
    last = record.epochs[-1]
    example = example_inputs(network.builder["kwargs"])
    with torch.random.fork_rng(devices=[]):
        dense = models.build(network.builder["name"], **network.builder["kwargs"])
    dense_flops, flops = forward_flops(dense, example), forward_flops(session.model, example)[""]
    thetas = {part["name"]: part["theta"] for part in structure["sections"]}
    architecture = [
        {
            "name": section.name,
            "kind": section.kind,
            "kept": section.name not in structure["eliminated"],
            "params": sum(p.numel() for p in section.branch_parameters()),
            "flops": section.branch_flops(dense_flops),
            "theta": thetas.get(section.name),
        }
        for section in find_sections(dense, example)
    ]
    if session.pruner is not None:
        ledger, schedule = session.pruner.ledger, session.pruner.schedule
        phases = {"warm_up_end": schedule.warm_up_end, "learning_end": schedule.learning_end}
    else:
        images = (1 + BACKWARD) * recipe.batch_size * network.total_steps
        ledger, phases = Ledger(images * flops, images * dense_flops[""]), {}
    outcomes = fates(record)
    removed = [fate.step for fate in outcomes if fate.step is not None]
    return {
        "name": recipe.name,
        "dataset": recipe.dataset,
        "model": recipe.model,
        "seed": recipe.seed,
        "epochs": recipe.epochs,
        "accuracy": last["test_accuracy"],
        "test_loss": last["test_loss"],
        "sections_total": len(architecture),
        "sections_kept": sum(part["kept"] for part in architecture),
        "parameters": sum(p.numel() for p in session.model.parameters()),
        "parameters_dense": sum(p.numel() for p in dense.parameters()),
        "train_flops": ledger.train_flops,
        "dense_train_flops": ledger.dense_train_flops,
        "train_flops_fraction": ledger.fraction,
        "test_flops_fraction": ledger.test_fraction,
        "inference_flops": flops,
        "inference_flops_fraction": flops / dense_flops[""],
        "train_seconds": session.place.train_seconds,
        "seconds": session.seconds(),
        "overhead": {
            "draw_seconds": ledger.draw_seconds,
            "step_seconds": ledger.step_seconds,
            "test_seconds": ledger.test_seconds,
        },
        "decided_by_test": sum(fate.kind.endswith("by test") for fate in outcomes),
        "decided_by_rounding": sum(fate.kind.endswith("by rounding") for fate in outcomes),
        "first_elimination_fraction": (min(removed) / network.total_steps if removed else None),
        "phases": phases | {"total_steps": network.total_steps},
        "architecture": architecture,
        "versions": versions(),
    }
