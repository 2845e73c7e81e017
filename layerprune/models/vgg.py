"""VGG-16 with batch normalisation for small images, with linear residual connections.

Simonyan & Zisserman, "Very deep convolutional networks for large-scale image recognition" (2015),
configuration D, in the form used for CIFAR: batch normalisation after each convolution, and one
linear classifier on globally averaged features in place of three large layers.

Each convolution with its normalisation and ReLU is the branch of a section. The shortcut is linear:
the identity where the number of channels stays, else a 1x1 convolution without bias. Nothing is
applied to the sum, so a section without its branch is the identity or linear; the pooling between
the stages stays.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from layerprune.models._checks import check_at_least
from layerprune.sections import GatedResidual

__all__ = ["vgg16"]

# (channels, convolutions) of each stage; a 2x2 max-pooling follows each.
_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


def _section(in_channels: int, out_channels: int) -> GatedResidual:
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    branch = nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())
    if in_channels == out_channels:
        return GatedResidual(branch)
    projection = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    nn.init.kaiming_normal_(projection.weight, nonlinearity="linear")  # keeps the variance
    return GatedResidual(branch, projection)


def vgg16(num_classes: int = 10, in_channels: int = 3, image_size: int = 32) -> nn.Sequential:
    """Build VGG-16 with batch normalisation, with thirteen sections.

    Args:
        num_classes: Logits per image.
        in_channels: Channels of an image.
        image_size: Height and width in pixels, at least 16. Pooling stops at 1x1 (which the fifth
            would go below for images smaller than 32); larger maps are averaged.

    Returns:
        The network, float32 ``[B, in_channels, image_size, image_size]`` to ``[B, num_classes]``.

    Raises:
        ValueError: An argument is out of its range.
    """
    check_at_least(
        "vgg16",
        num_classes=(num_classes, 1),
        in_channels=(in_channels, 1),
        image_size=(image_size, 16),
    )
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels, size = in_channels, image_size
    for stage, (width, convolutions) in enumerate(_STAGES, start=1):
        for number in range(1, convolutions + 1):
            layers[f"conv{stage}_{number}"] = _section(channels, width)
            channels = width
        if size > 1:
            layers[f"pool{stage}"] = nn.MaxPool2d(2)
            size //= 2
    layers["average"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["head"] = nn.Linear(channels, num_classes)
    return nn.Sequential(layers)
