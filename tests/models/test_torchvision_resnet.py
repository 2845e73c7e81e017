"""torchvision's ResNets without some branches; tests/test_renumber.py compares their outputs."""

import pytest
import torch
from torchvision.models import ResNet, resnext50_32x4d

from layerprune.models import torchvision_resnet


def test_without_eliminations_it_is_torchvisions():
    whole = resnext50_32x4d(num_classes=3)
    model = torchvision_resnet("resnext50_32x4d", num_classes=3)
    assert type(model) is ResNet
    model.load_state_dict(whole.state_dict(), strict=True)


def test_only_shortcuts_of_changed_shape_are_left():
    blocks = [f"layer{stage}.{index}" for stage in range(1, 5) for index in range(2)]
    model = torchvision_resnet("resnet18", reversed(blocks), num_classes=3)
    named = {key.rpartition(".")[0] for key in model.state_dict()}
    shortcuts = {f"layer{s}.0.downsample.{part}" for s in (2, 3, 4) for part in (0, 1)}
    assert named == {"conv1", "bn1", "fc"} | shortcuts
    assert [len(getattr(model, f"layer{stage}")) for stage in range(1, 5)] == [0, 1, 1, 1]
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("vgg16",), "no ResNet 'vgg16'; it has resnet101, .*wide_resnet50_2"),
        (("resnet18", ["layer1.7"]), "no block 'layer1.7'; it has layer1.0, .*layer4.1"),
        (("resnet18", ["fc"]), "no block 'fc'"),
        (("resnet18", [], 0), "num_classes of at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        torchvision_resnet(*arguments)
