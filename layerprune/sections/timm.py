"""Gated twins of timm's ResNet blocks."""

from __future__ import annotations

from collections.abc import Iterable

from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from layerprune.sections.block_adapter import BlockAdapter, GatedBlock


def _one_by_one(block: nn.Module, names: Iterable[str], x: Tensor) -> Tensor:
    for name in names:
        part = getattr(block, name, None)  # many are there in some networks only
        if part is not None:
            x = part(x)
    return x


class GatedBasicBlock(GatedBlock, BasicBlock):
    """timm's ``BasicBlock`` with a gate on its branch."""

    last = "act2"

    def _branch(self, x: Tensor) -> Tensor:
        x = _one_by_one(self, ("conv1", "bn1", "drop_block", "act1", "aa"), x)
        return _one_by_one(self, ("conv2", "bn2", "se", "drop_path"), x)


class GatedBottleneck(GatedBlock, Bottleneck):
    """timm's ``Bottleneck`` with a gate on its branch."""

    last = "act3"

    def _branch(self, x: Tensor) -> Tensor:
        x = _one_by_one(self, ("conv1", "bn1", "act1"), x)
        x = _one_by_one(self, ("conv2", "bn2", "drop_block", "act2", "aa"), x)
        return _one_by_one(self, ("conv3", "bn3", "se", "drop_path"), x)


ADAPTERS = (
    BlockAdapter(BasicBlock, GatedBasicBlock),
    BlockAdapter(Bottleneck, GatedBottleneck),
)
"""Known blocks, by their exact class: a subclass may compute something else."""

FORWARD_ORDER = {
    ResNet: (
        *("conv1", "bn1", "act1", "maxpool"),
        *("layer1", "layer2", "layer3", "layer4"),
        *("global_pool", "fc"),
    )
}
"""The children of known networks as their forward runs them, each on the output of the last."""
