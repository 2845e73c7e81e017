"""The processes of a run: how they come together, and what they do by turns."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed as dist
from torch import nn

from layerprune.ranks import Ranks
from layerprune.training.interrupt import Interrupted
from layerprune.training.recipe import Recipe, RecipeError

__all__ = ["check_divides", "equalize_buffers", "joined"]


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Joins the process group that torchrun started this process for, if it did.

    A group that is there already is used as it is.

    Args:
        device: where this process trains; NCCL connects GPUs, gloo all else.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield
    except Interrupted:  # by all ranks together
        dist.destroy_process_group()
        raise
    # Not after an error of this rank's own: others may wait for it in a collective.
    dist.destroy_process_group()


def check_divides(recipe: Recipe, ranks: Ranks) -> None:
    """Refuses a batch that the ranks cannot share equally.

    Raises:
        RecipeError: it has no equal parts, or too small ones.
    """
    rows, rest = divmod(recipe.batch_size, ranks.count)
    if rest:
        raise RecipeError(
            f"batch_size {recipe.batch_size} is that of all {ranks.count} ranks and has to be a "
            "multiple of their number"
        )
    if recipe.prune and rows < recipe.pruning().min_rows:
        raise RecipeError(
            f"batch_size {recipe.batch_size} gives each of the {ranks.count} ranks {rows} images, "
            f"less than min_rows ({recipe.pruning().min_rows}): choose a larger one"
        )


def equalize_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Gives all ranks rank 0's buffers: each has normalised its own part of the batches."""
    if ranks.count > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
