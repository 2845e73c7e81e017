"""The residual networks for CIFAR of He et al., "Deep residual learning for image recognition".

arXiv 1512.03385, section 4.2: a 3x3 convolution, then three stages of n blocks with 16, 32 and 64
channels on maps of full, half and quarter size, then global averaging and one linear layer: depth
6n + 2. Each block is a section. Weights are drawn as in He et al., "Delving deep into rectifiers"
(arXiv 1502.01852).
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from layerprune.models._checks import check_at_least
from layerprune.sections import GatedResidual

__all__ = ["SubsampleAndPad", "resnet"]


class SubsampleAndPad(nn.Module):
    """Shortcut "option A" of He et al.: every second pixel, new channels zero; no parameters.

    Args:
        extra_channels: How many zero channels are added, half of them on either side.
    """

    def __init__(self, extra_channels: int) -> None:
        super().__init__()
        self.extra_channels = extra_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to ``[B, C + extra_channels, ceil(H / 2), ceil(W / 2)]``."""
        before = self.extra_channels // 2
        after = self.extra_channels - before
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, after))

    def extra_repr(self) -> str:
        """The argument, for ``repr``."""
        return f"extra_channels={self.extra_channels}"


def _convolution(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    layer = nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


def _block(in_channels: int, out_channels: int, stride: int, shortcut: str) -> GatedResidual:
    branch = nn.Sequential(
        OrderedDict(
            conv1=_convolution(in_channels, out_channels, 3, stride),
            bn1=nn.BatchNorm2d(out_channels),
            relu=nn.ReLU(),
            conv2=_convolution(out_channels, out_channels, 3),
            bn2=nn.BatchNorm2d(out_channels),
        )
    )
    if stride == 1 and in_channels == out_channels:
        straight = None
    elif shortcut == "A":
        straight = SubsampleAndPad(out_channels - in_channels)
    else:
        straight = nn.Sequential(
            OrderedDict(
                conv=_convolution(in_channels, out_channels, 1, stride),
                bn=nn.BatchNorm2d(out_channels),
            )
        )
    return GatedResidual(branch, straight, activation="relu")


def resnet(
    depth: int,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
    width: int = 16,
    shortcut: str = "A",
) -> nn.Sequential:
    """Build a CIFAR ResNet, with (depth - 2) / 2 sections.

    Args:
        depth: Number of weighted layers, 6n + 2 with n >= 1: 20, 32, 44, 56, 110 in the paper.
        num_classes: Logits per image.
        in_channels: Channels of an image.
        image_size: Height and width in pixels, at least 4. The network is the same for all sizes.
        width: Channels of the first stage; the others have two and four times as many.
        shortcut: Where the shape changes: "A" for `SubsampleAndPad`, "B" for a 1x1 convolution
            with batch normalisation.

    Returns:
        The network, float32 ``[B, in_channels, image_size, image_size]`` to ``[B, num_classes]``.

    Raises:
        ValueError: An argument is out of its range.
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"a CIFAR ResNet has depth 6n + 2 (8, 14, 20, ...), got {depth}")
    check_at_least(
        f"resnet{depth}",
        num_classes=(num_classes, 1),
        in_channels=(in_channels, 1),
        image_size=(image_size, 4),
        width=(width, 1),
    )
    if shortcut not in ("A", "B"):
        raise ValueError(f'resnet{depth} needs shortcut "A" or "B", got {shortcut!r}')
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        stem=nn.Sequential(
            OrderedDict(
                conv=_convolution(in_channels, width, 3), bn=nn.BatchNorm2d(width), relu=nn.ReLU()
            )
        )
    )
    channels = width
    for stage, out_channels in enumerate((width, 2 * width, 4 * width), start=1):
        for number in range(1, (depth - 2) // 6 + 1):
            stride = 2 if stage > 1 and number == 1 else 1
            layers[f"block{stage}_{number}"] = _block(channels, out_channels, stride, shortcut)
            channels = out_channels
    layers["average"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["head"] = nn.Linear(channels, num_classes)
    return nn.Sequential(layers)
