"""Accuracy and loss on the test images, and whether compaction changed the network's outputs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from layerprune.compaction import verify
from layerprune.cost import Inputs, evaluating
from layerprune.training.builders import Builder
from layerprune.training.checkpoint import gated_model, load_model
from layerprune.training.data import DataSplits
from layerprune.training.sampling import test_loader

BATCH = 256
"""Images a forward; fixed, since it can change the last bit of a result."""


@torch.no_grad()
def evaluate(
    model: nn.Module, splits: DataSplits, device: torch.device, workers: int = 0
) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (a fraction) over all test images, in evaluation mode."""
    loss, correct = 0.0, 0
    with evaluating(model):
        for images, labels in test_loader(splits, BATCH, workers):
            images, labels = images.to(device), labels.to(device)
            outputs = model(images)
            loss += float(F.cross_entropy(outputs, labels, reduction="sum"))
            correct += int((outputs.argmax(1) == labels).sum())
    return loss / len(splits.test), correct / len(splits.test)


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
