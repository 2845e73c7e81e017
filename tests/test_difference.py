"""Whole-section differences: measured directly, and through the outputs of a training step."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layerprune import GatedResidual, LayerPruner, PruneConfig
from layerprune.difference import OutputPath, forced, measured_difference
from layerprune.gate import SectionDraw
from layerprune.models import resnet
from layerprune.side_forward import side_forward

ROWS = 24
SECTIONS = ("head", "middle", "tail")


class Net(nn.Module):
    """Three sections with BatchNorm, one dropout; outputs in the form asked for."""

    def __init__(self, form="tensor", dropout=0.0):
        super().__init__()
        self.form = form
        self.stem = nn.Linear(5, 8)
        for name in SECTIONS:
            branch = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8))
            setattr(self, name, GatedResidual(branch, activation="relu"))
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, target=None):
        if self.training:
            self.calls += 1
        h = self.stem(x)
        for name in SECTIONS:
            h = getattr(self, name)(h)
        y = self.out(self.dropout(h))
        if self.form == "tuple":
            return y, h.detach(), 3
        if self.form == "dict":
            return {"logits": y, "again": [2 * y], "none": None}
        return F.cross_entropy(y, target) if self.form == "loss" else y


def _data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, 5, generator=generator)
    return x, torch.randint(0, 3, (ROWS,), generator=generator)


def _loss_of(form, reduction):
    def loss(out, y):
        if form == "loss":
            return out
        if form == "tuple":
            return F.cross_entropy(out[0], y, reduction=reduction)
        if form == "dict":
            first = F.cross_entropy(out["logits"], y, reduction=reduction)
            return first + F.cross_entropy(out["again"][0], y, reduction=reduction)
        return F.cross_entropy(out, y, reduction=reduction)

    return loss


def _measuring(model, index, theta, example, **options):
    """A pruner that measures one section in every step, at the end that theta is at."""
    config = PruneConfig(warm_up=0.0, warm_up_limit=0.0)
    pruner = LayerPruner(
        model, example_inputs=example, total_steps=10_000, strength=0.1, config=config, **options
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner._run.judge.choose = lambda *args, **kwargs: None
    while pruner.phase == "warm-up":
        pruner.step(optimizer)
    pruner._run.judge.choose = lambda *args, **kwargs: index
    pruner._run.judge.current = index
    pruner._run.bank.theta[index] = theta
    return pruner


def _measure(pruner):
    path, pruner._forwards._path = pruner._forwards._path, None
    pruner._run.bank.collect()
    return path.result().get()


def test_measured_difference_is_on_minus_off():
    torch.manual_seed(0)
    model = Net().eval()
    pruner = LayerPruner(model, example_inputs=torch.zeros(2, 5), total_steps=100, strength=0.1)
    x, y = _data()
    off = copy.deepcopy(model)
    off.middle = nn.ReLU()
    expected = F.cross_entropy(model(x), y) - F.cross_entropy(off(x), y)
    gate = pruner._run.bank.gates[1]
    found = measured_difference(model, gate, lambda: F.cross_entropy(model(x), y))
    assert found == pytest.approx(float(expected), abs=1e-7)
    assert found != 0 and gate.is_open and gate.draw is None


def test_a_measurement_leaves_no_trace():
    torch.manual_seed(0)
    model = Net(dropout=0.5)
    pruner = LayerPruner(model, example_inputs=torch.zeros(2, 5), total_steps=100, strength=0.1)
    x, y = _data()
    model(x)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    draws = [gate.draw for gate in pruner._run.bank.gates]
    number = pruner._run.bank.draw_number
    for gate in pruner._run.bank.gates:
        assert measured_difference(model, gate, lambda: F.cross_entropy(model.forward(x), y)) != 0
    for name, value in model.state_dict().items():
        assert value.equal(state[name]), name
    assert torch.get_rng_state().equal(random)
    assert all(a is b for a, b in zip(draws, (g.draw for g in pruner._run.bank.gates), strict=True))
    assert pruner._run.bank.draw_number == number
    assert all(p.grad is None for p in model.parameters())


def test_the_two_ends_have_one_dropout_mask():
    """Without any effect of the section, the difference is exactly 0, dropout or not."""
    torch.manual_seed(0)
    model = Net(dropout=0.5)
    nn.init.zeros_(model.tail.branch[-1].weight)
    nn.init.zeros_(model.tail.branch[-1].bias)
    pruner = LayerPruner(model, example_inputs=torch.zeros(2, 5), total_steps=100, strength=0.1)
    x, y = _data()
    gate = pruner._run.bank.gates[2]
    assert measured_difference(model, gate, lambda: F.cross_entropy(model.forward(x), y)) == 0


@pytest.mark.parametrize("theta", [0.0, 1.0])
def test_the_output_path_has_one_dropout_mask(theta):
    """All else equal: the other end must not differ by the model's own random numbers."""
    torch.manual_seed(0)
    model = Net(dropout=0.5)
    nn.init.zeros_(model.middle.branch[-1].weight)
    nn.init.zeros_(model.middle.branch[-1].bias)
    x, y = _data()
    pruner = _measuring(model, 1, theta, x)
    F.cross_entropy(model(x), y).backward()
    found = _measure(pruner)
    assert found.mean == 0 and found.variance == 0 and found.third == 0


