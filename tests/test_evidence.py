"""Evidence on its way: when it is learnt from, and what of it a saved state keeps."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layerprune import GatedResidual, LayerPruner, PruneConfig
from layerprune.difference import PendingMeasurement
from layerprune.elimination import Measurement
from layerprune.evidence import EVIDENCE_LAG, EvidenceQueue, PendingEvidence
from layerprune.transfer import HostCopy, to_device

ROWS = 32


def _model():
    torch.manual_seed(0)
    blocks = [GatedResidual(nn.Sequential(nn.Linear(6, 6), nn.Tanh())) for _ in range(3)]
    return nn.Sequential(nn.Linear(4, 6), *blocks, nn.Linear(6, 3))


def _pruner():
    """A pruner in learning, without competition: every theta with evidence moves."""
    model = _model()
    config = PruneConfig(warm_up=0.0, warm_up_limit=0.0, max_descending=None)
    pruner = LayerPruner(
        model, example_inputs=torch.zeros(2, 4), total_steps=1000, strength=0.1, config=config
    )
    return model, pruner, torch.optim.SGD(model.parameters(), lr=0.1)


def _backward(model, step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, 4, generator=generator)
    y = torch.randint(0, 3, (ROWS,), generator=generator)
    F.cross_entropy(model(x), y).backward()


def _alone(evidence):
    """What one rank's evidence says to it alone."""
    return evidence


def _evidence(step, section=None):
    measured = None
    if section is not None:
        rows = torch.full((4,), float(step), dtype=torch.float64)
        measured = PendingMeasurement(section, rows, None)
    return PendingEvidence(step, None, measured, float, None, None, 1)


def test_theta_moves_by_the_evidence_of_the_step_before(monkeypatch):
    """A draw is made before the step's backward: it knows of all steps but the last two."""
    model, pruner, optimizer = _pruner()
    learnt, drawn_at = [], []
    move, draw = pruner._learner.move, pruner._run.bank.draw
    monkeypatch.setattr(
        pruner._learner, "move", lambda *evidence: learnt.append(evidence) or move(*evidence)
    )
    monkeypatch.setattr(
        pruner._run.bank, "draw", lambda *a, **k: drawn_at.append(len(learnt)) or draw(*a, **k)
    )
    collected = []
    for step in range(6):
        _backward(model, step)
        given = [block._layerprune_gate.draw.gate for block in model[1:4]]
        collected.append([gate.grad * ROWS for gate in given if gate.grad is not None])
        before = pruner._run.bank.theta.clone()
        pruner.step(optimizer)
        optimizer.zero_grad()
        assert pruner._run.bank.theta.equal(before) is (step < EVIDENCE_LAG)
    assert drawn_at == [0, 0, 1, 2, 3, 4] and len(learnt) == 5
    for (slope, _), gradients in zip(learnt, collected, strict=False):
        torch.testing.assert_close(slope.sum(), torch.stack(gradients).sum())


def test_order_and_what_is_awaited():
    queue = EvidenceQueue()
    assert queue.measurements_of(None) == 0
    queue.put(_evidence(1, section=2))
    assert queue.take(_alone) is None
    queue.put(_evidence(2))
    assert [queue.measurements_of(section) for section in (None, 0, 2)] == [0, 0, 1]
    arrived = queue.take(_alone)
    assert (arrived.step, arrived.section, arrived.measurement.mean) == (1, 2, 1.0)
    assert queue.measurements_of(2) == 0 and queue.take(_alone) is None


@pytest.mark.parametrize("rows, common", [(True, True), (True, False), (False, True)])
def test_a_measurement_arrives_in_its_parts(rows, common):
    per_row = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64) if rows else None
    shared = torch.tensor(8.0, dtype=torch.float64) if common else None
    found = PendingMeasurement(0, per_row, shared).get(scale=2.0)
    assert found.mean == 1.5 * rows + 4.0 * common and found.rows == 3 * rows
    if rows:
        assert found.variance == pytest.approx(7.0 / 4 / 3)
        assert found.third == pytest.approx(6.0 / 8)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(broken):
    model, pruner, _ = _pruner()
    _backward(model, 0)
    pending = pruner._run.bank.collect()
    evidence = PendingEvidence(1, pending, None, float, None, None, 1).arrive()
    assert evidence.is_finite
    evidence.slope[0, 0] = broken
    assert not evidence.is_finite
    measured = PendingMeasurement(0, torch.tensor([broken, 1.0], dtype=torch.float64), None)
    evidence = PendingEvidence(1, None, measured, float, None, None, 1).arrive()
    assert not evidence.is_finite


