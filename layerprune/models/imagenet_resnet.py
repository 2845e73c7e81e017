"""torchvision's ResNets for images of ImageNet's size (He et al. 2015, table 1)."""

from __future__ import annotations

from torch import nn

from layerprune.models._checks import check_at_least
from layerprune.models.torchvision_resnet import torchvision_resnet

__all__ = ["imagenet_resnet"]


def imagenet_resnet(
    depth: int, num_classes: int = 1000, in_channels: int = 3, image_size: int = 224
) -> nn.Module:
    """Build torchvision's ResNet of a depth, with fresh weights.

    Args:
        depth: 18, 34, 50, 101 or 152.
        num_classes: Logits per image.
        in_channels: Channels of an image; its first convolution takes 3.
        image_size: Height and width in pixels.

    Returns:
        The network, float32 ``[B, 3, image_size, image_size]`` to ``[B, num_classes]``, of
        torchvision's own classes.

    Raises:
        ValueError: An argument is out of its range.
        ModuleNotFoundError: torchvision is not installed.
    """
    name = f"resnet{depth}"
    check_at_least(name, image_size=(image_size, 32))
    if in_channels != 3:
        raise ValueError(f"{name} takes images of 3 channels, got in_channels {in_channels}")
    return torchvision_resnet(name, num_classes=num_classes)
