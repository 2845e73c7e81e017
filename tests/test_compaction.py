"""Compaction: eliminated sections leave the model and the optimizer, nothing else changes."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from layerprune import GatedResidual, LayerPruner, eliminate_sections, find_sections, verify
from layerprune.compaction import remove_sections
from layerprune.gate import Gate
from layerprune.models import build


class Layer(nn.Module):
    """A residual MLP block that no one has heard of."""

    def __init__(self, width=8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))

    def forward(self, x):
        return x + self.inner(self.norm(x))


class Encoder(nn.Module):
    """A stack that calls its layers with further arguments."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(3)
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x, mask, padding):
        for layer in self.layers:
            x = layer(x, mask, src_key_padding_mask=padding)
        return self.head(x.mean(1))


def _shifted(model):
    """Weights and statistics away from their initial values, so that every branch matters."""
    generator = torch.Generator().manual_seed(11)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.add_(0.2 * torch.rand(value.shape, generator=generator))
    return model


def _relu(*, before):
    """A section with a ReLU behind what may or may not be negative."""
    parts = [nn.Linear(4, 6), *before, GatedResidual(nn.Linear(6, 6), activation="relu")]
    return nn.Sequential(*parts, nn.Linear(6, 3))


def _encoder_inputs():
    padding = torch.zeros(4, 5, dtype=torch.bool)
    padding[1, 3:] = True
    return torch.randn(4, 5, 8), torch.zeros(5, 5), padding


def _small_resnet(block):
    width = 4 * block.expansion

    def stage(inputs, planes, stride):
        down = nn.Sequential(
            nn.Conv2d(inputs, planes * block.expansion, 1, stride, bias=False),
            nn.BatchNorm2d(planes * block.expansion),
        )
        return nn.Sequential(
            block(inputs, planes, stride, down), block(planes * block.expansion, planes)
        )

    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        stage(width, 4, 1),
        stage(width, 8, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * block.expansion, 3),
    )


CASES = {
    "identity": (lambda: _relu(before=[]), lambda: torch.randn(5, 4)),
    "known non-negative": (lambda: _relu(before=[nn.ReLU()]), lambda: torch.randn(5, 4)),
    "behind dropout": (
        lambda: _relu(before=[nn.ReLU(), nn.Dropout(0.5), nn.Identity()]),
        lambda: torch.randn(5, 4),
    ),
    "sign unknown": (lambda: _relu(before=[nn.ReLU(), nn.LayerNorm(6)]), lambda: torch.randn(5, 4)),
    "projection": (
        lambda: nn.Sequential(
            GatedResidual(nn.Linear(4, 6), nn.Linear(4, 6), nn.ReLU()),
            GatedResidual(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()),
            GatedResidual(nn.Linear(6, 3), nn.Linear(6, 3)),
        ),
        lambda: torch.randn(5, 4),
    ),
    "resnet, option A": (
        lambda: build("resnet20", in_channels=1, image_size=8, width=4),
        lambda: torch.randn(3, 1, 8, 8),
    ),
    "resnet, option B": (
        lambda: build("resnet20", in_channels=1, image_size=8, width=4, shortcut="B"),
        lambda: torch.randn(3, 1, 8, 8),
    ),
    "lenet": (lambda: build("lenet5"), lambda: torch.randn(2, 1, 28, 28)),
    "BasicBlock": (lambda: _small_resnet(BasicBlock), lambda: torch.randn(3, 1, 8, 8)),
    "Bottleneck": (lambda: _small_resnet(Bottleneck), lambda: torch.randn(3, 1, 8, 8)),
    "opaque": (
        lambda: nn.Sequential(nn.Linear(4, 8), Layer(), Layer(), nn.ReLU(), nn.Linear(8, 2)),
        lambda: torch.randn(5, 4),
    ),
    "encoder": (Encoder, _encoder_inputs),
}


@pytest.fixture(params=CASES)
def case(request):
    builder, inputs = CASES[request.param]
    torch.manual_seed(0)
    return _shifted(builder()), inputs()


def _gated(model, example, names):
    """A copy whose gates of the named sections are at 0."""
    model = copy.deepcopy(model)
    for section in find_sections(model, example):
        gate = Gate(section.name)
        gate.is_open = section.name not in names
        section.attach(gate)
    return model