@pytest.mark.parametrize("theta", [0.0, 1.0])
@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("inside", ["others", "all"])
def test_the_two_dropout_masks_are_equal(inside, index, theta):
    """Dropout within the branches, before and after the section measured, which has no effect."""
    torch.manual_seed(0)
    model = Net(dropout=0.5)
    measured = getattr(model, SECTIONS[index])
    nn.init.zeros_(measured.branch[-1].weight)
    nn.init.zeros_(measured.branch[-1].bias)
    for name in SECTIONS:
        section = getattr(model, name)
        if section is not measured or inside == "all":
            section.branch.insert(1, nn.Dropout(0.5))
    x, y = _data()
    pruner = _measuring(model, index, theta, x)
    for _ in range(3):
        F.cross_entropy(model(x), y).backward()
        found = _measure(pruner)
        assert found.mean == 0 and found.variance == 0


def test_a_failing_measurement_restores_everything():
    model = Net()
    state = copy.deepcopy(model.state_dict())
    gate = model.middle._layerprune_gate
    random = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), side_forward(model), forced(gate, False):
        model(_data()[0])
        torch.rand(1)
        raise ZeroDivisionError
    assert gate.is_open and gate.draw is None
    assert torch.get_rng_state().equal(random)
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("theta", [0.0, 1.0])
@pytest.mark.parametrize(
    "form, reduction",
    [("tensor", "mean"), ("tensor", "sum"), ("tuple", "mean"), ("dict", "mean"), ("dict", "sum")],
)
def test_the_output_path_is_unbiased(form, reduction, theta):
    """Its mean over t is the measured difference of the same gates, batch statistics included.

    3 sections, |z| < 4.5 of 40 draws: false alarms about 2e-4 for each case. What is averaged out
    is the curvature along the path alone: the means must also agree to 2 % of the difference.
    """
    x, y = _data()
    loss = _loss_of(form, reduction)
    for index in range(3):
        torch.manual_seed(1)
        model = Net(form)
        pruner = _measuring(model, index, theta, x, loss_reduction=reduction)
        errors, exacts = [], []
        for _ in range(40):
            loss(model(x), y).backward()
            found = _measure(pruner)
            assert found.rows == ROWS and found.variance >= 0 and found.is_finite
            exact = measured_difference(
                model, pruner._run.bank.gates[index], lambda model=model: loss(model.forward(x), y)
            )
            # A row's own difference: of a sum over rows that is its share.
            exacts.append(exact / (ROWS if reduction == "sum" else 1))
            errors.append(found.mean - exacts[-1])
        errors, exacts = torch.tensor(errors), torch.tensor(exacts)
        error = float(errors.std()) / 40**0.5
        assert abs(float(errors.mean())) < 4.5 * error + 1e-7
        assert abs(float(errors.mean())) < 0.02 * float(exacts.abs().max())


