"""`find_sections`: what is found, what is left alone, and that looking changes nothing."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

from layerprune import GatedResidual, LayerPruner, find_sections
from layerprune.models import build


class Attention(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.inner = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.inner(self.norm2(x))


class SmallViT(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.patch = nn.Conv2d(1, 8, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.blocks = nn.Sequential(*[Attention() for _ in range(depth)])
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1)
        return self.head(self.blocks(x)[:, 0])


class Stack(nn.Module):
    """A ModuleList called with a mask that has no batch, one that has, and an option."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2)
        )

    def forward(self, x, mask, padding):
        for layer in self.layers:
            x = layer(x, src_mask=mask, src_key_padding_mask=padding, is_causal=False)
        return x


def _convolutions():
    def block(inputs, outputs):
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
        )

    return nn.Sequential(
        block(1, 4), block(4, 4), block(4, 8), block(8, 8), nn.Flatten(), nn.Linear(8 * 36, 2)
    )


def _names(model, example, ignored=()):
    return [section.name for section in find_sections(model, example, ignored)]


@pytest.mark.parametrize("name, blocks", [("resnet18", (2, 2, 2, 2)), ("resnet50", (3, 4, 6, 3))])
def test_torchvision_resnet(name, blocks):
    model = getattr(torchvision.models, name)(weights=None)
    sections = find_sections(model, torch.zeros(2, 3, 64, 64))
    expected = [f"layer{i}.{k}" for i, n in enumerate(blocks, start=1) for k in range(n)]
    assert [section.name for section in sections] == expected
    assert {section.kind for section in sections} == {"twin"}
    downsample = model.layer2[0].downsample
    kept = {id(p) for p in downsample.parameters()}
    branch = {id(p) for p in sections[blocks[0]].branch_parameters()}
    assert kept and not kept & branch
    assert kept | branch == {id(p) for p in model.layer2[0].parameters()}


@pytest.mark.parametrize(
    "name, size, count",
    [
        ("lenet5", 28, 4),
        ("vgg16", 32, None),
        ("resnet20", 8, 9),
        ("resnet32", 8, 15),
        ("resnet110", 8, 54),
    ],
)
def test_own_networks(name, size, count):
    model = build(name, in_channels=1, image_size=size)
    sections = find_sections(model, torch.zeros(2, 1, size, size))
    expected = [n for n, module in model.named_modules() if isinstance(module, GatedResidual)]
    assert [section.name for section in sections] == expected
    assert {section.kind for section in sections} == {"residual"}
    assert count is None or len(sections) == count


def test_vit():
    model = SmallViT()
    sections = find_sections(model, torch.zeros(2, 1, 8, 8))
    assert [section.name for section in sections] == ["blocks.0", "blocks.1", "blocks.2"]
    assert {section.kind for section in sections} == {"opaque"}
    assert all(section.adapter.batched == {0} for section in sections)


def test_torchvision_vit():
    model = torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=3)
    names = _names(model, torch.zeros(2, 3, 16, 16))
    layers = [f"encoder.layers.encoder_layer_{i}" for i in range(2)]
    assert names == [f"{layer}.{part}" for layer in layers for part in ("self_attention", "mlp")]


@pytest.mark.parametrize("batch", [2, 5, 8])
def test_which_arguments_carry_the_batch(batch):
    """Also where a mask without a batch happens to have as many rows as the example."""
    model = Stack()
    example = (torch.zeros(batch, 5, 8), torch.zeros(5, 5), torch.zeros(batch, 5, dtype=torch.bool))
    sections = find_sections(model, example)
    assert [section.name for section in sections] == ["layers.0", "layers.1"]
    for section in sections:
        assert section.adapter.batched == {0, "src_key_padding_mask"}


def test_plain_blocks_of_equal_shape():
    """Opaque where the output has the input's shape; the others are left alone."""
    assert _names(_convolutions(), torch.zeros(2, 1, 6, 6)) == ["1", "3"]


def test_ignored():
    model = SmallViT()
    x = torch.zeros(2, 1, 8, 8)
    assert _names(model, x, [model.blocks[1]]) == ["blocks.0", "blocks.2"]
    assert _names(model, x, [r"blocks\.[01]"]) == ["blocks.2"]
    assert _names(model, x, ["blocks"]) == ["blocks.0", "blocks.1", "blocks.2"]
    assert _names(model, x, [Attention]) == []
    resnet = torchvision.models.resnet18(weights=None)
    image = torch.zeros(2, 3, 64, 64)
    assert _names(resnet, image, [r"layer[123]\..*"]) == ["layer4.0", "layer4.1"]
    assert not [name for name in _names(resnet, image, [BasicBlock])]
    own = build("resnet20", in_channels=1, image_size=8, width=4)
    assert len(_names(own, torch.zeros(2, 1, 8, 8), [own.block1_1, "block2_."])) == 5


