"""LeNet-5 with a linear residual connection around each of its nonlinear layers.

LeCun et al., "Gradient-based learning applied to document recognition" (1998), in its usual modern
form: ReLU and max-pooling. No layer of it keeps its input's shape, so no shortcut can be the
identity; each is the cheapest linear map that sees what the layer sees:

========  =============================================  ========================================
section   branch                                         shortcut
========  =============================================  ========================================
conv1     5x5 convolution to 6, ReLU, max-pool 2         average over the same 6x6 window, then
conv2     5x5 convolution to 16, ReLU, max-pool 2        a 1x1 convolution without bias
fc1       linear 400 -> 120, ReLU                        linear without bias
fc2       linear 120 -> 84, ReLU                         linear without bias
========  =============================================  ========================================

Without its branch a section is linear, and two linear stages in a row are one layer. The last
linear layer is no section: it has no nonlinearity to lose.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from layerprune.models._checks import check_at_least
from layerprune.sections import GatedResidual

__all__ = ["lenet5"]

# Padding of the first convolution: both sizes leave 14x14 after the first pooling.
_PADDING = {28: 2, 32: 0}


def _conv_section(in_channels: int, out_channels: int, padding: int) -> GatedResidual:
    branch = nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2)
    )
    # A 5x5 convolution and 2x2 pooling of stride 2 see a 6x6 window in steps of 2.
    shortcut = nn.Sequential(
        nn.AvgPool2d(6, stride=2, padding=padding),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
    )
    return GatedResidual(branch, shortcut)


def _linear_section(in_features: int, out_features: int) -> GatedResidual:
    branch = nn.Sequential(nn.Linear(in_features, out_features), nn.ReLU())
    return GatedResidual(branch, nn.Linear(in_features, out_features, bias=False))


def lenet5(num_classes: int = 10, in_channels: int = 1, image_size: int = 28) -> nn.Sequential:
    """Build LeNet-5, with four sections.

    Args:
        num_classes: Logits per image.
        in_channels: Channels of an image; 1 for the classic network.
        image_size: Height and width in pixels, 28 or 32.

    Returns:
        The network, float32 ``[B, in_channels, image_size, image_size]`` to ``[B, num_classes]``.

    Raises:
        ValueError: An argument is out of its range.
    """
    check_at_least("lenet5", num_classes=(num_classes, 1), in_channels=(in_channels, 1))
    if image_size not in _PADDING:
        raise ValueError(f"lenet5 needs image_size 28 or 32, got {image_size}")
    return nn.Sequential(
        OrderedDict(
            conv1=_conv_section(in_channels, 6, _PADDING[image_size]),
            conv2=_conv_section(6, 16, 0),
            flatten=nn.Flatten(),
            fc1=_linear_section(400, 120),
            fc2=_linear_section(120, 84),
            head=nn.Linear(84, num_classes),
        )
    )
