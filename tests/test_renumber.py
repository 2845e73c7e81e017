"""Renumbering: what is left of a model has the names that a smaller model would give it."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models import ResNet, resnet18, resnet50
from torchvision.models.resnet import BasicBlock, Bottleneck

from layerprune import GatedResidual, LayerPruner, eliminate_sections, renumber
from layerprune.models import torchvision_resnet

SIZE = 32
BLOCKS = {resnet18: (BasicBlock, (2, 2, 2, 2)), resnet50: (Bottleneck, (3, 4, 6, 3))}


def shifted(model, seed):
    """Weights and BatchNorm statistics with which every branch matters."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            for tensor in (module.bias.data, module.running_mean):
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def images(seed):
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


class Shortcut(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.downsample = block.downsample

    def forward(self, x):
        return x if self.downsample is None else torch.relu(self.downsample(x))


def without_branches(model, names):
    """The same by hand: the blocks' shortcuts in their places."""
    model = copy.deepcopy(model)
    for name in names:
        stage, _, key = name.partition(".")
        getattr(model, stage)[int(key)] = Shortcut(model.get_submodule(name))
    return model


def stripped(model, names):
    """What a pruner leaves that found these sections useless."""
    pruner = LayerPruner(model, example_inputs=images(0), total_steps=10, strength=0.1)
    for index, section in enumerate(pruner.sections):
        pruner._run.bank.theta[index] = 0.0 if section.name in names else 1.0
    return pruner.strip(renumber=True)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("builder", BLOCKS)
def test_torchvision_resnets_that_lost_identity_blocks_load(builder, seed):
    """Into torchvision's own class with the smaller numbers of blocks, and compute the same."""
    block, layers = BLOCKS[builder]
    chance = random.Random(seed)
    torch.manual_seed(seed)
    model = shifted(builder(num_classes=5), seed)
    gone, left = [], []
    for stage, count in enumerate(layers, start=1):
        blocks = [f"layer{stage}.{index}" for index in range(count)]
        free = [name for name in blocks if model.get_submodule(name).downsample is None]
        lost = chance.sample(free, chance.randrange(min(len(free), count - 1) + 1))
        gone += lost
        left.append(count - len(lost))
    expected = without_branches(model, gone)(images(seed))
    small = ResNet(block, left, num_classes=5)
    small.load_state_dict(stripped(model, gone).state_dict(), strict=True)
    assert small.eval()(images(seed)).equal(expected)
    assert model(images(seed)).equal(expected)


def test_the_first_block_of_a_resnet_leaves_nothing_behind():
    """What comes out of its stem is not negative: there is no ReLU to keep."""
    model = shifted(resnet18(num_classes=5), 0)
    expected = without_branches(model, ["layer1.0"])(images(0))
    renumber(eliminate_sections(model, ["layer1.0"], images(0)), ["layer1.0"])
    assert [type(child) for child in model.layer1] == [BasicBlock]
    assert model(images(0)).equal(expected)


@pytest.mark.parametrize("change", ["negative stem", "another order"])
def test_the_first_block_of_another_stem_keeps_its_relu(change):
    model = shifted(resnet18(num_classes=5), 0)
    if change == "negative stem":
        model.relu = nn.GELU()
        expected = model.relu
    else:
        del model.maxpool
        model.maxpool = nn.Conv2d(64, 64, 3)  # registered last, and run in its place all the same
    expected = without_branches(model, [])
    expected.layer1[0] = nn.ReLU()
    expected = expected(images(0))
    renumber(eliminate_sections(model, ["layer1.0"], images(0)), ["layer1.0"])
    assert len(model.layer1) == 2
    assert model(images(0)).equal(expected)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("builder", BLOCKS)
def test_the_builder_serves_all_others(builder, seed):
    """Any blocks at all, whole stages and downsampling ones among them."""
    _, layers = BLOCKS[builder]
    chance = random.Random(100 + seed)
    torch.manual_seed(seed)
    model = shifted(builder(num_classes=5), seed)
    names = [f"layer{s}.{i}" for s, count in enumerate(layers, start=1) for i in range(count)]
    gone = {"layer2.0", "layer1.0", "layer1.1"} | set(chance.sample(names, len(names) // 2))
    gone = [name for name in names if name in gone]
    expected = without_branches(model, gone)(images(seed))
    weights = stripped(model, gone).state_dict()
    small = torchvision_resnet(builder.__name__, gone, num_classes=5)
    assert list(small.state_dict()) == list(weights)
    small.load_state_dict(weights, strict=True)
    assert small.eval()(images(seed)).equal(expected)
    assert type(small) is ResNet


def test_an_average_is_renumbered_along():
    torch.manual_seed(0)
    model, x = nn.Sequential(*(layer() for _ in range(4))), torch.randn(3, 4)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    pruner = LayerPruner(model, example_inputs=x, total_steps=10, strength=0.1, ema=average)
    pruner._run.bank.theta.copy_(torch.tensor([1.0, 0.2, 1.0, 0.4]))
    pruner.strip(renumber=True)
    assert pruner.structure()["eliminated"] == ["1", "3"]
    assert list(model._modules) == ["0", "1"]
    assert model.state_dict().keys() == average.module.state_dict().keys()
    average.update_parameters(model)
    assert average(x).allclose(model(x))


def layer():
    return GatedResidual(nn.Linear(4, 4))


class Stack(nn.Module):
    """Its layers get a second argument."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, scale):
            return x + scale * self.linear(x)

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Stack.Layer() for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, 0.5)
        return x


def test_only_what_an_elimination_left_empty_goes():
    model = nn.Sequential(nn.Identity(), layer(), nn.Identity(), layer(), nn.Linear(4, 4), layer())
    x = torch.randn(3, 4)
    own, kept, linear = model[0], model[5], model[4]
    calls = []
    model.register_forward_hook(lambda *arguments: calls.append("model"))
    kept.register_forward_hook(lambda *arguments: calls.append("kept"))
    eliminate_sections(model, ["1", "3"], x)
    expected = model(x)
    assert renumber(model, ["1", "3"]) is model
    calls.clear()
    assert model(x).equal(expected) and calls == ["kept", "model"]
    assert list(model._modules) == ["0", "1", "2", "3"]
    assert model[0] is own and model[2] is linear and model[3] is kept


def test_shortcuts_and_activations_stay():
    parts = [nn.Linear(4, 4), GatedResidual(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Tanh()]
    model = nn.Sequential(*parts, GatedResidual(nn.Linear(4, 4), activation="relu"), layer())
    x = torch.randn(3, 4)
    names = ["1", "3", "4"]
    expected = eliminate_sections(model, names, x)(x)
    keys = list(model.state_dict())
    assert renumber(model, names)(x).equal(expected)
    assert len(model) == 4 and list(model.state_dict()) == keys


def test_named_and_gappy_containers_keep_their_names():
    named = nn.Sequential()
    for name in ("stem", "0", "1"):
        named.add_module(name, layer())
    gappy = nn.Sequential()
    for name in ("1", "2", "5"):
        gappy.add_module(name, layer())
    model = nn.Sequential(named, gappy)
    x = torch.randn(3, 4)
    names = ["0.0", "1.2"]
    renumber(eliminate_sections(model, names, x), names)
    assert list(model[0]._modules) == ["stem", "0", "1"]
    assert list(model[1]._modules) == ["1", "2", "5"]


def test_lists_whose_layers_take_more_arguments():
    torch.manual_seed(0)
    model, x = Stack(), torch.randn(3, 4)
    eliminate_sections(model, ["layers.1", "layers.2"], x)
    expected = model(x)
    renumber(model, ["layers.1", "layers.2"])
    assert len(model.layers) == 2
    assert not any("layerprune" in type(module).__module__ for module in model.modules())
    assert model(x).equal(expected)


def test_a_section_in_several_places_leaves_all_of_them():
    shared, x = layer(), torch.randn(3, 4)
    model = nn.Sequential(shared, nn.Linear(4, 4), nn.Sequential(layer(), shared), shared)
    expected = eliminate_sections(model, ["0"], x)(x)
    assert renumber(model, ["0"])(x).equal(expected)
    assert list(model.state_dict()) == [
        *("0.weight", "0.bias"),
        *("1.0.branch.weight", "1.0.branch.bias"),
    ]


def test_an_optimizer_goes_on():
    """Momentum stays with the parameters whose names have changed."""
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    models = [nn.Sequential(*(layer() for _ in range(4)))]
    models.append(copy.deepcopy(models[0]))
    for model in models:
        eliminate_sections(model, ["1"], x)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(4):
            if step == 2 and model is models[1]:
                renumber(model, ["1"])
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    plain, renumbered = models
    assert list(renumbered._modules) == ["0", "1", "2"]
    for a, b in zip(plain.parameters(), renumbered.parameters(), strict=True):
        assert a.equal(b)


def test_unknown_names_are_refused():
    model = nn.Sequential(layer(), layer(), layer())
    names = ["1", "2"]
    eliminate_sections(model, names, torch.randn(2, 4))
    renumber(model, names)
    with pytest.raises(ValueError, match="no module '1'.*renumber once"):
        renumber(model, names)


def test_strip_may_be_repeated_and_renumbered_later():
    model = resnet18(num_classes=3)
    pruner = LayerPruner(
        model, example_inputs=torch.zeros(2, 3, 32, 32), total_steps=100, strength=0.1
    )
    pruner._run.bank.theta[1] = 0.0
    names = list(pruner.strip().state_dict())
    assert list(pruner.strip().state_dict()) == names and "layer1.1.conv1.weight" not in names
    assert len(pruner.strip(renumber=True).layer1) == 1 == len(pruner.strip(renumber=True).layer1)


class Paired(nn.Module):
    """Its forward combines a container's n-th element with another one's."""

    def __init__(self):
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(4, 9), nn.GELU(), nn.Linear(9, 4)) for _ in range(3)]
        self.blocks = nn.ModuleList(GatedResidual(block) for block in blocks)
        self.scales = nn.ParameterList(torch.randn(4) for _ in range(3))

    def forward(self, x):
        for block, scale in zip(self.blocks, self.scales, strict=False):
            x = block(x) * scale
        return x


def test_a_forward_that_goes_by_number_is_refused():
    torch.manual_seed(0)
    x, model = torch.randn(5, 4), Paired().eval()
    pruner = LayerPruner(model, example_inputs=x, total_steps=10, strength=0.1)
    pruner._run.bank.theta.copy_(torch.tensor([1.0, 0.0, 1.0]))
    names = list(model.state_dict())
    with pytest.raises(ValueError, match="goes through a container by number"):
        pruner.strip(renumber=True)
    assert type(model.blocks[1]) is nn.Identity and len(model.blocks) == 3
    assert set(model.state_dict()) < set(names)
    expected = model(x)
    assert pruner.strip() is model and not pruner.renumbered
    with pytest.raises(ValueError, match="example_inputs do not show"):
        renumber(model, ["blocks.1"], x[:, :2])
    # Without inputs it is the caller's to know.
    assert not renumber(model, ["blocks.1"])(x).equal(expected)
    assert len(model.blocks) == 2


def test_the_last_of_paired_elements_may_go():
    """What is left is combined as before, but for the scale, which is there no more."""
    torch.manual_seed(0)
    x, model = torch.randn(5, 4), Paired().eval()
    nn.init.ones_(model.scales[2])
    expected = eliminate_sections(model, ["blocks.2"], x)(x)
    assert renumber(model, ["blocks.2"], x)(x).equal(expected)


class Wrapped:
    """What a model may return: a class that torch knows nothing of."""

    def __init__(self, value):
        self.value = value


def test_an_output_that_shows_nothing_is_no_proof():
    class Hides(Paired):
        def forward(self, x):
            return Wrapped(super().forward(x))

    x, model = torch.randn(5, 4), Hides()
    names = ["blocks.1"]
    eliminate_sections(model, names, x)
    with pytest.raises(ValueError, match="no finite number .* layerprune.renumber without them"):
        renumber(model, names, x)
    assert len(model.blocks) == 3