@pytest.mark.parametrize("theta", [0.0, 1.0])
def test_a_loss_computed_inside_is_measured_exactly(theta):
    """A scalar output is linear along the path: no average is needed."""
    torch.manual_seed(1)
    model = Net("loss")
    x, y = _data()
    pruner = _measuring(model, 1, theta, {"x": x, "target": y})
    for _ in range(5):
        model(x=x, target=y).backward()
        found = _measure(pruner)
        gate = pruner._run.bank.gates[1]
        exact = measured_difference(model, gate, lambda: model.forward(x, y))
        assert found.mean == pytest.approx(exact, rel=1e-4, abs=1e-7)
        assert found.rows == 0 and math.isnan(found.variance) and math.isnan(found.third)


@pytest.mark.parametrize("theta", [0.0, 1.0])
def test_a_gradient_scale_is_divided_out(theta):
    torch.manual_seed(1)
    model = Net()
    x, y = _data()
    pruner = _measuring(model, 1, theta, x)
    (F.cross_entropy(model(x), y) * 128).backward()
    path = pruner._forwards._path
    plain, scaled = path.result().get(), path.result().get(128.0)
    assert scaled.mean == pytest.approx(plain.mean / 128)
    assert scaled.variance == pytest.approx(plain.variance / 128**2)
    assert scaled.third == pytest.approx(plain.third / 128**3)


def test_the_estimates_moments_are_those_of_its_rows():
    torch.manual_seed(1)
    model = Net()
    x, y = _data()
    pruner = _measuring(model, 1, 1.0, x)
    out = model(x)
    with side_forward(model), forced(pruner._run.bank.gates[1], False):
        off = model.forward(x)
    with side_forward(model), forced(pruner._run.bank.gates[1], True):
        on = model.forward(x)
    moved = out.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(moved, y, reduction="sum"), moved)
    per_row = (gradient * (on - off)).sum(1).double()
    F.cross_entropy(out, y).backward()
    found = _measure(pruner)
    assert found.mean == pytest.approx(float(per_row.mean()), rel=1e-4)
    assert found.variance == pytest.approx(float(per_row.var()) / found.rows, rel=1e-4)
    third = float((per_row - per_row.mean()).pow(3).mean())
    assert found.third == pytest.approx(third, rel=1e-3) and third != 0


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("theta", [0.0, 1.0])
def test_replayed_sections_equal_a_full_side_forward(monkeypatch, index, theta):
    """Bit for bit: the outputs handed to the loss, with and without replay."""
    outputs = []
    for replayed in (True, False):
        torch.manual_seed(2)
        model = Net()
        x, _ = _data()
        pruner = _measuring(model, index, theta, x)
        if not replayed:
            monkeypatch.setattr(OutputPath, "_record", lambda *args: None)
        outputs.append(model(x))
        names = {gate.name for gate in pruner._forwards._path.replayed()}
        assert names == (set(SECTIONS[:index]) if replayed else set())
    assert outputs[0].equal(outputs[1])


@pytest.mark.parametrize("theta", [0.0, 1.0])
def test_the_step_is_untouched_by_the_side_forward(theta):
    """Buffers and random state are those of the training forward; so is the gradient's way."""
    torch.manual_seed(3)
    model = Net(dropout=0.3)
    x, y = _data()
    _measuring(model, 1, theta, x)
    twin = copy.deepcopy(model)
    for hooks in (twin._forward_pre_hooks, twin._forward_hooks):
        hooks.clear()
    torch.manual_seed(4)
    moved = model(x)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    for name in SECTIONS:
        getattr(twin, name)._layerprune_gate.draw = getattr(model, name)._layerprune_gate.draw
    torch.manual_seed(4)
    plain = twin(x)
    assert torch.get_rng_state().equal(random)
    for name, value in twin.state_dict().items():
        assert value.equal(state[name]), name
    assert not moved.equal(plain)
    F.cross_entropy(moved, y).backward()
    # The gradient flows through the training forward alone, at the outputs that were handed out.
    leaf = moved.detach().requires_grad_()
    (at_output,) = torch.autograd.grad(F.cross_entropy(leaf, y), leaf)
    plain.backward(at_output)
    for (name, found), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        if expected.grad is not None:
            assert found.grad.equal(expected.grad), name


