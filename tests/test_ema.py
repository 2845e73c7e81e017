"""An average of the model, compacted along: its names, its values, its evaluation."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    update_bn,
)

from layerprune import GatedResidual, LayerPruner, PruneConfig, find_sections

WIDTH, STEPS = 6, 40


class Block(nn.Module):
    """A residual block that no one has heard of."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width)

    def forward(self, x):
        return x + self.inner(self.norm(x))


def _model(kind="gated", width=WIDTH, blocks=4):
    torch.manual_seed(0)
    if kind == "gated":
        sections = [
            GatedResidual(nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width)))
            for _ in range(blocks)
        ]
    else:
        sections = [Block(width) for _ in range(blocks)]
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), *sections, nn.Linear(width, 2))


AVERAGES = {
    "equal weights": {},
    "exponential": {"multi_avg_fn": get_ema_multi_avg_fn(0.75)},
    "with buffers": {"avg_fn": get_ema_avg_fn(0.75), "use_buffers": True},
}


def _pruner(model, ema, strength=1000.0, **options):
    """By the strength no section is worth its place."""
    return LayerPruner(
        model,
        example_inputs=torch.zeros(2, 3),
        total_steps=STEPS,
        strength=strength,
        ema=ema,
        **options,
    )


def _sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def _batch(step):
    return torch.randn(32, 3, generator=torch.Generator().manual_seed(step))


def _step(model, pruner, optimizer, ema, step):
    model.train()
    model(_batch(step)).square().mean().backward()
    optimizer.step()
    report = pruner.step(optimizer)
    optimizer.zero_grad()
    ema.update_parameters(model)
    return report


def _averaged_by_name(history, name, kind):
    """The average of a parameter's values, by the definition."""
    values = [values[name].double() for values in history]
    if kind == "equal weights":
        return sum(values) / len(values)
    average = values[0]
    for value in values[1:]:
        average = 0.75 * average + 0.25 * value
    return average


@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("blocks", ["gated", "opaque"])
def test_the_average_goes_on_through_eliminations(blocks, kind):
    model = _model(blocks)
    ema = AveragedModel(model, **AVERAGES[kind])
    pruner, optimizer = _pruner(model, ema), _sgd(model)
    held = dict(ema.module.named_parameters())
    history, changes = [], 0
    for step in range(STEPS):
        changes += _step(model, pruner, optimizer, ema, step).changed
        history.append(copy.deepcopy(model.state_dict()))
        found = dict(ema.module.named_parameters())
        assert list(found) == [name for name, _ in model.named_parameters()]
        assert all(parameter is held[name] for name, parameter in found.items())
        assert list(ema.module.state_dict()) == list(model.state_dict())
    assert changes > 1 and len(pruner.structure()["eliminated"]) == 4
    assert ema.n_averaged == STEPS
    averaged = {name for name, _ in model.named_parameters()}
    if kind == "with buffers":
        averaged |= {name for name, b in model.named_buffers() if b.is_floating_point()}
    for name in averaged:
        expected = _averaged_by_name(history, name, kind)
        found = ema.module.state_dict()[name].double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    classes = [type(module) for module in model.modules()]
    assert [type(module) for module in ema.module.modules()] == classes


@pytest.mark.parametrize("blocks", ["gated", "opaque"])
def test_evaluation_follows_the_gates_of_the_model(blocks):
    """The average's output is that of the model with the average's weights."""
    model = _model(blocks)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=True)
    pruner, optimizer = _pruner(model, ema), _sgd(model)
    x, closed = _batch(99), set()
    for step in range(STEPS):
        _step(model, pruner, optimizer, ema, step)
        shadow, weights = ema.eval(), copy.deepcopy(model.state_dict())
        found = shadow(x)
        model.load_state_dict(shadow.module.state_dict())
        with torch.no_grad():
            expected = model.eval()(x)
        model.load_state_dict(weights)
        assert found.equal(expected)
        closed.add(sum(info.theta < 0.5 and info.status == "open" for info in pruner.sections))
    assert closed > {0}