def test_outputs_are_bit_equal(case):
    """Each section alone, and all together: the model gated at 0 against the compacted one."""
    model, example = case
    names = [section.name for section in find_sections(model, example)]
    assert names
    inputs = example if isinstance(example, tuple) else (example,)
    for gone in [[name] for name in names] + [names, []]:
        gated = _gated(model, example, gone).eval()
        compacted = eliminate_sections(copy.deepcopy(model), gone, example).eval()
        assert verify(gated, compacted, [example]) == 0.0
        assert gated(*inputs).equal(compacted(*inputs))
        if gone:
            assert verify(model, compacted, [example]) > 0
        left = dict(model.named_parameters())
        for name, parameter in compacted.named_parameters():
            assert parameter.equal(left[name]), name
        for name, value in compacted.state_dict().items():
            assert value.equal(model.state_dict()[name]), name


def test_only_the_branch_goes(case):
    model, example = case
    for section in find_sections(model, example):
        compacted = eliminate_sections(copy.deepcopy(model), [section.name], example)
        branch = {id(p) for p in section.branch_parameters()}
        expected = [name for name, p in model.named_parameters() if id(p) not in branch]
        assert [name for name, _ in compacted.named_parameters()] == expected


def test_the_activation_stays_where_the_input_may_be_negative():
    model = _relu(before=[])
    eliminate_sections(model, ["1"], torch.zeros(2, 4))
    assert any(isinstance(module, nn.ReLU) for module in model[1].modules())
    x = torch.randn(50, 4)
    assert bool((model[0](x) < 0).any()) and bool((model[1](model[0](x)) >= 0).all())


def test_a_redundant_activation_goes():
    model = _relu(before=[nn.ReLU(), nn.Flatten(), nn.Dropout()])
    eliminate_sections(model, ["4"], torch.zeros(2, 4))
    assert type(model[4]) is nn.Identity


def test_a_chain_of_eliminated_sections_keeps_one_activation():
    blocks = [GatedResidual(nn.Linear(4, 4), activation="relu") for _ in range(3)]
    model = nn.Sequential(nn.Linear(4, 4), *blocks)
    x = torch.randn(20, 4)
    names = ["1", "2", "3"]
    gated = _gated(model, x, names).eval()
    eliminate_sections(model, names, x)
    assert verify(gated, model, [x]) == 0.0
    assert sum(isinstance(module, nn.ReLU) for module in model.modules()) == 1


class Shared(nn.Module):
    """One block under two parents."""

    def __init__(self):
        super().__init__()
        block = GatedResidual(nn.Linear(4, 4), activation="relu")
        self.first = nn.Sequential(nn.ReLU(), block)
        self.second = nn.Sequential(nn.Linear(4, 4), block)

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize("kind", ["two parents", "twice in a row"])
def test_a_section_in_two_places(kind):
    """It leaves both; what its input is known to be must hold in both."""
    torch.manual_seed(0)
    block = GatedResidual(nn.Linear(4, 4), activation="relu")
    model = Shared() if kind == "two parents" else nn.Sequential(nn.ReLU(), block, block)
    x = torch.randn(20, 4)
    (section,) = find_sections(model, x)
    gated = _gated(model, x, [section.name]).eval()
    expected = gated(x)
    eliminate_sections(model, [section.name], x)
    assert not any(isinstance(module, GatedResidual) for module in model.modules())
    assert model.eval()(x).equal(expected)


def test_training_flags_of_what_remains_are_kept():
    shortcut = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = nn.Sequential(GatedResidual(nn.Linear(4, 4), shortcut), nn.Linear(4, 2)).train()
    shortcut[1].eval()
    eliminate_sections(model, ["0"], torch.zeros(2, 4))
    assert not shortcut[1].training
    assert shortcut[0].training and model[0].training


