"""One run of one method: trained, compacted, measured."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from layerprune.cost import forward_flops
from layerprune.ledger import BACKWARD
from layerprune.ranks import Ranks
from layerprune.training import data
from layerprune.training.data import DataSplits
from layerprune.training.evaluation import evaluate
from layerprune.training.images import FileImages, PixelImages
from layerprune.training.recipe import Recipe
from layerprune.training.sampling import train_loader
from layerprune.training.session import Session
from layerprune.training.step import TrainStep
from study.latency import inference_seconds
from study.methods import METHODS, Method, Setup
from study.optimality import section_differences

Held = PixelImages | FileImages


def load_images(recipe: Recipe, data_dir: str | None, held_out: int) -> tuple[DataSplits, Held]:
    """A recipe's images, and as many training images as are held out from it.

    They are the last ones in the order of `data.load`: both parts have every class's share.
    """
    whole = data.load(recipe.dataset, data_dir, augment=recipe.augment)
    count = held_out + (recipe.train_subset or len(whole.train) - held_out)
    splits = data.load(recipe.dataset, data_dir, train_subset=count, augment=recipe.augment)
    trained, held = (copy.copy(splits.train) for _ in range(2))
    held.augmentation = None
    for part, chosen in ((trained, slice(count - held_out)), (held, slice(count - held_out, None))):
        for name in ("chosen",) if isinstance(part, FileImages) else ("pixels", "labels"):
            setattr(part, name, getattr(part, name)[chosen])
    return replace(splits, train=trained), held


def run(method: str, setup: Setup, held_out: Held) -> tuple[dict[str, Any], nn.Module]:
    """Trains by a method.

    Returns:
        What `benchmarks/training.py` writes of it, and the trained plain network.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    trained = METHODS[method](setup)
    recipe, model = trained.recipe, trained.network.model
    seconds = _train(trained, setup)
    kept = trained.finish()
    test_loss, accuracy = evaluate(model, setup.splits, setup.device)
    steps = setup.recipe.epochs * trained.network.steps_per_epoch
    dense = (1 + BACKWARD) * steps * recipe.step_rows * trained.dense_flops
    result = {
        "accuracy": accuracy,
        "test_loss": test_loss,
        "sections": trained.dense_sections,
        "sections_kept": len(kept),
        "kept": kept,
        "epochs": recipe.epochs,
        "train_flops": trained.train_flops / dense,
        "test_flops": trained.test_flops / dense,
        "inference_flops": forward_flops(model, trained.example)[""] / trained.dense_flops,
        "train_seconds": seconds,
        "inference_seconds": inference_seconds(model, setup.splits, setup.device),
        "differences": section_differences(model, trained.example, held_out, setup.device),
    }
    return result | trained.report(), model


def _train(method: Method, setup: Setup) -> float:
    """Trains to the last epoch's end; returns the seconds that the steps took, images included."""
    recipe, network, device = method.recipe, method.network, setup.device
    session = Session(recipe, network, Path(), device, Ranks())
    step = TrainStep(session)
    total = recipe.epochs * network.steps_per_epoch
    network.model.train()
    done, start = 0, time.perf_counter()
    for epoch in range(recipe.epochs):
        loader = train_loader(
            setup.splits,
            recipe.step_rows,
            seed=recipe.seed,
            epoch=epoch,
            workers=recipe.workers,
            drop_last=True,
            pin_memory=device.type == "cuda",
        )
        for images, labels in loader:
            method.before_step(len(images))
            outcome = step(images, labels)
            done += 1
            method.after_step(done / total)
        if not math.isfinite(float(outcome.loss)):
            raise FloatingPointError(f"the loss is {float(outcome.loss)} after epoch {epoch + 1}")
    return time.perf_counter() - start
