"""The gated forwards: each kind of section against a plain expression, row by row."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck

from layerprune import GatedResidual, LayerPruner, find_sections
from layerprune.gate import Gate, SectionDraw

ROWS = 7


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))

    def forward(self, x, scale=None, *, shift=0.0):
        y = x + self.inner(x)
        return y if scale is None else y * scale + shift


class Caller(nn.Module):
    """Gives its layer one argument with rows by position and one by name."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer()])

    def forward(self, x):
        rows = x.mean(1, keepdim=True)
        return self.layers[0](x, rows, shift=2 * rows)


def _block(kind):
    width = 4 * kind.expansion
    down = nn.Sequential(nn.Conv2d(3, width, 1, 2, bias=False), nn.BatchNorm2d(width))
    return kind(3, 4, 2, down)


# Name, section, input, what gives its shortcut and branch, its activation.
def _cases():
    x, image = torch.randn(ROWS, 4), torch.randn(ROWS, 3, 6, 6)
    linear, other = nn.Linear(4, 4), nn.Linear(4, 4)
    yield "identity", GatedResidual(linear), x, lambda m, v: (v, linear(v)), None
    yield "relu", GatedResidual(linear, activation="relu"), x, lambda m, v: (v, linear(v)), F.relu
    yield (
        "projection, module",
        GatedResidual(linear, other, nn.Tanh()),
        x,
        lambda m, v: (other(v), linear(v)),
        torch.tanh,
    )

    def basic(m, v):
        return m.downsample(v), m.bn2(m.conv2(F.relu(m.bn1(m.conv1(v)))))

    def bottleneck(m, v):
        v1 = F.relu(m.bn2(m.conv2(F.relu(m.bn1(m.conv1(v))))))
        return m.downsample(v), m.bn3(m.conv3(v1))

    yield "BasicBlock", _block(BasicBlock), image, basic, F.relu
    yield "Bottleneck", _block(Bottleneck), image, bottleneck, F.relu


def _draw(gates, rows, probes=()):
    gate = torch.tensor(gates, requires_grad=True)
    rows = torch.tensor(rows, dtype=torch.int64)
    slot = torch.full((len(gates),), -1, dtype=torch.int32)
    slot[rows] = torch.arange(len(rows), dtype=torch.int32)
    return SectionDraw(gate, slot, rows, torch.tensor(probes, dtype=torch.int64))


DRAWS = {
    "some rows, two probes": ([0.0, 1.0, 0.25, 0.0, 1.0, 0.5, 0.0], [1, 2, 3, 4, 5], [2, 5]),
    "all rows": ([0.0, 1.0, 0.25, 0.0, 1.0, 0.5, 0.0], list(range(ROWS)), [2, 5]),
    "no rows": ([0.0] * ROWS, [], []),
    "everything open": ([1.0] * ROWS, list(range(ROWS)), []),
}


@pytest.mark.parametrize("kind", [name for name, *_ in _cases()])
@pytest.mark.parametrize("how", DRAWS)
def test_forward_and_gradients(kind, how):
    """Against the plain expression; batch statistics are frozen, so that rows do not meet."""
    torch.manual_seed(0)
    (case,) = [case for case in _cases() if case[0] == kind]
    _, module, x, parts, activation = case
    model = nn.Sequential(nn.Identity(), module)
    for child in model.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.eval()
    (section,) = find_sections(model, x)
    gate = Gate("1")
    section.attach(gate)
    gates, rows, probes = DRAWS[how]
    gate.draw = _draw(gates, rows, probes)
    x = x.requires_grad_()
    found = model(x)

    plain = gate.draw.gate.detach().clone().requires_grad_()
    straight, branch = parts(module, x)
    expected = straight + plain.view(-1, *[1] * (branch.dim() - 1)) * branch
    expected = expected if activation is None else activation(expected)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    inputs = [x, *module.parameters()]
    left = torch.autograd.grad(
        (found * weights).sum(), [*inputs, gate.draw.gate], allow_unused=True
    )
    right = torch.autograd.grad((expected * weights).sum(), [*inputs, plain])
    wanted = torch.zeros(ROWS)
    wanted[probes] = right[-1][probes]
    for a, b in zip(left, (*right[:-1], wanted), strict=True):
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b, atol=1e-4, rtol=1e-4)
    assert len(probes) or left[-1] is None, "where nothing is probed nothing is computed"


