"""Models of unusual form: what is gated in them, what is not, and that it says why."""

import copy

import pytest
import torch
import torchvision
from torch import nn

import layerprune
from layerprune import GatedResidual, LayerPruner, survey
from layerprune.compaction import branch_keys, eliminate_sections, verify
from layerprune.gate import Gate

WIDTH, ROWS = 6, 8
REUSED = (
    "blocks.0.norm is called more than once; as a whole: it is called more than once in a forward"
)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(WIDTH, 9), nn.GELU(), nn.Linear(9, WIDTH)

    def forward(self, x):
        return self.last(self.act(self.first(x)))


class Block(nn.Module):
    """A residual block; a tuple as transformers' layers returned it for years."""

    def __init__(self, as_tuple=False):
        super().__init__()
        self.norm, self.mlp, self.as_tuple = nn.LayerNorm(WIDTH), Mlp(), as_tuple

    def forward(self, x):
        y = x + self.mlp(self.norm(x))
        return (y, None) if self.as_tuple else y


class TwoBranches(nn.Module):
    def __init__(self, norm_last=False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mixer, self.mlp, self.norm_last = nn.Linear(WIDTH, WIDTH), Mlp(), norm_last

    def forward(self, x):
        if self.norm_last:
            x = self.norm1(x + self.mixer(x))
            return self.norm2(self.mlp(x) + x)
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attributes(nn.Module):
    """Its blocks stand in no container."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = Block(), Block(), nn.Linear(WIDTH, 2)

    def forward(self, x):
        return self.head(self.two(self.one(x)))


class Tuples(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block(as_tuple=True) for _ in range(3))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x):
        for layer in self.layers:
            x, _ = layer(x)
        return self.head(x)


class Nested(nn.Module):
    """Blocks within a block, and a skip around all of them."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x):
        return self.head(x + self.inner(x))


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x):
        for block in (*self.blocks, self.blocks[0]):
            x = block(x)
        return self.head(x)


class Talking(nn.Module):
    """The first block's second result is an argument of the second block."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = Mlp()

        def forward(self, x, before):
            y = self.mlp(x) if before is None else self.mlp(x) * before
            return x + y, y.sigmoid()

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(2))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x):
        before = None
        for layer in self.layers:
            x, before = layer(x, before)
        return self.head(x)


class InPlace(nn.Module):
    """Adds in place to what the branch gave, as EfficientNet's blocks do; and shares a module."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.0)
        self.one, self.two, self.head = Mlp(), Mlp(), nn.Linear(WIDTH, 2)

    def forward(self, x):
        y = self.drop(self.one(x))
        y += x
        z = self.drop(self.two(y))
        z += y
        return self.head(z)


class EndsInPlace(TwoBranches):
    """As Gemma 4's layers, which scale the stream in place."""

    def forward(self, x):
        x = super().forward(x)
        x *= 0.5
        return x


class Parallel(TwoBranches):
    """As Falcon's layers: a sum in place is the very tensor that the MLP returned."""

    def forward(self, x):
        y = self.mlp(self.norm2(x))
        y += self.mixer(self.norm1(x))
        return y + x


class SharedNorm(TwoBranches):
    """One norm in front of both branches, whose sum is added, as in Phi's and GPT-J's layers."""

    def forward(self, x):
        y = self.norm1(x)
        return self.mixer(y) + self.mlp(y) + x


class SharedNormInTurn(TwoBranches):
    """The branches are added one after the other, as in Cohere's layers."""

    def forward(self, x):
        y = self.norm1(x)
        return x + self.mixer(y) + self.mlp(y)


class Adapted(nn.Module):
    """A linear map with an adapter of low rank."""

    def __init__(self):
        super().__init__()
        self.base, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.up = nn.Linear(2, WIDTH)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class AdaptedMixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = Adapted(), Adapted()

    def forward(self, x):
        return self.two(self.one(x).tanh())


def mixing(mixer):
    block = TwoBranches()
    block.mixer = mixer
    return block


class LooksInside(TwoBranches):
    """As mT5's layers, it asks a module of its own for the type of its weights."""

    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        dtype = self.mlp.last.weight.dtype
        return x + self.mlp(self.norm2(x)).to(dtype)


