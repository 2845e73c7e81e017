"""Gated twins of torchvision's residual blocks."""

from __future__ import annotations

from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from layerprune.sections.block_adapter import BlockAdapter, GatedBlock


class GatedBasicBlock(GatedBlock, BasicBlock):
    """torchvision's ``BasicBlock`` with a gate on its branch."""

    last = "relu"

    def _branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


class GatedBottleneck(GatedBlock, Bottleneck):
    """torchvision's ``Bottleneck`` with a gate on its branch."""

    last = "relu"

    def _branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


ADAPTERS = (
    BlockAdapter(BasicBlock, GatedBasicBlock),
    BlockAdapter(Bottleneck, GatedBottleneck),
)
"""Known blocks, by their exact class: a subclass may compute something else."""

FORWARD_ORDER = {
    ResNet: (
        *("conv1", "bn1", "relu", "maxpool"),
        *("layer1", "layer2", "layer3", "layer4"),
        *("avgpool", "fc"),
    )
}
"""The children of known networks as their forward runs them, each on the output of the last."""
