"""Accuracy and loss on the test images, and whether compaction changed the network's outputs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from layerprune.calls import Inputs, evaluating
from layerprune.compaction import verify
from layerprune.ranks import Ranks
from layerprune.training.builders import Builder
from layerprune.training.checkpoint import gated_model, load_model
from layerprune.training.data import DataSplits
from layerprune.training.group import equalize_buffers
from layerprune.training.sampling import test_loader

BATCH = 256
"""Images a forward; fixed, since it can change the last bit of a result."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    splits: DataSplits,
    device: torch.device,
    workers: int = 0,
    ranks: Ranks | None = None,
) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (a fraction) over all test images, in evaluation mode.

    With several ranks, which call it together, each takes its share of the batches, with rank 0's
    buffers; what comes out is what one rank would find.
    """
    ranks = ranks or Ranks()
    equalize_buffers(model, ranks)
    # By batch, and added up in their order: sums do not depend on who took which.
    losses = torch.zeros(-(-len(splits.test) // BATCH), dtype=torch.float64)
    correct = torch.zeros_like(losses)
    with evaluating(model):
        pinned = device.type == "cuda"
        loader = test_loader(splits, BATCH, workers, pinned, start=ranks.rank, every=ranks.count)
        for place, (images, labels) in enumerate(loader):
            batch = ranks.rank + place * ranks.count
            images = images.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            outputs = model(images)
            losses[batch] = F.cross_entropy(outputs, labels, reduction="sum")
            correct[batch] = (outputs.argmax(1) == labels).sum()
    loss, right = (sum(ranks.gather(found).sum(0).tolist()) for found in (losses, correct))
    return loss / len(splits.test), right / len(splits.test)


def compaction_difference(
    path: str | os.PathLike[str],
    batches: Iterable[Inputs],
    device: torch.device,
    builder: Builder | None = None,
) -> float:
    """Largest difference between a checkpoint's compacted network and the gated one.

    Both are built anew from the files; the gated one is dense, with the gates of the sections that
    evaluation does not run closed. Compared in evaluation mode; 0.0 is equality bit for bit.

    Args:
        path: as in `checkpoint.load_model`.
        batches: inputs to compare on.
        device: where to.
        builder: as in `checkpoint.load_model`.
    """
    compacted, _ = load_model(path, builder)
    gated = gated_model(path, builder)

    def moved(inputs: Inputs) -> Inputs:
        return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, inputs)

    return verify(gated.to(device), compacted.to(device), map(moved, batches))


def test_images(splits: DataSplits, workers: int = 0) -> Iterator[Tensor]:
    """The test images, batch by batch."""
    return (images for images, _ in test_loader(splits, BATCH, workers))
