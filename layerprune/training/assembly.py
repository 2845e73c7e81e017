"""What a run is made of: device, network, pruner, optimizer and schedule, as a recipe says."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from layerprune import models
from layerprune.compaction import eliminate_sections
from layerprune.pruner import LayerPruner
from layerprune.training.checkpoint import example_inputs
from layerprune.training.data import DataSplits
from layerprune.training.recipe import Recipe, RecipeError

__all__ = [
    "Network",
    "build_network",
    "learning_rate_factor",
    "make_optimizer",
    "make_scaler",
    "make_schedule",
    "pick_device",
    "precision",
]


@dataclass(frozen=True)
class Network:
    """A network to train.

    Attributes:
        model: on its device.
        pruner: None for a dense run.
        ema: the average of the weights, if the recipe keeps one.
        builder: name and kwargs for `layerprune.models.build`.
        steps_per_epoch: a smaller last batch is left out.
        total_steps: of the run.
    """

    model: nn.Module
    pruner: LayerPruner | None
    ema: AveragedModel | None
    builder: dict[str, Any]
    steps_per_epoch: int
    total_steps: int


def pick_device(name: str | None) -> torch.device:
    """The device of this name; without one a GPU, or the CPU where there is none.

    The GPU is the first one, or that of this process where torchrun started several.

    Raises:
        RecipeError: no such device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).partition("\n")[0]
        raise RecipeError(f"device {name!r} cannot be used: {first}") from error
    return device


def build_network(
    recipe: Recipe, splits: DataSplits, device: torch.device, ranks: int = 1
) -> Network:
    """Builds the dense network for a data set, with a pruner on it if the recipe prunes.

    Weights come from torch's default generator: seed it first.

    Args:
        recipe: what to build, and how it is going to be trained.
        splits: the data set.
        device: where.
        ranks: that share a batch.

    Raises:
        RecipeError: the model, the pruner or the number of steps does not go with the data.
    """
    steps = len(splits.train) // recipe.step_rows
    if steps == 0:
        times = f" times {recipe.grad_accum_steps}" if recipe.grad_accum_steps > 1 else ""
        raise RecipeError(
            f"batch_size {recipe.batch_size}{times} is more than the {len(splits.train)} training "
            "images: choose a smaller one"
        )
    kwargs = dict(recipe.model_args) | {
        "num_classes": splits.num_classes,
        "in_channels": splits.in_channels,
        "image_size": splits.image_size,
    }
    example = example_inputs(kwargs)
    total = steps * recipe.epochs
    try:
        model = models.build(recipe.model, **kwargs)
        if recipe.without:
            eliminate_sections(model, recipe.without, example)
        layout = torch.channels_last if recipe.channels_last else torch.preserve_format
        model.to(device=device, memory_format=layout)
        ema = pruner = None
        if recipe.model_ema:
            average = get_ema_multi_avg_fn(recipe.model_ema_decay)
            ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        if recipe.prune:
            if recipe.cost == "latency":
                # As each rank trains.
                example = example.new_zeros(recipe.batch_size // ranks, *example.shape[1:])
            with precision(recipe, device):
                pruner = LayerPruner(
                    model,
                    example_inputs=example,
                    total_steps=total,
                    strength=recipe.strength,
                    cost=recipe.cost,
                    config=recipe.pruning(),
                    seed=recipe.seed,
                    ema=ema,
                )
    except (RuntimeError, TypeError, ValueError) as error:  # also where memory does not suffice
        raise RecipeError(f"recipe {recipe.name}: {error}") from error
    return Network(model, pruner, ema, {"name": recipe.model, "kwargs": kwargs}, steps, total)


def make_optimizer(recipe: Recipe, model: nn.Module) -> Optimizer:
    """The recipe's optimizer over all parameters of a model, one group."""
    common = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    if recipe.opt == "sgd":
        return torch.optim.SGD(
            model.parameters(), momentum=recipe.momentum, nesterov=recipe.nesterov, **common
        )
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return kinds[recipe.opt](model.parameters(), **common)


def learning_rate_factor(recipe: Recipe, steps_per_epoch: int) -> Callable[[int], float]:
    """The factor on the learning rate as a function of the step, from 0."""
    warm = round(recipe.warmup_epochs * steps_per_epoch)
    total = recipe.epochs * steps_per_epoch

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        if recipe.sched == "cosine":
            return (1 + math.cos(math.pi * (step - warm) / max(1, total - warm))) / 2
        if recipe.sched == "multistep":
            passed = sum(step >= epoch * steps_per_epoch for epoch in recipe.decay_milestones)
            return recipe.decay_rate**passed
        return 1.0

    return factor


def make_schedule(recipe: Recipe, optimizer: Optimizer, steps_per_epoch: int) -> LambdaLR:
    """The recipe's learning rate; step it after every step of the optimizer."""
    return LambdaLR(optimizer, learning_rate_factor(recipe, steps_per_epoch))


def make_scaler(recipe: Recipe, device: torch.device) -> torch.amp.GradScaler:
    """The gradients' scaler; it does nothing but where forwards run in float16."""
    return torch.amp.GradScaler(device.type, enabled=recipe.amp and recipe.amp_dtype == "float16")


def precision(recipe: Recipe, device: torch.device) -> torch.autocast:
    """The context of training's forwards and losses; evaluation is in float32, as `eval` is."""
    dtype = getattr(torch, recipe.amp_dtype)
    return torch.autocast(device.type, dtype=dtype, enabled=recipe.amp)