def test_inside_a_section_nothing_is_found():
    inner = GatedResidual(nn.Linear(4, 4))
    outer = GatedResidual(nn.Sequential(nn.Linear(4, 4), inner))
    assert _names(nn.Sequential(outer, nn.Linear(4, 2)), torch.zeros(2, 4)) == ["0"]


def test_a_model_without_sections():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert find_sections(model, torch.zeros(2, 4)) == []
    with pytest.raises(ValueError, match="Sequential has no section .*GatedResidual"):
        LayerPruner(model, example_inputs=torch.zeros(2, 4), total_steps=100, strength=0.1)


def test_the_root_is_no_section():
    """It cannot be replaced; what is inside it can be found, and so can what it adds."""
    root = GatedResidual(nn.Sequential(nn.Linear(4, 4), GatedResidual(nn.Linear(4, 4))))
    assert _names(root, torch.zeros(2, 4)) == ["branch.1"]
    assert _names(GatedResidual(nn.Linear(4, 4)), torch.zeros(2, 4)) == ["branch"]
    assert find_sections(BasicBlock(4, 4), torch.zeros(2, 4, 8, 8)) == []


@pytest.mark.parametrize(
    "example",
    [torch.zeros(2, 7), torch.zeros(2, 1, 9), (torch.zeros(2, 4), 1), {"y": torch.zeros(2, 4)}],
)
def test_example_inputs_that_do_not_fit(example):
    model = nn.Sequential(nn.Linear(4, 4), GatedResidual(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="does not run with 2 rows of example_inputs"):
        find_sections(model, example)


@pytest.mark.parametrize("example", [None, (), {"flag": True}, torch.tensor(1.0)])
def test_example_inputs_without_a_batch(example):
    model = nn.Sequential(nn.Linear(4, 4), GatedResidual(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="example_inputs"):
        find_sections(model, example)


def test_keyword_inputs():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = GatedResidual(nn.Linear(4, 4))

        def forward(self, *, x, scale):
            return self.block(x) * scale

    assert _names(Keywords(), {"x": torch.zeros(2, 4), "scale": 2.0}) == ["block"]


def _check_untouched(model, example):
    model.train()
    for module in list(model.modules())[::3]:
        module.training = False
    state = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    classes = [type(module) for module in model.modules()]
    identities = [id(value) for value in (*model.parameters(), *model.buffers())]
    random = torch.get_rng_state()
    find_sections(model, example)
    assert torch.get_rng_state().equal(random)
    assert [module.training for module in model.modules()] == flags
    assert [type(module) for module in model.modules()] == classes
    assert [id(value) for value in (*model.parameters(), *model.buffers())] == identities
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert all(value.device.type == "cpu" for value in model.state_dict().values())
    assert not any(module._forward_hooks for module in model.modules())


def test_looking_changes_nothing():
    _check_untouched(SmallViT(), torch.zeros(2, 1, 8, 8))
    _check_untouched(_convolutions(), torch.zeros(2, 1, 6, 6))
    _check_untouched(
        build("resnet20", in_channels=1, image_size=8, width=4), torch.zeros(2, 1, 8, 8)
    )
    model = nn.Sequential(GatedResidual(nn.Linear(4, 4)), nn.Dropout())
    with pytest.raises(ValueError):
        find_sections(model, torch.zeros(2, 5))
    _check_untouched(model, torch.zeros(2, 4))


def test_a_block_whose_output_follows_from_another_dimension_is_left_alone():
    """Its rows are not the batch's: sequence first."""

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 8), nn.ReLU())
            )

        def forward(self, x):
            return self.layers(x.transpose(0, 1)).transpose(0, 1)

    assert _names(Mixer(), torch.zeros(3, 5, 8)) == []


def test_a_block_that_is_called_twice_is_left_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU())])

        def forward(self, x):
            return self.layers[0](self.layers[0](x))

    assert _names(Twice(), torch.zeros(3, 4)) == []


class Scaled(BasicBlock):
    """Computes something else than its base."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_of_a_known_block_keeps_its_own_forward():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), Scaled(4, 4), nn.Flatten(), nn.Linear(64, 2)).eval()
    x = torch.randn(3, 1, 4, 4)
    expected = model(x)
    pruner = LayerPruner(model, example_inputs=x, total_steps=100, strength=0.1)
    assert model(x).equal(expected)
    pruner.strip()
    assert type(model[1]) is Scaled and model(x).equal(expected)


def test_torchs_encoder_keeps_its_first_layer():
    """Its forward looks into layer 0; the others can go, with padding masks and nested tensors."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 4)
    found = find_sections(
        model, {"src": torch.zeros(2, 5, 16), "src_key_padding_mask": torch.zeros(2, 5).bool()}
    )
    assert [section.name for section in found] == ["layers.1", "layers.2", "layers.3"]


def test_one_pattern_is_no_list_of_letters():
    model = nn.Sequential(
        nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh())] * 1), nn.Tanh()
    )
    assert find_sections(model, torch.zeros(2, 4))
    assert not find_sections(model, torch.zeros(2, 4), ignored=".*")