def test_the_outputs_form_is_kept():
    torch.manual_seed(0)
    x, _ = _data()
    for form in ("tuple", "dict"):
        model = Net(form)
        _measuring(model, 1, 1.0, x)
        out = model(x)
        if form == "tuple":
            assert type(out) is tuple and out[2] == 3 and not out[1].requires_grad
        else:
            assert list(out) == ["logits", "again", "none"] and out["none"] is None


def test_a_loss_that_is_not_back_propagated_measures_nothing():
    model = Net()
    x, y = _data()
    pruner = _measuring(model, 1, 1.0, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    before = pruner._run.bank.theta.clone()
    model(x)
    report = pruner.step(optimizer)
    assert not report.events and pruner._run.judge.test.batches(1) == 0
    assert pruner._run.bank.theta.equal(before)
    pruner._run.judge.current = 1
    for _ in range(2):
        F.cross_entropy(model(x), y).backward()
        pruner.step(optimizer)
    assert pruner._run.judge.test.batches(1) == 1


def test_one_measurement_per_step():
    """Later forwards of the same step draw every gate and are handed their own outputs."""
    model = Net()
    x, y = _data()
    pruner = _measuring(model, 1, 1.0, x)
    F.cross_entropy(model(x), y).backward()
    first = pruner._forwards._path.result().get()
    F.cross_entropy(model(x), y).backward()
    assert pruner._forwards._path.result().get() == first
    draw = pruner._run.bank.gates[1].draw
    assert isinstance(draw, SectionDraw)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Hardswish])
@pytest.mark.parametrize("theta", [0.0, 1.0])
def test_modules_that_work_in_place(activation, theta):
    """What follows a replayed section may overwrite its output."""

    def build(inplace):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(5, 8),
            GatedResidual(nn.Linear(8, 8)),
            activation(inplace=inplace),
            GatedResidual(nn.Linear(8, 8)),
            nn.Linear(8, 3),
        )
        return model, _measuring(model, 1, theta, torch.zeros(2, 5))

    x, y = _data()
    results = []
    for inplace in (False, True):
        model, pruner = build(inplace)
        F.cross_entropy(model(x), y).backward()
        assert pruner._forwards._path.replayed()
        # The section measured at 0 has no gradient.
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert len(gradients) == (8 if theta else 6)
        results.append((_measure(pruner), gradients))
    assert results[0][0] == results[1][0]
    assert list(results[0][1]) == list(results[1][1])
    assert all(a.equal(results[1][1][name]) for name, a in results[0][1].items())


def test_resnet_in_training_mode():
    """A convolutional network end to end: exact mean over t within |z| < 4.5 of 40 draws."""
    torch.manual_seed(0)
    model = resnet(8, in_channels=1, image_size=8, width=4)
    x = torch.randn(16, 1, 8, 8)
    y = torch.randint(0, 10, (16,))
    pruner = _measuring(model, 1, 1.0, x)
    errors = []
    for _ in range(40):
        F.cross_entropy(model(x), y).backward()
        exact = measured_difference(
            model, pruner._run.bank.gates[1], lambda: F.cross_entropy(model.forward(x), y)
        )
        errors.append(_measure(pruner).mean - exact)
    errors = torch.tensor(errors)
    assert abs(float(errors.mean())) < 4.5 * float(errors.std()) / 40**0.5