def test_a_scaler_and_accumulation_divide_out():
    """The scale in use at the backward counts, whatever it is when the evidence arrives."""
    found = []
    for scale, accumulation in ((None, 1), (1024.0, 4)):
        model, pruner, optimizer = _pruner()
        scaler = scale and torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1)
        loss = model(torch.ones(ROWS, 4)).square().mean() / accumulation
        (loss if scaler is None else scaler.scale(loss)).backward()
        pending = PendingEvidence(
            1, pruner._run.bank.collect(), None, float, [optimizer], scaler, accumulation
        )
        if scaler is not None:
            scaler._scale.fill_(7.0)
        found.append(pending.arrive().slope)
    torch.testing.assert_close(*found)


def test_a_saved_state_keeps_what_is_on_its_way():
    """Resumed between the backward and the step that learns from it."""
    model, pruner, optimizer = _pruner()
    for step in range(3):
        _backward(model, step)
        pruner.step(optimizer)
        optimizer.zero_grad()
    buffer = io.BytesIO()
    torch.save(pruner.state_dict(), buffer)
    weights = copy.deepcopy(model.state_dict())
    buffer.seek(0)
    thetas = []
    other, resumed, its_optimizer = _pruner()
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    other.load_state_dict(weights)
    for network, owner, stepper in (
        (model, pruner, optimizer),
        (other, resumed, its_optimizer),
    ):
        _backward(network, 3)
        owner.step(stepper)
        thetas.append(owner._run.bank.theta.clone())
    assert thetas[0].equal(thetas[1])


def test_measurements_survive_a_saved_state():
    queue = EvidenceQueue()
    queue.put(_evidence(1, section=2))
    queue.settle(_alone)
    other = EvidenceQueue()
    other.load_state_dict(queue.state_dict())
    other.put(_evidence(2))
    assert other.measurements_of(2) == 1
    assert other.take(_alone).measurement == Measurement(1.0, 0.0, 0.0, 4)


def test_on_the_host_nothing_is_copied():
    tensors = [torch.arange(3), torch.ones(2, 2)]
    assert all(a is b for a, b in zip(to_device(tensors, "cpu"), tensors, strict=True))
    copied = HostCopy([tensors[1].requires_grad_()]).get()[0]
    assert copied.equal(tensors[1]) and not copied.requires_grad
    assert copied.data_ptr() == tensors[1].data_ptr()


def test_a_run_under_another_default_device():
    """What the pruner keeps for itself is on the host: on "meta" it would have no values."""

    def run(device):
        model = _model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batches = [(torch.randn(64, 4), torch.randint(0, 3, (64,))) for _ in range(150)]
        examples = torch.zeros(2, 4)
        with torch.device(device):
            pruner = LayerPruner(model, example_inputs=examples, total_steps=150, strength=0.5)
            for x, y in batches:
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                pruner.step(optimizer)
                optimizer.zero_grad()
            torch.save(pruner.state_dict(), io.BytesIO())
        return [(event.step, event.section, event.decision) for event in pruner.events]

    expected = run("cpu")
    assert run("meta") == expected
    assert {"eliminated"} <= {decision for _, _, decision in expected}


def _overflow(pruner):
    """Something that is no number in the gate gradients that wait."""
    pruner._run.evidence.settle(_alone)
    pruner._run.evidence._waiting[-1].slope[0, 0] = float("nan")


def test_what_a_run_could_not_go_on_from_is_not_saved():
    """A checkpoint that fails in its first step would be taken for the last good one."""
    model, pruner, optimizer = _pruner()
    _backward(model, 0)
    pruner.step(optimizer)
    pruner.state_dict()
    _overflow(pruner)
    with pytest.raises(FloatingPointError, match="step 1"):
        pruner.state_dict()