class LooksIntoBlocks(nn.Module):
    """Its forward asks the first block."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([LooksInside(), Block(), LooksInside()])
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x):
        x = x.to(self.blocks[0].mlp.last.weight.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class KeepsAList(Attributes):
    """Calls its blocks by another way than their names."""

    def __init__(self):
        super().__init__()
        self.calls = [self.one]

    def forward(self, x):
        for block in (*self.calls, self.two):
            x = block(x)
        return self.head(x)


def residual(*blocks):
    return nn.Sequential(*blocks, nn.Linear(WIDTH, 2))


def found(model):
    result = survey(model, torch.randn(2, WIDTH))
    return {section.name: section.kind for section in result.sections}, result.left_out


CASES = {
    "attributes": (Attributes, {"one": "opaque", "two": "opaque"}),
    "tuples": (Tuples, {f"layers.{i}": "opaque" for i in range(3)}),
    "two branches": (
        lambda: residual(TwoBranches(), TwoBranches()),
        {f"{i}.{part}": "branch" for i in range(2) for part in ("mixer", "mlp")},
    ),
    "norm last": (
        lambda: residual(TwoBranches(norm_last=True)),
        {"0.mixer": "branch", "0.mlp": "branch"},
    ),
    "ends in place": (
        lambda: residual(EndsInPlace(), EndsInPlace()),
        {f"{i}.{part}": "branch" for i in range(2) for part in ("mixer", "mlp")},
    ),
    "parallel": (lambda: residual(Parallel()), {"0.mixer": "branch", "0.mlp": "branch"}),
    "shared norm": (
        lambda: residual(SharedNorm(), SharedNorm()),
        {f"{i}.{part}": "branch" for i in range(2) for part in ("mixer", "mlp")},
    ),
    "shared norm in turn": (
        lambda: residual(SharedNormInTurn(), SharedNormInTurn()),
        {f"{i}.{part}": "branch" for i in range(2) for part in ("mixer", "mlp")},
    ),
    "adapters": (
        lambda: residual(mixing(AdaptedMixer())),
        {"0.mixer": "branch", "0.mlp": "branch"},
    ),
    "looks inside": (
        lambda: residual(LooksInside(), LooksInside()),
        {"0": "opaque", "1": "opaque"},
    ),
    "in place": (InPlace, {"one": "branch", "two": "branch"}),
    "beside own sections": (
        lambda: residual(GatedResidual(nn.Linear(WIDTH, WIDTH)), Block()),
        {"0": "residual", "1": "opaque"},
    ),
    "beside plain blocks": (lambda: residual(Block(), Mlp()), {"0": "opaque"}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_found(name):
    make, expected = CASES[name]
    assert found(make()) == (expected, {})


def test_adapters_in_a_sequence():
    """Its elements are blocks of their own, so that the branch around them has no gate."""
    torch.manual_seed(0)
    model = residual(mixing(nn.Sequential(Adapted(), nn.GELU(), Adapted()))).eval()
    sections, left_out = found(model)
    assert sections == {"0.mixer.0": "opaque", "0.mixer.2": "opaque", "0.mlp": "branch"}
    assert left_out == {"0": "its branch holds other sections"}
    x = torch.randn(ROWS, WIDTH)
    compacted = eliminate_sections(copy.deepcopy(model), [*sections], x)
    torch.testing.assert_close(compacted(x), model[1](x + nn.GELU()(model[0].norm1(x))))


def test_the_inner_one_of_nested_blocks():
    sections, left_out = found(Nested())
    assert sections == {"inner.0": "opaque", "inner.1": "opaque"}
    assert left_out == {"": "its branch holds other sections"}


def test_what_cannot_be_gated_says_why():
    sections, left_out = found(Reused())
    assert sections == {"blocks.1": "opaque"}
    assert left_out == {"blocks.0": REUSED}
    sections, left_out = found(Talking())
    assert sections == {"layers.1": "opaque"}
    assert left_out == {
        "layers.0": "what layers.0.mlp returns is used by others too; "
        "as a whole: it returns further tensors that others use"
    }
    sections, left_out = found(LooksIntoBlocks())
    assert sections == {"blocks.1": "opaque"}
    assert set(left_out) == {"blocks.0", "blocks.2"}, "what holds for one block holds for its kind"
    assert all("it does not run without it ('" in why for why in left_out.values())
    sections, left_out = found(KeepsAList())
    assert not sections
    assert all("where no module's name leads to" in why for why in left_out.values())


@pytest.mark.parametrize("make", [LooksInside, LooksIntoBlocks, KeepsAList])
def test_looking_leaves_a_model_as_it_is(make):
    model = nn.Sequential(make())
    [*model.modules()][-1].eval()
    before = [(name, module, module.training) for name, module in model.named_modules()]
    found(model)
    assert [(name, module, module.training) for name, module in model.named_modules()] == before
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", CASES)
def test_it_runs_trains_and_is_compacted(name):
    torch.manual_seed(0)
    model = CASES[name][0]()
    dense, x = copy.deepcopy(model), torch.randn(ROWS, WIDTH)
    pruner = LayerPruner(model, example_inputs=x, total_steps=60, strength=0.3, seed=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(60):
        nn.functional.cross_entropy(model(x), torch.arange(ROWS) % 2).backward()
        optimizer.step()
        pruner.step(optimizer)
        optimizer.zero_grad()
    assert all(info.status != "open" for info in pruner.sections)
    gone = pruner.structure()["eliminated"]
    assert gone, "at such a strength nothing pays"
    keys = set(dense.state_dict())
    plain = pruner.strip()
    assert set(plain.state_dict()) < keys
    rebuilt = eliminate_sections(dense, gone, x)
    rebuilt.load_state_dict(plain.state_dict())
    assert verify(rebuilt, plain, [x]) == 0.0


@pytest.mark.parametrize("name", CASES)
def test_a_closed_gate_is_the_compacted_model(name):
    torch.manual_seed(0)
    model = CASES[name][0]().eval()
    x = torch.randn(ROWS, WIDTH)
    sections = survey(model, x).sections
    for chosen in ([sections[0]], [sections[-1]], sections):
        gated = copy.deepcopy(model)
        for section in chosen:
            gate = Gate(section.name)
            gate.is_open = False
            section.in_model(gated).attach(gate)
        names = [section.name for section in chosen]
        compacted = eliminate_sections(copy.deepcopy(model), names, x)
        assert verify(gated, compacted, [x]) == 0.0
        left = set(model.state_dict()) - branch_keys(model, chosen)
        assert set(compacted.state_dict()) == left


def test_a_block_goes_with_its_last_branch():
    model = residual(TwoBranches(), TwoBranches(norm_last=True))
    x = torch.randn(ROWS, WIDTH)
    eliminate_sections(model, ["0.mixer", "0.mlp", "1.mixer", "1.mlp"], x)
    assert type(model[0]) is nn.Identity
    # What is normalised after the addition stays.
    norms = [model[1].norm1, model[1].norm2]
    assert torch.equal(model[:2](x), norms[1](norms[0](x)))


def test_frozen_weights():
    """What is not trained can be found useless as well."""
    torch.manual_seed(0)
    model = residual(*(TwoBranches() for _ in range(2)))
    for block in model[:2]:
        block.requires_grad_(False)
    x = torch.randn(ROWS, WIDTH)
    pruner = LayerPruner(model, example_inputs=x, total_steps=60, strength=0.5)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.02)
    for _ in range(60):
        nn.functional.cross_entropy(model(x), torch.arange(ROWS) % 2).backward()
        optimizer.step()
        pruner.step(optimizer)
        optimizer.zero_grad()
    assert len(pruner.structure()["eliminated"]) == 4
    assert not any(p.grad is not None for block in model[:2] for p in block.parameters())


def test_stochastic_depth_of_its_own():
    setting = torchvision.models.convnext.CNBlockConfig(4, None, 3)
    model = torchvision.models.ConvNeXt([setting], stochastic_depth_prob=0.2, num_classes=2)
    rates = layerprune.stochastic_depth(model)
    assert [round(rate, 6) for rate in rates.values()] == [0.1, 0.2]
    x = torch.randn(2, 3, 16, 16)
    pruner = LayerPruner(model, example_inputs=x, total_steps=100, strength=0.1)
    assert "stochastic depth of its own, up to 20% (features.1.2.stochastic_depth)" in str(pruner)
    pruner.strip()
    assert layerprune.replace_stochastic_depth(model) == rates
    assert layerprune.stochastic_depth(model) == {}


def test_the_table_says_what_has_no_gate():
    pruner = LayerPruner(Reused(), example_inputs=torch.randn(2, WIDTH), total_steps=99, strength=1)
    assert pruner.left_out == {"blocks.0": REUSED}
    assert "blocks.0 has no gate: blocks.0.norm is called more than once" in str(pruner)
