"""FLOPs, dry runs, and the calls they make."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from layerprune import GatedResidual, LayerPruner, find_sections
from layerprune.calls import as_call, batch_size_of, evaluating
from layerprune.cost import forward_flops
from layerprune.dry_run import DryRuns


def _model():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        GatedResidual(
            nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)),
            nn.Conv2d(4, 8, 1, 2),
            "relu",
        ),
        nn.Flatten(),
        nn.Linear(8 * 9, 5),
    )


STEM, BRANCH, SHORTCUT, HEAD = (
    2 * 36 * 4 * 9,
    2 * 9 * 8 * 4 * 9,
    2 * 9 * 8 * 4,
    2 * 72 * 5,
)


@pytest.mark.parametrize("rows", [1, 3])
def test_flops_by_hand(rows):
    """A multiplication and an addition for each weight and output pixel, of one row."""
    model = _model()
    flops = forward_flops(model, torch.zeros(rows, 1, 6, 6))
    assert flops[""] == STEM + BRANCH + SHORTCUT + HEAD
    assert flops["0"] == STEM and flops["3"] == HEAD
    assert flops["1.branch"] == BRANCH and flops["1.shortcut"] == SHORTCUT
    (section,) = find_sections(model, torch.zeros(rows, 1, 6, 6))
    assert section.branch_flops(flops) == BRANCH


def test_known_networks():
    """torchvision's own figures: 1.81e9 and 4.09e9 multiply-adds."""
    for name, expected in (("resnet18", 1.81e9), ("resnet50", 4.09e9)):
        model = getattr(torchvision.models, name)(weights=None)
        flops = forward_flops(model, torch.zeros(1, 3, 224, 224))
        assert flops[""] / 2 == pytest.approx(expected, rel=0.01)


def test_attention_is_counted():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(8, 2))
    flops = forward_flops(model, torch.zeros(3, 5, 8))
    linear = 2 * 5 * (8 * 24 + 8 * 8 + 2 * 8 * 16)
    attention = 2 * 2 * 5 * 5 * 8
    assert flops["0"] == pytest.approx(linear + attention)


class _Masked(nn.Module):
    """Looks into its mask unless it is traced, as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])

    def forward(self, x, mask):
        if not isinstance(mask, FakeTensor) and mask.all():
            mask = None
        for layer in self.layers:
            x = layer(x) if mask is None else layer(x) * mask[:, None]
        return x


def test_a_model_that_looks_into_its_inputs_is_traced():
    flops = forward_flops(_Masked(), {"x": torch.zeros(3, 4), "mask": torch.ones(3)})
    assert flops[""] == 2 * 2 * 4 * 4


def test_counting_computes_and_changes_nothing():
    model = _model().train()
    model[1].branch.eval()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    forward_flops(model, torch.full((2, 1, 6, 6), float("nan")))
    out = DryRuns(model, torch.zeros(2, 1, 6, 6)).run(1_000_000)
    assert isinstance(out, FakeTensor) and out.shape == (1_000_000, 5)
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert torch.get_rng_state().equal(random)
    assert model.training and not model[1].branch.training and model[1].shortcut.training


def test_evaluating_restores_every_flag_after_an_error():
    model = _model()
    model[1].eval()
    flags = [module.training for module in model.modules()]
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == flags


def test_calls():
    x, y = torch.zeros(3, 2), torch.zeros(4)
    assert as_call(x) == ((x,), {})
    assert as_call([x, y]) == ((x, y), {}) == as_call((x, y))
    assert as_call({"a": x}) == ((), {"a": x})
    assert batch_size_of(((), {"flag": 1, "x": x})) == 3
    assert batch_size_of((torch.tensor(1.0), [y])) == 4
    with pytest.raises(ValueError, match="example_inputs"):
        batch_size_of((torch.tensor(1.0), 2))


@pytest.mark.parametrize(
    "cost, expected",
    [
        ("uniform", [1.0, 1.0]),
        ("flops", [2 * 16, 2 * 32]),
        ("params", [20, 20 + 16 + 8]),
        ({"0": 3.0, "1": 1.0, "other": 9.0}, [3.0, 1.0]),
    ],
)
def test_penalties_are_in_proportion_to_the_cost(cost, expected):
    inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.LayerNorm(4))
    model = nn.Sequential(GatedResidual(nn.Linear(4, 4)), GatedResidual(inner), nn.Linear(4, 2))
    expected = torch.tensor(expected, dtype=torch.float32)
    pruner = LayerPruner(
        model, example_inputs=torch.zeros(2, 4), total_steps=100, strength=0.3, cost=cost
    )
    costs = torch.tensor([info.cost for info in pruner.sections])
    penalties = torch.tensor([info.penalty for info in pruner.sections])
    torch.testing.assert_close(costs, expected / expected.mean())
    torch.testing.assert_close(penalties, 0.3 * costs)


@pytest.mark.parametrize(
    "cost, message",
    [
        ("speed", '"flops", "params", "uniform", "latency"'),
        (3.0, '"flops"'),
        ({"0": 1.0}, "no value for section '1'"),
        ({"0": 1.0, "1": 0.0}, "above 0"),
        ({"0": 1.0, "1": float("nan")}, "above 0"),
        ([1.0, 2.0], "a mapping by section name"),
    ],
)
def test_costs_that_are_refused(cost, message):
    """Before the model is touched."""
    model = nn.Sequential(GatedResidual(nn.Linear(4, 4)), GatedResidual(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=message):
        LayerPruner(
            model, example_inputs=torch.zeros(2, 4), total_steps=100, strength=0.3, cost=cost
        )
    assert not model._forward_pre_hooks


def test_shared_modules_and_tied_weights_stay_as_they_are():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model = nn.Sequential(first, nn.BatchNorm1d(3), second, first)
    model.add_module("again", model[1])
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    assert DryRuns(model, torch.zeros(2, 3)).run(5).shape == (5, 3)
    after = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    assert after == before and not any(p.is_meta for p in model.parameters())