@pytest.mark.parametrize("where", ["weights", "gates"])
def test_a_step_that_the_scaler_skips_is_no_evidence(where):
    """Whether the gates' gradients overflowed with the weights' or did not."""
    model, pruner, optimizer = _pruner()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=10**9)
    thetas = []
    for step in range(5):
        optimizer.zero_grad()
        x = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().mean()
        scaler.scale(loss * (torch.inf if (where, step) == ("gates", 2) else 1.0)).backward()
        if (where, step) == ("weights", 2):
            model[0].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        pruner.step(optimizer, scaler)
        scaler.update()
        thetas.append(pruner._run.bank.theta.clone())
    moved = [not a.equal(b) for a, b in zip(thetas, thetas[1:], strict=False)]
    assert moved == [True, True, False, True]


def test_a_disabled_scaler_answers_for_nothing():
    model, pruner, optimizer = _pruner()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    (model(torch.ones(ROWS, 4)).mean() * torch.nan).backward()
    pruner.step(optimizer, scaler)
    with pytest.raises(FloatingPointError, match="step 1"):
        pruner.step(optimizer, scaler)


def test_no_measurement_is_begun_that_nobody_would_hear():
    """The last step's evidence is learnt from by no step."""
    model, pruner, optimizer = _pruner()
    pruner._run.judge.current = 1
    for left, measured in ((2, True), (1, False)):
        pruner._run.step_count = pruner.total_steps - left
        model(torch.zeros(ROWS, 4))
        assert (pruner._forwards._path is not None) is measured
        pruner._forwards.measurement()


def test_rounding_does_not_hear_what_was_measured_while_learning():
    """Not even of the same section: a pilot's measurement is no part of any attempt."""
    model, pruner, optimizer = _pruner()
    run = pruner._run
    run.learning_since, run.step_count = 0, run.schedule.learning_end - 1
    run.judge.current, run.judge.piloting = 1, True
    _backward(model, 0)
    pruner.step(optimizer)
    assert pruner.phase == "cool-down" and run.evidence.measurements_of(1) == 1
    run.judge.current = 1
    _backward(model, 1)
    pruner.step(optimizer)
    assert run.judge.test.batches(1) == 0


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"accumulation": 0}, ValueError, "accumulation.*0"),
        ({"accumulation": 1.5}, ValueError, "accumulation.*1.5"),
        ({"scaler": "x"}, TypeError, "scaler.*str"),
        ({"optimizer": None}, TypeError, "optimizer.*NoneType"),
    ],
)
def test_bad_arguments_are_told_at_once(arguments, error, message):
    _, pruner, optimizer = _pruner()
    with pytest.raises(error, match=message):
        pruner.step(**({"optimizer": optimizer} | arguments))


def test_a_pruner_is_not_copied():
    """A copy would draw nothing, without a word."""
    _, pruner, _ = _pruner()
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(pruner)


@pytest.mark.parametrize("order", ["after update", "before step"])
def test_a_scaler_out_of_order_is_told(order):
    """Whether it skipped the step, and by what it scaled, is not known then."""
    model, pruner, optimizer = _pruner()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model(torch.ones(ROWS, 4)).mean()).backward()
    if order == "after update":
        scaler.step(optimizer)
        scaler.update()
    with pytest.raises(RuntimeError, match="after scaler.step.*before scaler.update"):
        pruner.step(optimizer, scaler)
    assert pruner.step_count == 0


def test_what_another_optimizer_found_is_not_counted():
    """On the CPU the scaler adds it up in place when it is updated."""
    model, pruner, optimizer = _pruner()
    other = torch.nn.Parameter(torch.ones(1))
    second = torch.optim.SGD([other], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model(torch.ones(ROWS, 4)).square().mean() + other.sum()).backward()
    other.grad.fill_(torch.inf)
    scaler.step(optimizer)
    scaler.step(second)
    pruner.step(optimizer, scaler)
    scaler.update()
    (evidence,) = pruner.state_dict()["evidence"]
    assert not evidence["skipped"]
