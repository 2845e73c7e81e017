"""The networks: sizes against the literature, shapes, gradients, bad arguments."""

import pytest
import torch
import torch.nn.functional as F

from layerprune import models
from layerprune.sections import GatedResidual

SMALL = {
    "lenet5": {"in_channels": 1, "image_size": 28},
    "vgg16": {"image_size": 16},
    "resnet20": {"width": 4, "image_size": 8},
    "resnet18": {"num_classes": 10, "image_size": 32},
    "mlp12": {"width": 8, "image_size": 8, "in_channels": 1},
}


def sections(model):
    return [module for module in model.modules() if isinstance(module, GatedResidual)]


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def cifar_resnet_parameters(depth, width, in_channels, classes, shortcut):
    """Parameters of a CIFAR ResNet, counted layer by layer from the paper's description."""
    total = in_channels * width * 9 + 2 * width + 4 * width * classes + classes
    channels = width
    for out in (width, 2 * width, 4 * width):
        for _ in range((depth - 2) // 6):
            total += 9 * channels * out + 9 * out * out + 4 * out
            if channels != out and shortcut == "B":
                total += channels * out + 2 * out
            channels = out
    return total


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.73)]
)
def test_resnet_sizes_are_those_of_the_paper(depth, millions):
    model = models.build(f"resnet{depth}")
    assert round(parameters(model) / 1e6, 2) == millions
    assert parameters(model) == cifar_resnet_parameters(depth, 16, 3, 10, "A")
    assert len(sections(model)) == (depth - 2) // 2


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_resnet_sizes_with_other_arguments(shortcut):
    model = models.build("resnet20", width=5, in_channels=1, num_classes=7, shortcut=shortcut)
    assert parameters(model) == cifar_resnet_parameters(20, 5, 1, 7, shortcut)


def reference_resnet(state, x, depth, shortcut):
    """The paper's network in functional form, in eval mode, from a state dict."""

    def norm(y, name):
        fields = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(y, *(state[f"{name}.{field}"] for field in fields))

    x = F.relu(norm(F.conv2d(x, state["stem.conv.weight"], padding=1), "stem.bn"))
    for stage in (1, 2, 3):
        for number in range(1, (depth - 2) // 6 + 1):
            name = f"block{stage}_{number}"
            stride = 2 if stage > 1 and number == 1 else 1
            y = F.conv2d(x, state[f"{name}.branch.conv1.weight"], stride=stride, padding=1)
            y = F.relu(norm(y, f"{name}.branch.bn1"))
            y = F.conv2d(y, state[f"{name}.branch.conv2.weight"], padding=1)
            y = norm(y, f"{name}.branch.bn2")
            straight = x
            if stride == 2 and shortcut == "B":
                straight = F.conv2d(x, state[f"{name}.shortcut.conv.weight"], stride=2)
                straight = norm(straight, f"{name}.shortcut.bn")
            elif stride == 2:
                straight = torch.zeros_like(y)
                before = (y.shape[1] - x.shape[1]) // 2
                straight[:, before : before + x.shape[1]] = x[:, :, ::2, ::2]
            x = F.relu(straight + y)
    return F.linear(x.mean((2, 3)), state["head.weight"], state["head.bias"])


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("image_size", [7, 8])
def test_resnet_computes_the_papers_network(shortcut, image_size):
    torch.manual_seed(0)
    model = models.build("resnet20", width=3, shortcut=shortcut, image_size=image_size)
    model(torch.randn(16, 3, image_size, image_size))  # moves the running statistics
    x = torch.randn(2, 3, image_size, image_size)
    with torch.no_grad():
        expected = reference_resnet(model.state_dict(), x, 20, shortcut)
        torch.testing.assert_close(model.eval()(x), expected)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("lenet5", {"image_size": 28}),
        ("lenet5", {"image_size": 32, "in_channels": 3}),
        ("vgg16", {"image_size": 16}),
        ("vgg16", {"image_size": 28, "in_channels": 1}),
        ("vgg16", {"image_size": 32}),
        ("vgg16", {"image_size": 65}),
        ("resnet20", {"image_size": 8, "in_channels": 1}),
        ("resnet20", {"image_size": 28, "shortcut": "B"}),
        ("resnet20", {"image_size": 32, "width": 8}),
        ("resnet20", {"image_size": 4}),
        ("resnet50", {"image_size": 64}),
    ],
)
def test_logits_for_each_image(name, kwargs):
    torch.manual_seed(0)
    model = models.build(name, num_classes=7, **kwargs).eval()
    channels = kwargs.get("in_channels", 1 if name == "lenet5" else 3)
    x = torch.randn(2, channels, kwargs["image_size"], kwargs["image_size"])
    with torch.no_grad():
        logits = model(x)
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    model = models.build(name, **SMALL[name])
    size, channels = SMALL[name]["image_size"], SMALL[name].get("in_channels", 3)
    x = torch.randn(16, channels, size, size)
    F.cross_entropy(model(x), torch.arange(16) % 10).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("name", SMALL)
