"""What each section of a trained network is worth, on images that it was not trained on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerprune.calls import evaluating
from layerprune.sections import find_sections
from layerprune.training.evaluation import BATCH
from layerprune.training.images import FileImages, PixelImages
from study.gating import attach_gates, detach_gates


@torch.no_grad()
def section_differences(
    model: nn.Module,
    example: Tensor,
    images: PixelImages | FileImages,
    device: torch.device,
) -> tuple[float, dict[str, list[float]]]:
    """The mean loss with a section on minus that with it off, in evaluation mode, for each section.

    Args:
        model: a plain network.
        example: what it is called with.
        images: those to compute the loss of.
        device: where the network is.

    Returns:
        The mean loss with all sections, and by each section's name the difference and its standard
        error over images.
    """
    sections = find_sections(model, example)
    gates = attach_gates(sections)
    try:
        with evaluating(model):
            on = _losses(model, images, device)
            found = {}
            for section, gate in zip(sections, gates, strict=True):
                gate.is_open = False
                difference = on - _losses(model, images, device)
                gate.is_open = True
                error = float(difference.std()) / len(difference) ** 0.5
                found[section.name] = [float(difference.mean()), error]
    finally:
        detach_gates(sections)
    return float(on.mean()), found


def _losses(model: nn.Module, images: PixelImages | FileImages, device: torch.device) -> Tensor:
    """The cross-entropy of every image, float64 ``[N]``."""
    losses = []
    for start in range(0, len(images), BATCH):
        batch, labels = images.batch(range(start, min(start + BATCH, len(images))))
        outputs = model(batch.to(device))
        losses.append(F.cross_entropy(outputs, labels.to(device), reduction="none").double().cpu())
    return torch.cat(losses)
