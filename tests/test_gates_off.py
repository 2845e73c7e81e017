"""When the last decision has fallen the model trains on without gates, as a plain one."""

import copy

import torch
from torch import nn

from layerprune import GatedResidual, LayerPruner
from layerprune.sections.placeholders import Nothing

WIDTH, ROWS, STEPS = 6, 16, 80


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.one(self.norm1(x))
        return x + self.two(self.norm2(x))


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.inner(x))


def make():
    torch.manual_seed(0)
    parts = [Block(), Whole(), GatedResidual(nn.Linear(WIDTH, WIDTH)), Block(), Whole()]
    return nn.Sequential(*parts, nn.Linear(WIDTH, 3))


def step(model, optimizer, pruner, number):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(ROWS, WIDTH, generator=generator)
    loss = nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
    loss.backward()
    optimizer.step()
    if pruner is not None:
        pruner.step(optimizer)
    optimizer.zero_grad()
    return float(loss.detach())


def run():
    """A run up to the step at which nothing is open any more, in cool-down."""
    model = make()
    options = {"example_inputs": torch.zeros(2, WIDTH), "total_steps": STEPS, "strength": 0.02}
    pruner = LayerPruner(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    number = 0
    while pruner.phase != "cool-down" or any(s.status == "open" for s in pruner.sections):
        step(model, optimizer, pruner, number)
        number += 1
    return model, pruner, optimizer, number, options


def test_nothing_of_the_gates_is_left():
    model, pruner, optimizer, number, _ = run()
    kept = [info.name for info in pruner.sections if info.status == "settled"]
    assert kept and number < STEPS - 10
    dense = {type(module) for module in make().modules()}
    assert {type(module) for module in model.modules()} - dense <= {nn.Identity, Nothing}
    assert len(model._forward_pre_hooks) == 1 and not model._forward_hooks

    plain = copy.deepcopy(model)
    other = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    spent = pruner.ledger.train_flops
    for k in range(number, STEPS):
        assert step(model, optimizer, pruner, k) == step(plain, other, None, k)
    assert pruner.step_count == STEPS
    # The ledger goes on: three forwards' worth a step of what is left.
    left = sum(info.flops for info in pruner.sections if info.status == "settled")
    head = 2 * WIDTH * 3
    assert pruner.ledger.train_flops - spent == 3 * ROWS * (left + head) * (STEPS - number)


def test_a_section_can_still_be_measured():
    model, pruner, *_ = run()
    x = torch.randn(ROWS, WIDTH)
    for info in (info for info in pruner.sections if info.status == "settled"):
        types = [type(module) for module in model.modules()]
        found = pruner.difference(info.name, lambda: model(x).square().mean())
        without = copy.deepcopy(model).eval()
        parent = without.get_submodule(info.name)
        if info.kind == "opaque":
            parent.forward = lambda x: x
        elif info.kind == "residual":
            parent.branch.forward = torch.zeros_like
        else:
            parent.forward = torch.zeros_like
        model.eval()
        expected = model(x).square().mean() - without(x).square().mean()
        model.train()
        torch.testing.assert_close(found, float(expected.detach()), rtol=1e-4, atol=1e-6)
        assert [type(module) for module in model.modules()] == types


def test_a_run_resumes_without_gates():
    model, pruner, optimizer, number, options = run()
    for k in range(number, number + 3):
        step(model, optimizer, pruner, k)
    again = make()
    resumed = LayerPruner(again, **options)
    resumed.load_state_dict(copy.deepcopy(pruner.state_dict()))
    again.load_state_dict(model.state_dict())
    other = torch.optim.SGD(again.parameters(), lr=0.1, momentum=0.9)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for k in range(number + 3, STEPS):
        assert step(again, other, resumed, k) == step(model, optimizer, pruner, k)
    kinds = [[type(module) for module in each.modules()] for each in (again, model)]
    assert kinds[0] == kinds[1]
    assert resumed.ledger.train_flops == pruner.ledger.train_flops
    assert pruner.strip()(torch.zeros(2, WIDTH)).equal(resumed.strip()(torch.zeros(2, WIDTH)))