def test_statistics_of_the_average_are_those_of_its_evaluation():
    """`update_bn` runs it in training mode, where the model's draws are none of its business."""
    model = _model()
    ema = AveragedModel(model)
    config = PruneConfig(theta_init=0.25, warm_up=0.1, warm_up_limit=0.1)
    pruner, optimizer = _pruner(model, ema, config=config), _sgd(model)
    _step(model, pruner, optimizer, ema, 0)
    model(_batch(1))
    # Every gate is closed in evaluation: what comes behind the sections sees the input of the
    # first, in batches of another size than the model's too.
    batches = [_batch(2), _batch(3)[:20]]
    update_bn(batches, ema)
    seen = [ema.module[0](x) for x in batches]
    expected = torch.stack([y.mean(0) for y in seen]).mean(0)
    torch.testing.assert_close(ema.module[1].running_mean, expected)
    assert not ema.module[2].branch[1].running_mean.any()
    model(_batch(1)).square().mean().backward()
    assert pruner.step(optimizer).step == 2
    assert pruner.state_dict()["evidence"][-1]["counted"].shape[1] == 64


@pytest.mark.parametrize("moment", [4, 36])
def test_a_resumed_run_averages_on_bit_for_bit(moment):
    model = _model()
    ema = AveragedModel(model, use_buffers=True)
    pruner, optimizer = _pruner(model, ema), _sgd(model)
    for step in range(STEPS):
        if step == moment:
            saved = copy.deepcopy([part.state_dict() for part in (pruner, model, ema, optimizer)])
        _step(model, pruner, optimizer, ema, step)
    second = _model()
    average = AveragedModel(second, use_buffers=True)
    again = _pruner(second, average)
    again.load_state_dict(saved[0])
    gone = len(again.structure()["eliminated"])
    assert (gone > 0) == (moment == 36)
    resumed = _sgd(second)
    for part, state in zip((second, average, resumed), saved[1:], strict=True):
        part.load_state_dict(state)
    assert average.eval()(_batch(0)).isfinite().all()
    for step in range(moment, STEPS):
        _step(second, again, resumed, average, step)
    expected = ema.state_dict()
    assert average.state_dict().keys() == expected.keys()
    assert all(value.equal(expected[key]) for key, value in average.state_dict().items())


@pytest.mark.parametrize("blocks", ["gated", "opaque"])
@pytest.mark.parametrize("steps", [3, 20, STEPS])
def test_strip_leaves_a_plain_average(blocks, steps):
    """Of the structure of the model, also where sections were still undecided."""
    model = _model(blocks)
    ema = AveragedModel(model)
    attributes = {name: set(vars(module)) for name, module in ema.module.named_modules()}
    pruner, optimizer = _pruner(model, ema), _sgd(model)
    for step in range(steps):
        _step(model, pruner, optimizer, ema, step)
    x = _batch(99)
    expected = ema.eval()(x)
    pruner.strip()
    found = ema.eval()(x)
    assert found.equal(expected)
    assert list(ema.module.state_dict()) == list(model.state_dict())
    for name, module in ema.module.named_modules():
        assert name not in attributes or set(vars(module)) <= attributes[name]
    if steps == 3:  # as good as new: none was removed
        assert len(find_sections(model, torch.zeros(2, 3))) == 4
        assert len(_pruner(model, AveragedModel(model)).sections) == 4
    ema.update_parameters(model)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (copy.deepcopy, TypeError, "AveragedModel of the model, got Sequential"),
        (lambda _: AveragedModel(_model("opaque")), ValueError, "average of another model"),
        (lambda _: AveragedModel(_model(blocks=3)), ValueError, "average of another model"),
        (lambda _: AveragedModel(_model(blocks=5)), ValueError, "average of another model"),
        (lambda _: AveragedModel(_model(width=7)), ValueError, "average of another model"),
        (
            lambda model: AveragedModel(nn.ModuleDict({"inner": model})),
            ValueError,
            "average of another model",
        ),
    ],
)
def test_what_is_no_average_of_the_model_is_refused(make, error, message):
    model = _model()
    with pytest.raises(error, match=message):
        _pruner(model, make(model))
    assert len(_pruner(model, AveragedModel(model)).sections) == 4