@pytest.mark.parametrize("how", DRAWS)
def test_opaque_forward(how):
    """lerp between the input and the block; arguments that carry the batch are gathered alike."""
    torch.manual_seed(0)
    model = Caller()
    x = torch.randn(ROWS, 4)
    plain = copy.deepcopy(model)
    (section,) = find_sections(model, x)
    assert section.adapter.batched == {0, 1, "shift"}
    gate = Gate("layer")
    section.attach(gate)
    gates, rows, probes = DRAWS[how]
    gate.draw = _draw(gates, rows, probes)
    expected = x + gate.draw.gate.detach()[:, None] * (plain(x) - x)
    torch.testing.assert_close(model(x), expected)
    opened = torch.tensor(gates) == 1
    closed = torch.tensor(gates) == 0
    assert model(x)[closed].equal(x[closed])
    torch.testing.assert_close(model(x)[opened], plain(x)[opened])
    gate.is_open = False
    assert model.eval()(x).equal(x)
    gate.is_open = True
    assert model(x).equal(plain.eval()(x))


@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("training", [True, False])
def test_an_open_twin_is_the_block_bit_for_bit(kind, training):
    torch.manual_seed(0)
    model = nn.Sequential(_block(kind)).train(training)
    plain = copy.deepcopy(model)
    x = torch.randn(ROWS, 3, 6, 6)
    (section,) = find_sections(model, x)
    section.attach(Gate())
    a, b = model(x), plain(x)
    assert a.equal(b)
    a.square().sum().backward()
    b.square().sum().backward()
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
    assert list(model.state_dict()) == list(plain.state_dict())
    for name, value in model.state_dict().items():
        assert value.equal(plain.state_dict()[name]), name
    section.detach()
    assert type(section.module) is kind and vars(section.module).keys() == vars(plain[0]).keys()


def test_the_branch_runs_on_its_rows_only():
    seen = []
    branch = nn.Linear(4, 4)
    branch.register_forward_hook(lambda module, args, out: seen.append(args[0].clone()))
    model = nn.Sequential(GatedResidual(branch), nn.Identity())
    gate = Gate()
    model[0]._layerprune_gate = gate
    gates, rows, probes = DRAWS["some rows, two probes"]
    gate.draw = _draw(gates, rows, probes)
    x = torch.randn(ROWS, 4)
    model(x)
    assert seen[0].equal(x[rows])


def test_a_section_without_a_pruner_is_a_residual_block():
    torch.manual_seed(0)
    block = GatedResidual(nn.Linear(4, 4), activation="relu")
    x = torch.randn(ROWS, 4)
    for training in (True, False):
        assert block.train(training)(x).equal(F.relu(x + block.branch(x)))
    assert not [key for key in block.state_dict() if "gate" in key]


@pytest.mark.parametrize(
    "build", [lambda: GatedResidual(nn.Linear(4, 4)), Caller], ids=["own", "opaque"]
)
def test_gated_models_pickle_and_copy(build):
    model = nn.Sequential(build(), nn.Linear(4, 2)).eval()
    x = torch.randn(ROWS, 4)
    expected = model(x)
    for section in find_sections(model, x):
        section.attach(Gate())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False)(x).equal(expected)
    assert copy.deepcopy(model)(x).equal(expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"branch": F.relu}, "branch must be a module"),
        ({"branch": nn.Identity(), "shortcut": F.relu}, "shortcut"),
        ({"branch": nn.Identity(), "activation": "gelu"}, "activation"),
        ({"branch": nn.Identity(), "activation": F.relu}, "activation"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(TypeError, match=message):
        GatedResidual(**arguments)


def test_an_activation_in_place_leaves_the_input_alone():
    block = GatedResidual(nn.Linear(4, 4), activation=nn.ReLU(inplace=True)).eval()
    block._layerprune_gate.is_open = False
    x = torch.randn(3, 4)
    before = x.clone()
    assert block(x).equal(before.relu()) and x.equal(before)


class _Masked(nn.Module):
    """Takes a mask of the batch's rows, or none."""

    def __init__(self):
        super().__init__()
        self.parts = nn.Sequential(nn.Linear(5, 5), nn.Tanh())

    def forward(self, x, mask=None, table=None):
        y = x + self.parts(x)
        y = y if mask is None else y * mask
        return y if table is None else y * table


class _Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(_Masked() for _ in range(3))

    def forward(self, x, mask=None, table=None):
        for layer in self.layers:
            x = layer(x, mask, table=table)
        return x


@pytest.mark.parametrize("given", [True, False])
def test_an_argument_may_be_missing_in_some_batches(given):
    """If it was there in the example it goes along with the rows; else nothing is known of it."""
    torch.manual_seed(0)
    model, x, mask, table = _Stack(), torch.randn(8, 5), torch.rand(8, 1), torch.rand(5)
    example = {"x": x, "mask": mask if given else None, "table": table}
    LayerPruner(model, example_inputs=example, total_steps=100, strength=0.1)
    model(x, None, table)
    assert model(x).shape == x.shape
    if given:
        draws = [layer._layerprune_gate[1].draw for layer in model.layers]
        assert any(0 < len(draw.rows) < 8 for draw in draws)
        assert model(x, mask, table).shape == x.shape
    else:
        with pytest.raises(RuntimeError, match="argument 1.*inputs like those of training"):
            model(x, mask, table)
