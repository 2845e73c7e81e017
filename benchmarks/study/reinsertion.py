"""Whether eliminated sections would pay: each is put back, trained for a while, and measured.

So are the kept ones, each taken out and put back with fresh weights: how many of them come to pay
again says how much the question can tell.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from layerprune.compaction import branch_keys
from layerprune.sections import find_sections
from layerprune.training.images import FileImages, PixelImages
from study.methods import Setup
from study.optimality import section_differences
from study.trial import plain_network, run, train

SHARE = 0.2
"""Of the recipe's epochs for which the network trains with a section put back."""
RATE = 0.2
"""Of the recipe's learning rate to begin with; it falls with the cosine."""


def reinserted(setup: Setup, held_out: PixelImages | FileImages) -> dict[str, Any]:
    """Trains as `ours` does, and again with each section in turn put in with fresh weights.

    Returns:
        The result of the first training, and under ``reinserted`` for each section the difference,
        its standard error, its penalty, and whether it had been kept: it pays if the difference is
        below minus the penalty.
    """
    result, trained = run("ours", setup, held_out)
    found = {}
    for name, penalty in result["penalties"].items():
        was_kept = name in result["kept"]
        difference, error = _put_in(setup, trained, {*result["kept"], name}, name, held_out)
        found[name] = {
            "difference": difference,
            "error": error,
            "penalty": penalty,
            "kept": was_kept,
        }
    return result | {"reinserted": found}


def _put_in(
    setup: Setup, trained: nn.Module, kept: set[str], name: str, held_out: PixelImages | FileImages
) -> list[float]:
    """What a section is worth after it was put into a trained network with fresh weights."""
    epochs = math.ceil(SHARE * setup.recipe.epochs)
    recipe = replace(
        setup.recipe,
        epochs=epochs,
        lr=RATE * setup.recipe.lr,
        sched="cosine",
        warmup_epochs=0,
        prune=False,
    )
    torch.manual_seed(recipe.seed + 1)
    network, example = plain_network(recipe, setup.splits, setup.device, kept)
    model = network.model
    section = next(s for s in find_sections(model, example) if s.name == name)
    fresh = branch_keys(model, [section])
    state = {key: value for key, value in trained.state_dict().items() if key not in fresh}
    model.load_state_dict(state | {key: model.state_dict()[key] for key in fresh})
    train(recipe, network, setup.splits, setup.device, first_epoch=setup.recipe.epochs)
    _, differences = section_differences(model, example, held_out, setup.device)
    return differences[name]
