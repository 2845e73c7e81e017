"""Networks made of residual sections that a `LayerPruner` can gate, each built from one place.

The networks for small images are each one flat ``nn.Sequential`` of named stages, so that what
comes before and after a section is plain to see, for a reader and for a program; those for ImageNet
are torchvision's. `torchvision_resnet` makes what a pruned one of torchvision's is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from layerprune.models.imagenet_resnet import imagenet_resnet
from layerprune.models.lenet import lenet5
from layerprune.models.mlp import residual_mlp
from layerprune.models.resnet import resnet
from layerprune.models.torchvision_resnet import torchvision_resnet
from layerprune.models.vgg import vgg16

__all__ = [
    "build",
    "imagenet_resnet",
    "lenet5",
    "names",
    "residual_mlp",
    "resnet",
    "torchvision_resnet",
    "vgg16",
]

_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "lenet5": lenet5,
    "vgg16": vgg16,
    **{f"resnet{depth}": partial(resnet, depth) for depth in (20, 32, 44, 56, 110)},
    **{f"resnet{depth}": partial(imagenet_resnet, depth) for depth in (18, 34, 50, 101, 152)},
    "mlp12": partial(residual_mlp, 12),
}


def names() -> list[str]:
    """The names that `build` knows."""
    return list(_BUILDERS)


def build(name: str, **kwargs: Any) -> nn.Module:
    """Build a network by its name, with fresh weights from torch's default generator.

    Args:
        name: One of `names()`.
        **kwargs: ``num_classes``, ``in_channels``, ``image_size``; for the ResNets of small
            images also ``width`` and ``shortcut``, for the MLP ``width``. Defaults are those of the
            network's builder.

    Returns:
        The network: float32 images ``[B, in_channels, image_size, image_size]`` to logits
        ``[B, num_classes]``.

    Raises:
        ValueError: The name or an argument is unknown, or an argument is out of its range.
    """
    if name not in _BUILDERS:
        raise ValueError(f"unknown model {name!r}; the models are {', '.join(_BUILDERS)}")
    builder = _BUILDERS[name]
    known = inspect.signature(builder).parameters
    unknown = [argument for argument in kwargs if argument not in known]
    if unknown:
        raise ValueError(
            f"model {name} has no argument {', '.join(unknown)}; it takes {', '.join(known)}"
        )
    return builder(**kwargs)