OPTIMIZERS = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01, foreach=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_optimizer_forgets_the_branch_alone(kind):
    """Survivors' state: the same tensors, bit for bit; groups: same number, options, order."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6),
        GatedResidual(nn.Linear(6, 6), nn.Linear(6, 6), "relu"),
        GatedResidual(nn.Linear(6, 6), activation="relu"),
        nn.Linear(6, 3),
    )
    sections = find_sections(model, torch.zeros(2, 4))
    gone = [p for section in sections for p in section.branch_parameters()]
    alone = sections[1].module.branch.weight
    weights = [p for p in model.parameters() if p.dim() > 1 and p is not alone]
    biases = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": weights, "weight_decay": 0.1},
        {"params": biases, "weight_decay": 0.0, "lr": 0.3},
        {"params": [torch.zeros(2, requires_grad=True)]},
        {"params": [alone], "weight_decay": 0.5},
    ]
    optimizer = OPTIMIZERS[kind](groups)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    lists = [group["params"] for group in optimizer.param_groups]
    before = {p: dict(optimizer.state[p]) for p in optimizer.state}
    copies = copy.deepcopy([list(state.values()) for state in before.values()])
    expected = [
        [p for p in group["params"] if not any(p is q for q in gone)]
        for group in optimizer.param_groups
    ]

    remove_sections(model, sections, [optimizer])

    assert [
        {k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups
    ] == options
    for group, was, wanted in zip(optimizer.param_groups, lists, expected, strict=True):
        assert group["params"] is was
        assert [id(p) for p in group["params"]] == [id(p) for p in wanted]
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, 3, 1, 0]
    assert not any(p in optimizer.state for p in gone)
    for (parameter, state), values in zip(before.items(), copies, strict=True):
        if any(parameter is p for p in gone):
            continue
        for (key, value), copied in zip(state.items(), values, strict=True):
            now = optimizer.state[parameter][key]
            assert now is value
            assert torch.equal(now, copied) if isinstance(now, torch.Tensor) else now == copied
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    schedule.step()
    fresh = OPTIMIZERS[kind]([{"params": list(g["params"])} for g in optimizer.param_groups])
    fresh.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("name", ["nowhere", "0", ""])
def test_a_name_that_is_no_section(name):
    model = _relu(before=[])
    with pytest.raises(ValueError, match=r"no section of this model; it has \['1'\]"):
        eliminate_sections(model, ["1", name], torch.zeros(2, 4))
    assert isinstance(model[1], GatedResidual)


def test_verify():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    other = copy.deepcopy(model)
    other[0].bias.data[0] += 0.25
    model.train()
    model[1].eval()
    batches = [torch.randn(4, 3), torch.zeros(2, 3)]
    assert verify(model, model, batches) == 0.0
    assert verify(model, other, batches) == pytest.approx(0.25, abs=1e-6)
    assert model[0].training and not model[1].training
    other[0].bias.data[0] = float("nan")
    assert verify(model, other, batches) == float("inf")
    with pytest.raises(ValueError, match="empty"):
        verify(model, model, [])
    with pytest.raises(ValueError, match="shapes"):
        verify(model, nn.Linear(3, 5), batches)


def test_strip_leaves_no_trace(case):
    """Exact classes, no attribute, no hook; evaluation as before."""
    model, example = case
    plain = copy.deepcopy(model)
    classes = {name: type(module) for name, module in model.named_modules()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    inputs = example if isinstance(example, tuple) else (example,)
    pruner = LayerPruner(
        model, example_inputs=example, total_steps=100, strength=0.1, cost="uniform"
    )
    assert model.eval()(*inputs).equal(plain.eval()(*inputs))
    model.train()
    out = model(*inputs)
    (out.square().sum() if isinstance(out, torch.Tensor) else 0).backward()
    pruner._run.bank.theta.fill_(1.0)
    pruner._run.bank.advance()
    assert pruner.strip() is model
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    plain.load_state_dict(model.state_dict())
    assert model.eval()(*inputs).equal(plain.eval()(*inputs))


def test_strip_removes_what_evaluation_leaves_out(case):
    model, example = case
    inputs = example if isinstance(example, tuple) else (example,)
    pruner = LayerPruner(
        model, example_inputs=example, total_steps=100, strength=0.1, cost="uniform"
    )
    pruner._run.bank.theta[::2] = 0.3
    pruner._run.bank.advance()
    expected = model.eval()(*inputs)
    count = sum(p.numel() for p in model.parameters())
    plain = pruner.strip()
    assert plain(*inputs).equal(expected)
    gone = sum(info.parameters for info in pruner.sections[::2])
    assert sum(p.numel() for p in plain.parameters()) == count - gone > 0