def test_state_dict_rebuilds_the_network(name):
    torch.manual_seed(0)
    first = models.build(name, **SMALL[name])
    size, channels = SMALL[name]["image_size"], SMALL[name].get("in_channels", 3)
    x = torch.randn(4, channels, size, size)
    first(x)  # running statistics away from their defaults
    second = models.build(name, **SMALL[name])
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        assert torch.equal(first.eval()(x), second.eval()(x))


def test_section_counts_of_the_plain_networks():
    assert len(sections(models.build("lenet5"))) == 4
    vgg = sections(models.build("vgg16", image_size=16))
    assert len(vgg) == 13
    # Channels change at four of VGG-16's convolutions; everywhere else the identity must do.
    assert sum(section.shortcut is not None for section in vgg) == 4


@pytest.mark.parametrize("name", ["lenet5", "vgg16"])
def test_a_plain_networks_section_without_its_branch_is_linear(name):
    torch.manual_seed(0)
    model = models.build(name, **SMALL[name]).double().eval()
    size, channels = SMALL[name]["image_size"], SMALL[name].get("in_channels", 3)
    x = torch.randn(2, channels, size, size, dtype=torch.double)
    with torch.no_grad():
        for module in model.children():
            if isinstance(module, GatedResidual):
                assert module.activation is None
                a, b = torch.randn(2, *x.shape, dtype=torch.double)
                straight = module.shortcut or torch.nn.Identity()
                assert straight(x).shape == module.branch(x).shape
                combined = straight(2 * a - 3 * b)
                torch.testing.assert_close(combined, 2 * straight(a) - 3 * straight(b))
                # and the branch is what is not linear
                assert not torch.allclose(
                    module.branch(2 * a - 3 * b), 2 * module.branch(a) - 3 * module.branch(b)
                )
            x = module(x)


def test_vgg_pools_as_long_as_there_is_something_to_pool():
    def pools(size):
        layers = models.build("vgg16", image_size=size).children()
        return sum(isinstance(layer, torch.nn.MaxPool2d) for layer in layers)

    assert [pools(size) for size in (16, 31, 32)] == [4, 4, 5]


def test_signal_keeps_its_size_through_a_deep_fresh_network():
    """He initialisation: gradients at the first and last block of ResNet-110 are comparable."""
    torch.manual_seed(0)
    model = models.build("resnet110", width=4, image_size=8)
    F.cross_entropy(model(torch.randn(32, 3, 8, 8)), torch.arange(32) % 10).backward()
    first, *_, last = (section.branch.conv2.weight.grad.norm() for section in sections(model))
    assert 0.01 < first / last < 100


def test_names_can_all_be_built():
    assert models.names() == [
        "lenet5", "vgg16", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110",
        "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "mlp12",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("resnet19", {}, "lenet5, vgg16, resnet20"),
        ("resnet50", {"in_channels": 1}, "takes images of 3 channels, got in_channels 1"),
        ("resnet50", {"image_size": 28}, "image_size of at least 32, got 28"),
        ("resnet50", {"width": 8}, "no argument width"),
        ("vgg16", {"width": 8}, "no argument width; it takes num_classes, in_channels, image_size"),
        ("vgg16", {"image_size": 15}, "image_size of at least 16, got 15"),
        ("lenet5", {"image_size": 8}, "28 or 32, got 8"),
        ("lenet5", {"num_classes": 0}, "num_classes of at least 1, got 0"),
        ("resnet20", {"image_size": 3}, "image_size of at least 4, got 3"),
        ("resnet20", {"width": 0}, "width of at least 1, got 0"),
        ("resnet20", {"shortcut": "C"}, "got 'C'"),
        ("resnet20", {"depth": 32}, "no argument depth"),
    ],
)
def test_bad_arguments(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        models.build(name, **kwargs)


@pytest.mark.parametrize("depth", [2, 18, 51])
def test_bad_depth(depth):
    with pytest.raises(ValueError, match=f"6n \\+ 2 .*got {depth}"):
        models.resnet(depth)
