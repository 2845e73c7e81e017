"""One run of one method: trained, compacted, measured."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerprune.compaction import eliminate_sections
from layerprune.cost import forward_flops
from layerprune.ledger import BACKWARD
from layerprune.ranks import Ranks
from layerprune.sections import find_sections
from layerprune.training import data
from layerprune.training.assembly import Network, build_network
from layerprune.training.checkpoint import example_inputs
from layerprune.training.data import DataSplits
from layerprune.training.evaluation import evaluate
from layerprune.training.images import FileImages, PixelImages
from layerprune.training.recipe import Recipe
from layerprune.training.sampling import train_loader
from layerprune.training.session import Session
from layerprune.training.step import TrainStep
from study.methods import METHODS, Setup
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
    recipe, model, device = trained.recipe, trained.network.model, setup.device
    seconds = train(
        recipe, trained.network, setup.splits, device, trained.before_step, trained.after_step
    )
    kept = trained.finish()
    test_loss, accuracy = evaluate(model, setup.splits, device)
    steps = setup.recipe.epochs * trained.network.steps_per_epoch
    dense = (1 + BACKWARD) * steps * recipe.step_rows * trained.dense_flops
    held_out_loss, differences = section_differences(model, trained.example, held_out, device)
    result = {
        "accuracy": accuracy,
        "test_loss": test_loss,
        "held_out_loss": held_out_loss,
        "sections": trained.dense_sections,
        "sections_kept": len(kept),
        "kept": kept,
        "epochs": recipe.epochs,
        "train_flops": trained.train_flops / dense,
        "test_flops": trained.test_flops / dense,
        "inference_flops": forward_flops(model, trained.example)[""] / trained.dense_flops,
        "train_seconds": seconds,
        "differences": differences,
    }
    return result | trained.report(), model


def train(
    recipe: Recipe,
    network: Network,
    splits: DataSplits,
    device: torch.device,
    before_step: Callable[[int], None] = lambda rows: None,
    after_step: Callable[[float], None] = lambda progress: None,
    first_epoch: int = 0,
) -> float:
    """Trains for the recipe's epochs by the product's own step.

    Args:
        recipe: the settings.
        network: what is trained.
        splits: the images.
        device: where the network is.
        before_step: called with a batch's rows.
        after_step: called with the share of training done.
        first_epoch: number of the first epoch, which decides the order of the images.

    Returns:
        The seconds that the steps took, images included.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    step = TrainStep(Session(recipe, network, Path(), device, Ranks()))
    total = recipe.epochs * network.steps_per_epoch
    network.model.train()
    done, start = 0, time.perf_counter()
    for epoch in range(recipe.epochs):
        loader = train_loader(
            splits,
            recipe.step_rows,
            seed=recipe.seed,
            epoch=first_epoch + epoch,
            workers=recipe.workers,
            drop_last=True,
            pin_memory=device.type == "cuda",
        )
        for images, labels in loader:
            before_step(len(images))
            outcome = step(images, labels)
            done += 1
            after_step(done / total)
        if not math.isfinite(float(outcome.loss)):
            raise FloatingPointError(f"the loss is {float(outcome.loss)} after epoch {epoch + 1}")
    return time.perf_counter() - start


def plain_network(
    recipe: Recipe, splits: DataSplits, device: torch.device, kept: Collection[str]
) -> tuple[Network, Tensor]:
    """A network for a recipe with fresh weights and these sections; and what it is called with."""
    network = build_network(replace(recipe, prune=False), splits, device)
    example = example_inputs(network.builder["kwargs"])
    names = [section.name for section in find_sections(network.model, example)]
    eliminate_sections(network.model, [name for name in names if name not in kept], example)
    return network, example
