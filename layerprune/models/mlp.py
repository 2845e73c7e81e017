"""A residual multi-layer perceptron for small images: sections whose rows do not interact.

Each block is the pre-normalised form of a transformer's feed-forward part (Vaswani et al.,
"Attention is all you need", 2017; Xiong et al., "On layer normalization in the transformer
architecture", 2020): layer normalisation, a linear layer, ReLU, a second linear layer, added to
the block's input. Without batch statistics a row's loss depends on that row's gates alone.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from layerprune.models._checks import check_at_least
from layerprune.sections import GatedResidual

__all__ = ["residual_mlp"]


def _block(width: int) -> GatedResidual:
    return GatedResidual(
        nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
        )
    )


def residual_mlp(
    depth: int,
    num_classes: int = 10,
    in_channels: int = 1,
    image_size: int = 28,
    width: int = 128,
) -> nn.Sequential:
    """Build a residual multi-layer perceptron.

    Args:
        depth: Blocks, each a section.
        num_classes: Logits per image.
        in_channels: Channels of an image.
        image_size: Height and width in pixels.
        width: Features between the blocks and within them.

    Returns:
        The network, float32 ``[B, in_channels, image_size, image_size]`` to ``[B, num_classes]``.

    Raises:
        ValueError: An argument is out of its range.
    """
    check_at_least(
        f"mlp{depth}",
        depth=(depth, 1),
        num_classes=(num_classes, 1),
        in_channels=(in_channels, 1),
        image_size=(image_size, 1),
        width=(width, 1),
    )
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        flatten=nn.Flatten(), stem=nn.Linear(in_channels * image_size**2, width)
    )
    for number in range(1, depth + 1):
        layers[f"block{number}"] = _block(width)
    layers["norm"] = nn.LayerNorm(width)
    layers["head"] = nn.Linear(width, num_classes)
    return nn.Sequential(layers)
