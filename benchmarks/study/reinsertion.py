"""Whether eliminated sections would pay: each is put back, trained for a while, and measured."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from layerprune.compaction import eliminate_sections
from layerprune.training.assembly import build_network, make_optimizer
from layerprune.training.checkpoint import example_inputs
from layerprune.training.images import FileImages, PixelImages
from layerprune.training.sampling import train_loader
from study.methods import Setup
from study.optimality import section_differences
from study.trial import run

SHARE = 0.2
"""Of the recipe's epochs for which the network trains with a section put back."""
RATE = 0.2
"""Of the recipe's learning rate to begin with; it falls with the cosine."""


def reinserted(setup: Setup, held_out: PixelImages | FileImages) -> dict[str, Any]:
    """Trains as `ours` does, and again with each eliminated section put back with fresh weights.

    Returns:
        The result of the first training, and under ``reinserted`` for each section that it
        eliminated the difference, its standard error, and its penalty: it would pay if the
        difference were below minus the penalty.
    """
    result, trained = run("ours", setup, held_out)
    epochs = math.ceil(SHARE * setup.recipe.epochs)
    found = {}
    for name, penalty in result["penalties"].items():
        if name in result["kept"]:
            continue
        gone = [n for n in result["penalties"] if n != name and n not in result["kept"]]
        model, example = _with_one_more(setup, trained, gone)
        _train(setup, model, epochs)
        difference, error = section_differences(model, example, held_out, setup.device)[name]
        found[name] = {"difference": difference, "error": error, "penalty": penalty}
    return result | {"reinserted": found, "reinserted_epochs": epochs}


def _with_one_more(
    setup: Setup, trained: nn.Module, gone: list[str]
) -> tuple[nn.Module, torch.Tensor]:
    """The trained network and one section that it lacks; and what it is called with."""
    torch.manual_seed(setup.recipe.seed + 1)
    network = build_network(replace(setup.recipe, prune=False), setup.splits, setup.device)
    example = example_inputs(network.builder["kwargs"])
    model = eliminate_sections(network.model, gone, example)
    model.load_state_dict(trained.state_dict(), strict=False)
    return model, example


def _train(setup: Setup, model: nn.Module, epochs: int) -> None:
    recipe = replace(setup.recipe, lr=RATE * setup.recipe.lr)
    optimizer = make_optimizer(recipe, model)
    steps = epochs * (len(setup.splits.train) // recipe.step_rows)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.smoothing)
    model.train()
    for epoch in range(recipe.epochs, recipe.epochs + epochs):  # orders that are new
        for images, labels in train_loader(
            setup.splits, recipe.step_rows, seed=recipe.seed, epoch=epoch, drop_last=True
        ):
            loss = criterion(model(images.to(setup.device)), labels.to(setup.device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
