"""torchvision's ResNets without some of their branches.

``torchvision.models.ResNet(block, layers)`` has at least one block in each stage, and a branch in
every block: a pruned network fits it only where no shortcut had to stay behind and no stage is
gone. This builder makes all of them.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from layerprune.compaction import remove_sections
from layerprune.models._checks import check_at_least
from layerprune.renumber import renumber
from layerprune.sections import Section
from layerprune.sections.known import adapter_of

__all__ = ["torchvision_resnet"]


def torchvision_resnet(
    architecture: str, eliminated: Iterable[str] = (), num_classes: int = 1000
) -> nn.Module:
    """Build a ``torchvision.models.ResNet``, numbered as ``strip(renumber=True)`` leaves it.

    Args:
        architecture: Its name in torchvision, such as "resnet50" or "wide_resnet101_2".
        eliminated: Names of the blocks that lost their branch, numbered as in the whole network:
            "layer1.0" is the first. A shortcut that changes the shape stays.
        num_classes: Logits per image.

    Returns:
        The network, float32 ``[B, 3, H, W]`` to ``[B, num_classes]``, of torchvision's and torch's
        own classes, with fresh weights.

    Raises:
        ValueError: There is no such ResNet or block, or no class.
        ModuleNotFoundError: torchvision is not installed.
    """
    from torchvision import models

    known = [
        name
        for name in models.list_models(models)
        if models.get_model_builder(name).__module__ == models.resnet.__name__
    ]
    if architecture not in known:
        raise ValueError(f"torchvision has no ResNet {architecture!r}; it has {', '.join(known)}")
    check_at_least(architecture, num_classes=(num_classes, 1))
    model = models.get_model(architecture, num_classes=num_classes)
    blocks = {
        name: Section(name, module, adapter)
        for name, module in model.named_modules()
        if (adapter := adapter_of(module)) is not None
    }
    eliminated = list(eliminated)
    unknown = [name for name in eliminated if name not in blocks]
    if unknown:
        raise ValueError(f"{architecture} has no block {unknown[0]!r}; it has {', '.join(blocks)}")
    remove_sections(model, [blocks[name] for name in eliminated])
    return renumber(model, eliminated)
