"""Every learning-rate scheduler across eliminations: rates as without, also of a resumed run."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as kinds
from torch.optim import swa_utils

from layerprune import GatedResidual, LayerPruner

STEPS = 40
RESUMED = 30


def _sequence(optimizer):
    parts = [kinds.LinearLR(optimizer, total_iters=4), kinds.CosineAnnealingLR(optimizer, 10)]
    return kinds.SequentialLR(optimizer, parts, milestones=[5])


def _chain(optimizer):
    parts = [kinds.ConstantLR(optimizer, total_iters=6), kinds.ExponentialLR(optimizer, 0.9)]
    return kinds.ChainedScheduler(parts, optimizer)


SCHEDULERS = {
    "LambdaLR": lambda o: kinds.LambdaLR(o, lambda step: 0.95**step),
    "MultiplicativeLR": lambda o: kinds.MultiplicativeLR(o, lambda step: 1 - 0.01 * step),
    "StepLR": lambda o: kinds.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: kinds.MultiStepLR(o, [2, 7, 33], 0.5),
    "ConstantLR": lambda o: kinds.ConstantLR(o, 0.25, 35),
    "LinearLR": lambda o: kinds.LinearLR(o, 0.1, 1.0, 36),
    "ExponentialLR": lambda o: kinds.ExponentialLR(o, 0.9),
    "SequentialLR": _sequence,
    "CosineAnnealingLR": lambda o: kinds.CosineAnnealingLR(o, 35, 1e-3),
    "ChainedScheduler": _chain,
    "ReduceLROnPlateau": lambda o: kinds.ReduceLROnPlateau(o, factor=0.5, patience=1, cooldown=1),
    "CyclicLR": lambda o: kinds.CyclicLR(o, 0.01, 0.1, 4, mode="triangular2"),
    "CosineAnnealingWarmRestarts": lambda o: kinds.CosineAnnealingWarmRestarts(o, 5, 2),
    "OneCycleLR": lambda o: kinds.OneCycleLR(o, 0.2, total_steps=STEPS + 1),
    "PolynomialLR": lambda o: kinds.PolynomialLR(o, 35, 2.0),
    "SWALR": lambda o: swa_utils.SWALR(o, [0.02, 0.05, 0.01], anneal_epochs=12),
}


def test_none_is_forgotten():
    known = {
        name
        for module in (kinds, swa_utils)
        for name, kind in vars(module).items()
        if inspect.isclass(kind)
        and issubclass(kind, kinds.LRScheduler)
        and not name.startswith("_")
    }
    assert known - {"LRScheduler"} == SCHEDULERS.keys()


def _parts():
    """A model and its pruner, by which no section is worth its place."""
    torch.manual_seed(0)
    sections = [GatedResidual(nn.Linear(4, 4)) for _ in range(3)]
    model = nn.Sequential(nn.Linear(3, 4), *sections, nn.Linear(4, 2))
    pruner = LayerPruner(
        model, example_inputs=torch.zeros(2, 3), total_steps=STEPS, strength=1000.0
    )
    return model, pruner


def _optimizer(model):
    """Three groups, of which eliminations empty one."""
    sections = [p for part in model[1:4] for p in part.parameters()]
    groups = [
        {"params": sections, "lr": 0.02},
        {"params": model[0].parameters(), "lr": 0.05},
        {"params": model[4].parameters()},
    ]
    return torch.optim.SGD(groups, lr=0.01, momentum=0.9)


def _rates(optimizer):
    return [(group["lr"], group["momentum"]) for group in optimizer.param_groups]


def _advance(scheduler, step):
    if isinstance(scheduler, kinds.ReduceLROnPlateau):
        scheduler.step([1.0, 0.5, 0.5, 0.5, 0.5, 0.4, 0.6][step % 7] / (1 + step // 14))
    else:
        scheduler.step()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_rates_are_those_without_eliminations(name):
    model, _ = _parts()
    optimizer = _optimizer(model)
    scheduler = SCHEDULERS[name](optimizer)
    expected = []
    for step in range(STEPS):
        optimizer.step()
        _advance(scheduler, step)
        expected.append(_rates(optimizer))
    assert len({tuple(rates) for rates in expected}) > 1

    model, pruner = _parts()
    optimizer = _optimizer(model)
    scheduler = SCHEDULERS[name](optimizer)
    found, changes = [], []
    for step in range(STEPS):
        if step == RESUMED:
            assert changes
            states = copy.deepcopy(
                [part.state_dict() for part in (pruner, model, optimizer, scheduler)]
            )
            model, pruner = _parts()
            pruner.load_state_dict(states[0])
            optimizer = _optimizer(model)
            scheduler = SCHEDULERS[name](optimizer)
            for part, state in zip((model, optimizer, scheduler), states[1:], strict=True):
                part.load_state_dict(state)
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
        # Bounded, whatever the rate.
        model(x).tanh().mean().backward()
        optimizer.step()
        changes += [step] * pruner.step(optimizer).changed
        optimizer.zero_grad()
        _advance(scheduler, step)
        found.append(_rates(optimizer))
    assert found == expected
    assert pruner.structure()["eliminated"] == ["1", "2", "3"]
    assert optimizer.param_groups[0]["params"] == []
