"""What a training state may hold: all that torch's own optimizers and schedules write down."""

import collections
import inspect

import pytest
import torch
from torch.optim import lr_scheduler

from layerprune.training.untrusted import read_torch, write_torch

NEEDED = {
    "MultiStepLR": {"milestones": [1, 2, 2]},
    "StepLR": {"step_size": 2},
    "LambdaLR": {"lr_lambda": lambda epoch: 1.0},
    "MultiplicativeLR": {"lr_lambda": lambda epoch: 1.0},
    "ExponentialLR": {"gamma": 0.9},
    "CosineAnnealingLR": {"T_max": 5},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 0.2},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 9},
}
SCHEDULES = [
    name
    for name, found in vars(lr_scheduler).items()
    if inspect.isclass(found)
    and issubclass(found, lr_scheduler.LRScheduler)
    and found is not lr_scheduler.LRScheduler
    and not name.startswith("_")
]


def _read_back(value, tmp_path):
    torch.save({"value": value}, tmp_path / "training.pt")
    return read_torch(tmp_path / "training.pt")["value"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_state_of_every_schedule_is_read_back(name, tmp_path):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    kind = getattr(lr_scheduler, name)
    inner = [lr_scheduler.ConstantLR(optimizer), lr_scheduler.MultiStepLR(optimizer, [1])]
    if name == "SequentialLR":
        schedule = kind(optimizer, inner, milestones=[2])
    elif name == "ChainedScheduler":
        schedule = kind(inner)
    else:
        schedule = kind(optimizer, **NEEDED.get(name, {}))
    state = schedule.state_dict()
    assert repr(_read_back(state, tmp_path)) == repr(state)


@pytest.mark.parametrize(
    "value",
    [
        collections.Counter("aab"),
        {1, 2},
        2j,
        torch.amp.GradScaler("cpu").state_dict(),
        torch.get_rng_state(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_plain_values_are_read_back(value, tmp_path):
    found = _read_back(value, tmp_path)
    assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value


def nested(levels, kind=list):
    """Containers that hold the next one twice: a few hundred bytes, and 2 ** levels to copy."""
    value = kind()
    for _ in range(levels):
        value = kind({1: value, 2: value}) if kind is not list else [value, value]
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(1).expand(1, 3 << 30), r"shape \[1, 3221225472\] has only 4 bytes"),
        ([{1: (torch.ones(2, 2)[:1].expand(3, 2),)}], r"shape \[3, 2\] has only 16 bytes"),
        (nested(24), "more than 4194304 values"),
        (nested(24, collections.OrderedDict), "more than 4194304 values"),
    ],
    ids=["giant", "within containers", "lists", "mappings"],
)
def test_what_would_grow_in_memory_is_neither_read_nor_written(value, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        _read_back(value, tmp_path)
    with pytest.raises(ValueError, match=message):
        write_torch(value, tmp_path / "training.pt")


def test_views_of_tensors_are_read_back(tmp_path):
    whole = torch.arange(6.0)
    found = _read_back([whole, whole[::2], whole.view(2, 3).T, whole[:0].expand(9, 0)], tmp_path)
    assert [tensor.tolist() for tensor in found[1:3]] == [[0, 2, 4], [[0, 3], [1, 4], [2, 5]]]
