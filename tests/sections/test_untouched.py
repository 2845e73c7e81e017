"""A survey leaves a model as it was, whatever that keeps or refuses, and finds its sections."""

import functools
import random

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.swa_utils import AveragedModel

from layerprune import LayerPruner, eliminate_sections, survey, verify
from layerprune.gate import Gate

WIDTH = 6
X = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH)

    def forward(self, x):
        return self.two(self.one(x).relu())


class Block(nn.Module):
    """Two branches, each with an identity behind it, as an empty Sequential often is one."""

    def __init__(self):
        super().__init__()
        self.norm, self.again = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mixer, self.mlp = Mlp(), Mlp()
        self.here, self.there = nn.Sequential(), nn.Sequential()

    def forward(self, x):
        x = x + self.here(self.mixer(self.norm(x)))
        return x + self.there(self.mlp(self.again(x)))


class Net(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks or (Block(), Block()))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@functools.lru_cache
def table(width):
    return torch.linspace(0.5, 1.5, width)


def _cached(function):
    """As transformers' decorator: the cache is in a closure."""
    found = functools.lru_cache(maxsize=4)(function)

    @functools.wraps(function)
    def wrapper(*arguments):
        return found(*arguments)

    return wrapper


class Keeps(Net):
    """Tables that are made in the first forward, in five ways to keep one."""

    def __init__(self):
        super().__init__()
        self.attribute, self.by_width = None, {}

    @staticmethod
    @_cached
    def static(width):
        return torch.linspace(0.2, 1.0, width)

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def method(self, width):
        return torch.linspace(0.1, 1.0, width)

    def forward(self, x):
        width = x.shape[1]
        if self.attribute is None:
            self.attribute = torch.ones(width)
            self.register_buffer("late", torch.ones(width))
        if width not in self.by_width:
            self.by_width[width] = torch.linspace(0.9, 1.0, width)
        scale = self.attribute * self.by_width[width] * table(width) * self.late
        return super().forward(x) * scale * self.static(width) * self.method(width)


def test_tables_of_the_first_forward_are_none_of_the_survey():
    torch.manual_seed(0)
    model = Keeps()
    pruner = LayerPruner(model, example_inputs=X, total_steps=50, strength=0.01)
    assert model.attribute is None and not model.by_width and not hasattr(model, "late")
    assert len(pruner.sections) == 4
    y = model(X)
    assert not isinstance(y, FakeTensor)
    y.sum().backward()
    assert not any(isinstance(p.grad, FakeTensor) for p in model.parameters())
    assert not any(isinstance(kept, FakeTensor) for kept in (model.attribute, model.late))


class Counts(Net):
    """Cannot be faked, and puts new tensors in its buffer's place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        if x.sum().item() > 1e9:
            return x
        self.count = self.count + 1
        return super().forward(x)


def test_a_real_forward_leaves_the_buffers():
    model = Counts()
    buffer, state = model.count, torch.get_rng_state()
    assert len(survey(model, X).sections) == 4
    assert model.count is buffer and buffer == 0
    assert torch.get_rng_state().equal(state)


class Choosy(Block):
    """Takes no other module in its MLP's place."""

    def __setattr__(self, name, value):
        if name == "mlp" and not isinstance(value, Mlp):
            raise TypeError("mlp must be an Mlp")
        super().__setattr__(name, value)


class Registered(Mlp):
    """Its subclasses have to say what they are called."""

    known = []

    def __init_subclass__(cls, *, tag, **options):
        cls.known.append(tag)


def _with(mlp):
    block = Block()
    block.mlp = mlp
    return block


@pytest.mark.parametrize("real", [False, True])
def test_a_trial_that_fails_midway_is_undone(real):
    model = (Counts if real else Net)()
    model.blocks.append(Choosy())
    before = [(name, module, type(module)) for name, module in model.named_modules()]
    found = survey(model, X)
    assert [(name, module, type(module)) for name, module in model.named_modules()] == before
    assert [section.name for section in found.sections][-1] == "blocks.2"
    assert found.sections[-1].kind == "opaque", "its parts cannot go"


def test_no_register_of_subclasses_hears_of_a_gate():
    model = Net(_with(Registered()), Block())
    assert len(survey(model, X).sections) == 4
    LayerPruner(model, example_inputs=X, total_steps=50, strength=0.01)
    assert not Registered.known
    assert model(X).shape == X.shape


def test_scripted_modules_are_run_as_they_are():
    model = Net(Block(), _with(torch.jit.script(Mlp())))
    found = survey(model, X)
    assert {"blocks.0.mixer", "blocks.0.mlp"} <= {section.name for section in found.sections}
    assert not any(module._forward_hooks for module in model.modules())


def test_an_identity_without_children_is_a_link_as_any():
    torch.manual_seed(0)
    model = Net()
    average = AveragedModel(model)
    pruner = LayerPruner(model, example_inputs=X, total_steps=50, strength=0.01, ema=average)
    pruner._run.bank.theta.copy_(torch.tensor([0.0, 1.0, 1.0, 1.0]))
    pruner._run.bank.advance()
    model.eval(), average.eval()
    expected = model(X)
    assert average(X).equal(expected)
    pruner._eliminate([0], [])
    assert average(X).equal(expected) and model(X).equal(expected)


class Together(Net):
    """Runs without the blocks of either class, and not without those of both."""

    def forward(self, x):
        y = super().forward(x) + self.blocks[2].mlp.one.weight.sum() * 0
        held = [p.flatten() for block in self.blocks[:2] for p in block.parameters()]
        return y + torch.cat(held).sum() * 0


def test_what_is_found_runs_together():
    class One(Block):
        pass

    class Another(Block):
        pass

    model = Together(One(), Another(), Block())
    found = survey(model, X)
    names = [section.name for section in found.sections]
    assert names and "blocks.2" in found.left_out
    eliminate_sections(model, names, X)(X)


class Pairs(Net):
    def forward(self, x):
        assert len(x) % 2 == 0, "rows come in pairs"
        return super().forward(x)


def test_rows_that_come_in_pairs():
    model = Pairs()
    found = survey(model, X)
    # A gate leaves an odd number of rows to a block, but the model has its even one.
    assert len(found.sections) == 4


def test_many_tensors_are_no_reason_to_try_long():
    """Of ten further ones not every choice is tried."""
    calls = []

    class Refuses(Net):
        def forward(self, x, *more):
            calls.append(len(x))
            raise RuntimeError("never")

    with pytest.raises(ValueError, match="does not run with 4 rows of example_inputs.*: never"):
        survey(Refuses(), [X] + [torch.zeros(4) for _ in range(10)])
    assert len(calls) < 300


@pytest.mark.parametrize("seed", range(3))
def test_gates_of_random_choice_equal_the_removal(seed):
    torch.manual_seed(seed)
    model, chance = Net(Block(), _with(nn.Sequential(Mlp())), Block()).eval(), random.Random(seed)
    names = [section.name for section in survey(model, X).sections]
    gone = chance.sample(names, 3)
    compacted = eliminate_sections(Net(Block(), _with(nn.Sequential(Mlp())), Block()), gone, X)
    compacted.load_state_dict(model.state_dict(), strict=False)
    for section in survey(model, X).sections:
        gate = Gate(section.name)
        gate.is_open = section.name not in gone
        section.attach(gate)
    assert verify(model, compacted, [X]) == 0.0
