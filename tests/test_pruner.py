"""`LayerPruner` from end to end: phases, decisions, safety, resume, ledger, bad input."""

import copy
import io
import math
from dataclasses import replace

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from layerprune import GatedResidual, LayerPruner, PruneConfig, verify
from layerprune.judge import Event

WIDTH = 24


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.data, dtype=torch.float32)[order] / 16, torch.tensor(data.target)[
        order
    ]


def _mlp(seed=0, blocks=6):
    torch.manual_seed(seed)
    sections = [
        GatedResidual(
            nn.Sequential(
                nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)
            ),
            activation="relu",
        )
        for _ in range(blocks)
    ]
    return nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), *sections, nn.Linear(WIDTH, 10))


def _pruner(model, steps, strength=0.05, **options):
    return LayerPruner(
        model, example_inputs=torch.zeros(2, 64), total_steps=steps, strength=strength, **options
    )


def _sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)


def _batch(digits, step, rows=64):
    """The batch of a step, from the 1400 training images; a function of the step alone."""
    generator = torch.Generator().manual_seed(step)
    picked = torch.randint(0, 1400, (rows,), generator=generator)
    return digits[0][picked], digits[1][picked]


def _step(model, pruner, optimizer, digits, step):
    x, y = _batch(digits, step)
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item(), pruner.step(optimizer)


def _accuracy(model, digits):
    model.eval()
    with torch.no_grad():
        return float((model(digits[0][1400:]).argmax(1) == digits[1][1400:]).float().mean())


def _saved(value):
    """Through a file, as a checkpoint would go."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.fixture(scope="module")
def run(digits):
    """A whole run on digits, with a checkpoint after every step of its first half."""
    steps = 900
    model = _mlp()
    pruner, optimizer = _pruner(model, steps), _sgd(model)
    reports, losses, checkpoints, thetas = [], [], {}, []
    for step in range(steps):
        loss, report = _step(model, pruner, optimizer, digits, step)
        losses.append(loss)
        reports.append(report)
        thetas.append([info.theta for info in pruner.sections])
        if step < steps // 2:
            state = (pruner.state_dict(), model.state_dict(), optimizer.state_dict())
            checkpoints[step + 1] = copy.deepcopy(state)
    return pruner, model, optimizer, reports, losses, checkpoints, thetas


def _restored(run):
    """A second pruner and model in the final state of the run."""
    model = _mlp()
    pruner = _pruner(model, 900)
    pruner.load_state_dict(copy.deepcopy(run[0].state_dict()))
    model.load_state_dict(run[1].state_dict())
    return pruner


def test_a_run_removes_sections_and_still_works(run, digits):
    pruner, model, *_ = run
    status = [info.status for info in pruner.sections]
    assert 1 <= status.count("eliminated") < 6
    assert sum(isinstance(module, GatedResidual) for module in model.modules()) == 6 - status.count(
        "eliminated"
    )
    assert _accuracy(copy.deepcopy(model), digits) > 0.93


def test_every_section_is_decided(run):
    pruner = run[0]
    for info in pruner.sections:
        assert (info.status, info.theta) in (("settled", 1.0), ("eliminated", 0.0)), info


def test_phases(run):
    pruner, _, _, reports, *_ = run
    phases = [report.phase for report in reports]
    assert sorted(phases, key=["warm-up", "learning", "cool-down"].index) == phases
    assert set(phases) == {"warm-up", "learning", "cool-down"}
    assert [report.step for report in reports] == list(range(1, 901))
    assert phases.index("cool-down") == math.floor(pruner.config.learning_end * 900)
    assert pruner.step_count == pruner.total_steps == 900


def test_theta_is_held_in_warm_up_and_stays_in_the_unit_interval(run):
    pruner, _, _, reports, _, _, thetas = run
    warm = sum(report.phase == "warm-up" for report in reports)
    assert warm > 0
    assert all(theta == [pruner.config.theta_init] * 6 for theta in thetas[:warm])
    assert all(0 <= value <= 1 for theta in thetas for value in theta)


def test_nothing_is_eliminated_without_the_paired_test(run):
    """Every section that left has its event, on several batches, on the right side of zero."""
    pruner, _, _, reports, *_ = run
    gone = {"eliminated": "test", "rounded-off": "rounding"}
    decisive = [event for event in pruner.events if event.decision in gone]
    left = [name for report in reports for name in report.eliminated]
    assert left == [event.section for event in decisive]
    assert sorted(left) == sorted(s.name for s in pruner.sections if s.status == "eliminated")
    penalty = {info.name: info.penalty for info in pruner.sections}
    for event in decisive:
        assert event.by == gone[event.decision]
        assert event.batches >= 2
        assert event.difference + event.penalty > 0
        assert event.penalty == pytest.approx(penalty[event.section])
        assert event.theta <= pruner.config.tolerance or event.by == "rounding"
        assert math.isfinite(event.standard_error)
    for event in pruner.events:
        if event.decision in ("settled", "kept", "rounded-on"):
            assert event.difference + event.penalty <= 0 and event.batches >= 2
    for report in reports:
        assert report.changed == bool(report.eliminated)
        assert all(event.step == report.step for event in report.events)
    assert [event for report in reports for event in report.events] == pruner.events


def test_the_report_of_structure(run):
    structure = run[0].structure()
    names = [entry["name"] for entry in structure["sections"]]
    assert names == [info.name for info in run[0].sections] == [str(k) for k in range(2, 8)]
    assert structure["eliminated"] == [
        entry["name"] for entry in structure["sections"] if entry["status"] == "eliminated"
    ]
    text = str(run[0])
    assert all(name in text for name in (*names, "theta", "eliminated"))


def test_the_compacted_model_is_the_gated_one(run, digits):
    """A dense copy with the same weights and the same sections closed, bit for bit."""
    pruner, model, *_ = run
    plain = copy.deepcopy(model)
    for hooks in (plain._forward_hooks, plain._forward_pre_hooks):
        hooks.clear()
    gated = _mlp()
    gated.load_state_dict(model.state_dict(), strict=False)
    for info in pruner.sections:
        gated.get_submodule(info.name)._layerprune_gate.is_open = info.status != "eliminated"
    assert verify(gated, plain, [digits[0][:200]]) == 0.0


def _moments(run):
    """Steps before any elimination, inside a decision test, and after an elimination."""
    _, _, _, reports, _, checkpoints, _ = run
    first = next(report.step for report in reports if report.changed)
    inside = [
        step
        for step, (state, *_) in checkpoints.items()
        if any(state["judge"]["test"]["measurements"].values())
    ]
    moments = {"before": first - 1, "after": first, "later": first + 7}
    moments |= {"inside": inside[0], "inside, later": inside[-1]}
    return {name: step for name, step in moments.items() if step in checkpoints}


@pytest.mark.parametrize("moment", ["before", "after", "later", "inside", "inside, later"])
def test_a_resumed_run_goes_on_bit_for_bit(run, digits, moment):
    """Through files, weights only: dense model, pruner, weights, optimizer, in this order."""
    pruner, _, _, reports, losses, checkpoints, thetas = run
    start = _moments(run)[moment]
    state, weights, optimizer_state = (_saved(part) for part in checkpoints[start])
    model = _mlp(seed=5)
    resumed = _pruner(model, 900, seed=77)
    resumed.load_state_dict(state)
    model.load_state_dict(weights)
    optimizer = _sgd(model)
    optimizer.load_state_dict(optimizer_state)
    assert resumed.step_count == start
    for step in range(start, start + 60):
        loss, report = _step(model, resumed, optimizer, digits, step)
        assert loss == losses[step], step
        assert [info.theta for info in resumed.sections] == thetas[step]
        assert report == reports[step]
    kept = [event for event in pruner.events if event.step <= start + 60]
    assert resumed.events == kept and all(isinstance(event, Event) for event in resumed.events)
    after = checkpoints.get(start + 60)
    if after is not None:
        assert all(value.equal(after[1][name]) for name, value in model.state_dict().items())
        for name in ("train_flops", "dense_train_flops", "test_flops"):
            assert getattr(resumed.ledger, name) == after[0]["ledger"][name]


def test_a_loaded_state_is_left_alone(run, digits):
    """It can be loaded again after the run went on."""
    start = _moments(run)["inside"]
    state, weights, _ = copy.deepcopy(run[5][start])
    before = repr(state)
    model = _mlp()
    resumed = _pruner(model, 900)
    resumed.load_state_dict(state)
    model.load_state_dict(weights)
    optimizer = _sgd(model)
    for step in range(start, start + 12):
        _step(model, resumed, optimizer, digits, step)
    assert repr(state) == before


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: _pruner(_mlp(blocks=4), 900), "another model"),
        (lambda: _pruner(_mlp(), 800), "900 steps.*800"),
        (lambda: _pruner(nn.Sequential(_mlp()), 900), "another model"),
    ],
)
def test_a_state_of_another_run_is_refused(run, make, message):
    pruner = make()
    with pytest.raises(ValueError, match=message):
        pruner.load_state_dict(run[5][1][0])


def test_a_state_of_another_format_is_refused(run):
    state = copy.deepcopy(run[5][1][0])
    with pytest.raises(ValueError, match="format"):
        _pruner(_mlp(), 900).load_state_dict(state | {"format": 999})
    with pytest.raises(ValueError, match="format"):
        _pruner(_mlp(), 900).load_state_dict({})
    used = _pruner(_mlp(), 900)
    used.step(_sgd(used.model))
    with pytest.raises(ValueError, match="freshly made"):
        used.load_state_dict(state)


def test_the_optimizer_holds_what_is_left(run):
    _, model, optimizer, *_ = run
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert held == [id(p) for p in model.parameters()]
    assert set(map(id, optimizer.state)) == set(held)


def test_strip_after_a_run(run, digits):
    model = run[1]
    x = digits[0][:50]
    model.eval()
    with torch.no_grad():
        expected = model(x)
    plain = _restored(run).strip()
    assert not plain._forward_hooks and not plain._forward_pre_hooks
    assert plain.eval()(x).equal(expected)


class Feature(nn.Module):
    """Adds ``weight * x[:, k]`` to the last column, and can do nothing else."""

    def __init__(self, k):
        super().__init__()
        self.k = k
        self.weight = nn.Parameter(torch.ones(1, 1))

    def forward(self, x):
        part = x[:, self.k : self.k + 1] * self.weight
        return F.pad(part, (x.shape[1] - 1, 0))


class Additive(nn.Module):
    """Each section brings a feature that no other can: without it the loss rises by about 1."""

    def __init__(self, features=6):
        super().__init__()
        self.features = features
        self.sections = nn.Sequential(*[GatedResidual(Feature(k)) for k in range(features)])

    def forward(self, x):
        return self.sections(F.pad(x, (0, 1)))[:, self.features :]


class Idle(nn.Module):
    """Branches whose output does not reach the loss."""

    def __init__(self):
        super().__init__()
        self.sections = nn.Sequential(*[GatedResidual(nn.Linear(6, 6)) for _ in range(4)])
        self.head = nn.Linear(6, 1)

    def forward(self, x):
        return self.head(x + 0 * self.sections(x))


def _total(x):
    return x.sum(1, keepdim=True)


# Once everything is decided


def test_a_network_that_is_decided_trains_as_a_plain_one(digits):
    """Nothing is left of the last draw: other batch sizes work, every branch runs."""
    model = _mlp(blocks=2)
    plain = copy.deepcopy(model)
    pruner, optimizer = _pruner(model, 400), torch.optim.SGD(model.parameters(), lr=0.0)
    pruner._run.judge.choose = lambda *args, **kwargs: None
    for step in range(300):
        _step(model, pruner, optimizer, digits, step)
        if pruner.phase == "cool-down":
            break
    # The two ways in which a section is settled: here by hand, as the last act of a step.
    pruner._run.status[:] = ["settled", "settled"]
    pruner._run.bank.theta.fill_(1.0)
    pruner._run.bank.advance()
    plain.load_state_dict(model.state_dict())
    x, _ = _batch(digits, 0, rows=17)
    assert model(x).equal(plain(x))


def test_a_section_rounded_on_is_trained_on():
    """From theta = 0: the last measurement's closed gate must not outlive the decision."""
    torch.manual_seed(0)
    model = Additive(1)
    # With its one section left out, the model has something to train all the same.
    model.bias = nn.Parameter(torch.zeros(1))
    model.register_forward_hook(lambda module, args, out: out + module.bias)
    config = PruneConfig(warm_up=0.0, warm_up_limit=0.0, learning_end=0.1)
    pruner = LayerPruner(
        model,
        example_inputs=torch.zeros(2, 1),
        total_steps=100,
        strength=0.05,
        cost="uniform",
        config=config,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    choose, pruner._run.judge.choose = pruner._run.judge.choose, lambda *args, **kwargs: None
    for _ in range(60):
        if pruner.phase == "cool-down":
            pruner._run.judge.choose = choose
        if pruner.sections[0].status != "open":
            break
        pruner._run.bank.theta.zero_()
        x = torch.randn(32, 1)
        F.mse_loss(model(x), x).backward()
        pruner.step(optimizer)
    assert pruner.events[-1].decision == "rounded-on"
    x = torch.randn(32, 1)
    assert bool((x != 0).all()) and model(x).equal(x)


def test_outputs_of_one_number_a_row():
    """A model that returns ``[B]`` is measured as one that returns ``[B, 1]``."""
    found = []
    for flat in (True, False):
        torch.manual_seed(0)
        model = Additive(3)
        if flat:
            model = nn.Sequential(model, nn.Flatten(0))
        config = PruneConfig(warm_up=0.0, warm_up_limit=0.0)
        pruner = LayerPruner(
            model,
            example_inputs=torch.zeros(2, 3),
            total_steps=100,
            strength=0.05,
            cost="uniform",
            config=config,
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(40):
            x = torch.randn(32, 3)
            F.mse_loss(model(x).flatten(), x.sum(1)).backward()
            pruner.step(optimizer)
        found.append([(event.step, event.decision) for event in pruner.events])
    assert found[0] == found[1] != []


# Safety


@pytest.mark.parametrize("seed", range(3))
def test_a_network_that_needs_every_section_loses_none(seed):
    """Delta is -1, nu 0.05: three runs with a level of 5 % each, far from its edge."""
    torch.manual_seed(seed)
    model = Additive()
    pruner = LayerPruner(
        model,
        example_inputs=torch.zeros(2, 6),
        total_steps=400,
        strength=0.05,
        cost="uniform",
        seed=seed,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(400):
        x = torch.randn(64, 6)
        loss = F.mse_loss(model(x), x.sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report = pruner.step(optimizer)
        assert not report.eliminated
    assert [info.status for info in pruner.sections].count("settled") >= 5


def test_a_network_of_idle_sections_loses_them():
    """Branches whose output does not reach the loss: all go, by the test."""

    torch.manual_seed(0)
    model = Idle()
    pruner = LayerPruner(model, example_inputs=torch.zeros(2, 6), total_steps=600, strength=0.05)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(600):
        x = torch.randn(64, 6)
        loss = F.mse_loss(model(x), x.sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step(optimizer)
    assert [info.status for info in pruner.sections] == ["eliminated"] * 4
    assert {event.by for event in pruner.events} == {"test"}


def test_a_tiny_strength_removes_few(digits):
    """Worth 1e-7 of loss or more is kept; what has gone was no use at all."""
    model = _mlp(blocks=4)
    pruner, optimizer = _pruner(model, 400, strength=1e-7), _sgd(model)
    for step in range(400):
        _step(model, pruner, optimizer, digits, step)
    gone = [event for event in pruner.events if event.decision in ("eliminated", "rounded-off")]
    assert len(gone) <= 2
    assert all(event.difference > -1e-7 for event in gone)


def test_the_attraction_rule_asks_for_small_weights(digits):
    """Theta at 0 alone removes nothing; with the weights shrunk as well, the section goes."""
    model = _mlp(blocks=3)
    config = PruneConfig(rule="attraction", warm_up=0.0, warm_up_limit=0.0, learning_end=0.9)
    pruner = _pruner(model, 200, config=config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, weight_decay=1e-4)
    for step in range(3):
        pruner._run.bank.theta[1] = 0.0
        pruner._run.bank.theta[0] = 1.0
        _, report = _step(model, pruner, optimizer, digits, step)
        assert not report.eliminated
    for parameter in (*model[2].branch.parameters(), *model[3].branch.parameters()):
        parameter.data.mul_(1e-3)
    pruner._run.bank.theta[1] = 0.0
    pruner._run.bank.theta[0] = 1.0
    _, report = _step(model, pruner, optimizer, digits, 3)
    assert report.eliminated == ("3",)
    assert pruner.events[-1].by == "attraction"


@pytest.mark.parametrize("decayed", ["nothing", "all but BatchNorm"])
def test_the_attraction_rule_is_refused_without_weight_decay(digits, decayed):
    """The first step says so, and nothing has moved by then."""
    model = _mlp(blocks=2)
    pruner = _pruner(model, 200, config=PruneConfig(rule="attraction"))
    norms = [p for m in model.modules() if isinstance(m, nn.BatchNorm1d) for p in m.parameters()]
    others = [p for p in model.parameters() if all(p is not norm for norm in norms)]
    decay = 0.0 if decayed == "nothing" else 1e-4
    groups = [{"params": others, "weight_decay": decay}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    with pytest.raises(ValueError, match=r"'2'.*weight_decay.*rule=\"test\""):
        _step(model, pruner, optimizer, digits, 0)
    assert pruner.step_count == 0 and not pruner.events
    for group in optimizer.param_groups:
        group["weight_decay"] = 1e-4
    _step(model, pruner, optimizer, digits, 0)
    assert pruner.step_count == 1


def test_the_attraction_rule_lets_an_unused_section_decay(digits):
    """At theta 0 its branch runs on min_rows rows, so that its weights can decay."""
    model = _mlp(blocks=3)
    config = PruneConfig(
        rule="attraction",
        theta_init=0.0,
        min_rows=5,
        warm_up=0.5,
        warm_up_limit=0.5,
        learning_end=0.9,
    )
    pruner = _pruner(model, 200, config=config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    counts = _row_counter(model)
    sizes = [float(p.detach().norm()) for p in model[3].branch.parameters()]
    for step in range(20):
        counts.clear()
        _step(model, pruner, optimizer, digits, step)
        assert counts["3"] == 5
    shrunk = [float(p.detach().norm()) for p in model[3].branch.parameters()]
    expected = (1 - 0.1 * 0.5) ** 20
    for before, after in zip(sizes, shrunk, strict=True):
        assert after == pytest.approx(expected * before, rel=1e-4)


# Warm-up


def _warm_up(model, inputs, target, **config):
    """Steps of warm-up in a run of 500."""
    torch.manual_seed(0)
    pruner = LayerPruner(
        model,
        example_inputs=torch.zeros(2, inputs),
        total_steps=500,
        strength=0.05,
        cost="uniform",
        config=PruneConfig(**config),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(500):
        x = torch.randn(64, inputs)
        F.mse_loss(model(x), target(x)).backward()
        report = pruner.step(optimizer)
        optimizer.zero_grad()
        assert report.phase == "warm-up"
        assert all(info.theta == config.get("theta_init", 0.5) for info in pruner.sections)
        if pruner.phase != "warm-up":
            return step + 1
    raise AssertionError("warm-up never ended")


@pytest.mark.parametrize("limit, steps", [(0.08, 40), (0.2, 100), (0.03, 15)])
def test_warm_up_has_a_limit(limit, steps):
    """No section ever pays: it ends at the limit, not before, and not after."""
    assert _warm_up(Idle(), 6, _total, warm_up_limit=limit) == steps


@pytest.mark.parametrize("least", [0.03, 0.1])
def test_warm_up_ends_when_a_section_pays(least):
    """Each is worth a loss of 1: seen at once, but warm_up is kept."""
    steps = _warm_up(Additive(), 6, _total, warm_up=least, warm_up_limit=0.2)
    assert 500 * least <= steps < 500 * least + 10


def test_warm_up_without_a_step():
    config = {"warm_up": 0.0, "warm_up_limit": 0.0}
    assert _warm_up(Additive(), 6, _total, **config) <= 1


# Pilots


@pytest.mark.parametrize("inside", [False, True], ids=["outputs", "loss"])
def test_what_a_run_decides_by(inside):
    """Every event's difference is the mean of its batches; no batch of a pilot is among them.

    Also of a model that returns its loss: every idle section goes while learning.
    """

    class WithLoss(Idle):
        def forward(self, x):
            return F.mse_loss(super().forward(x), _total(x))

    torch.manual_seed(0)
    model = WithLoss() if inside else Idle()
    pruner = LayerPruner(model, example_inputs=torch.zeros(2, 6), total_steps=600, strength=0.05)
    heard, pilots = [], 0
    hear = pruner._run.judge.hear

    def listen(measurement, step, learning):
        nonlocal pilots
        if pruner._run.judge.piloting:
            pilots += 1
            # A wild pilot: it would be seen in any evidence that it were part of.
            measurement = replace(measurement, mean=100.0)
            assert hear(measurement, step, learning) is None
            return None
        heard.append(measurement.mean)
        return hear(measurement, step, learning)

    pruner._run.judge.hear = listen
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(600):
        x = torch.randn(64, 6)
        out = model(x)
        (out if inside else F.mse_loss(out, _total(x))).backward()
        report = pruner.step(optimizer)
        optimizer.zero_grad()
        for event in report.events:
            assert event.batches in (2, 4, 8, 16)
            assert event.difference == pytest.approx(sum(heard[-event.batches :]) / event.batches)
            assert abs(event.difference) < 1
    assert pilots > 0
    assert [info.status for info in pruner.sections] == ["eliminated"] * 4
    assert {event.by for event in pruner.events} == {"test"}


# Accumulation and gradient scalers


def test_accumulated_losses_move_theta_as_whole_ones(digits):
    """The same two micro-batches and draws, halved with accumulation=2, or as they are."""
    thetas = []
    for parts in (1, 2):
        model = _mlp()
        pruner = _pruner(model, 300)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        trace = []
        for step in range(60):
            for half in range(2):
                x, y = _batch(digits, 2 * step + half, rows=32)
                (F.cross_entropy(model(x), y) / parts).backward()
            optimizer.step()
            pruner.step(optimizer, accumulation=parts)
            optimizer.zero_grad()
            trace.append([info.theta for info in pruner.sections])
        thetas.append(torch.tensor(trace))
    assert thetas[0].equal(thetas[1])
    assert not thetas[0][-1].equal(thetas[0][0])


def test_the_sum_over_rows_moves_theta_as_the_mean(digits):
    """A power of two of rows, so that the two differ by an exact factor."""
    thetas = []
    for reduction in ("mean", "sum"):
        model = _mlp()
        pruner = _pruner(model, 300, loss_reduction=reduction)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for step in range(60):
            x, y = _batch(digits, step)
            F.cross_entropy(model(x), y, reduction=reduction).backward()
            pruner.step(optimizer)
            optimizer.zero_grad()
        thetas.append(torch.tensor([info.theta for info in pruner.sections]))
    torch.testing.assert_close(*thetas, atol=1e-4, rtol=0)


def _scaled_run(digits, scale, steps=80, overflow=(), learning_end=0.4):
    model = _mlp()
    config = PruneConfig(learning_end=learning_end)
    pruner, optimizer = _pruner(model, 100, config=config), _sgd(model)
    scaler = None
    if scale is not None:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**9)
    trace = []
    for step in range(steps):
        x, y = _batch(digits, step)
        loss = F.cross_entropy(model(x), y)
        if step in overflow:
            loss = loss * float("inf")
        optimizer.zero_grad()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
        pruner.step(optimizer, scaler)
        if scaler is not None:
            scaler.update()
        trace.append([info.theta for info in pruner.sections])
    return pruner, trace


def test_a_gradient_scaler_changes_nothing(digits):
    """Scaling by a power of two is exact: theta and decisions are those without a scaler."""
    plain, expected = _scaled_run(digits, None)
    scaled, found = _scaled_run(digits, 1024.0)
    assert found == expected
    assert [(e.step, e.section, e.decision) for e in scaled.events] == [
        (e.step, e.section, e.decision) for e in plain.events
    ]
    assert expected[-1] != expected[0]


def test_a_skipped_step_moves_nothing_and_is_no_evidence(digits):
    """Overflow in every eighth step, in learning and in cool-down."""
    overflow = set(range(7, 100, 8))
    pruner, trace = _scaled_run(digits, 1024.0, steps=100, overflow=overflow)
    assert all(math.isfinite(value) for theta in trace for value in theta)
    for step in overflow:  # counted from 0; the step after it would learn from it
        decided = [event for event in pruner.events if event.step == step + 2]
        assert trace[step + 1 :][:1] in ([], [trace[step]]) or decided
    for event in pruner.events:
        assert math.isfinite(event.difference) and math.isfinite(event.standard_error)
        assert event.step - 2 not in overflow


def test_a_gradient_that_is_not_finite_stops_the_run(digits):
    model = _mlp()
    pruner, optimizer = _pruner(model, 300), _sgd(model)
    for step in range(4):
        _step(model, pruner, optimizer, digits, step)
    x, y = _batch(digits, 9)
    (F.cross_entropy(model(x), y) * float("nan")).backward()
    pruner.step(optimizer)
    with pytest.raises(FloatingPointError, match="step 5"):
        pruner.step(optimizer)


# Ledger


def _row_counter(model):
    counts = {}

    def count(name):
        def hook(module, args, out):
            counts[name] = counts.get(name, 0) + args[0].shape[0]

        return hook

    for name, module in model.named_modules():
        if isinstance(module, GatedResidual):
            module.branch.register_forward_hook(count(name))
    return counts


BRANCH = 2 * 2 * WIDTH * WIDTH
REST = 2 * (64 * WIDTH + WIDTH * 10)


def test_at_theta_one_the_ledger_is_the_dense_run(digits):
    model = _mlp()
    pruner = _pruner(model, 300, config=PruneConfig(theta_init=1.0, warm_up=0.1, warm_up_limit=0.1))
    optimizer = _sgd(model)
    for step in range(5):
        _step(model, pruner, optimizer, digits, step)
    assert pruner.ledger.fraction == 1
    assert pruner.ledger.test_flops == 0
    assert pruner.ledger.dense_train_flops == 3 * 5 * 64 * (REST + 6 * BRANCH)


def test_the_ledger_counts_the_rows_that_run(digits):
    """Without decision tests: three operations for each one of a forward, on the rows that ran."""
    model = _mlp()
    pruner, optimizer = _pruner(model, 300), _sgd(model)
    counts = _row_counter(model)
    pruner._run.judge.choose = lambda *args, **kwargs: None
    for step in range(40):
        _step(model, pruner, optimizer, digits, step)
        if step == 20:
            pruner._run.status[1] = "settled"
            pruner._run.bank.theta[1] = 1.0
    expected = 3 * (40 * 64 * REST + BRANCH * sum(counts.values()))
    assert pruner.ledger.train_flops == pytest.approx(expected, rel=1e-9)
    assert pruner.ledger.fraction < 1


@pytest.mark.parametrize("theta", [0.0, 1.0])
def test_the_ledger_counts_a_decision_test(digits, theta):
    """The side forward: all of the network but the branches before the measured section."""
    model = _mlp()
    config = PruneConfig(warm_up=0.0, warm_up_limit=0.0)
    pruner, optimizer = _pruner(model, 300, config=config), _sgd(model)
    pruner._run.judge.choose = lambda *args, **kwargs: None
    while pruner.phase == "warm-up":
        _step(model, pruner, optimizer, digits, 0)
    pruner._run.judge.choose = lambda *args, **kwargs: 3
    pruner._run.bank.theta[3] = theta
    before = pruner.ledger.as_dict()
    counts = _row_counter(model)
    x, _ = _batch(digits, 1)
    model(x)
    # What the training forward ran: the draw's rows of each section.
    draws = {gate.name: gate.draw for gate in pruner._run.bank.gates}
    assert draws["5"] is False if theta == 0 else draws["5"].rows.numel() == 64
    training = {
        name: 64 * draw if isinstance(draw, bool) else draw.rows.numel()
        for name, draw in draws.items()
    }
    side = {name: counts.get(name, 0) - rows for name, rows in training.items()}
    tests = pruner.ledger.test_flops - before["test_flops"]
    assert tests == pytest.approx(64 * REST + BRANCH * sum(side.values()), rel=1e-9)
    trained = pruner.ledger.train_flops - before["train_flops"] - tests
    assert trained == pytest.approx(3 * (64 * REST + BRANCH * sum(training.values())), rel=1e-9)
    assert [side[name] for name in list(training)[:3]] == [0, 0, 0]


def test_an_eliminated_section_costs_nothing(run):
    """At the end of a run a step costs what the compacted network costs."""
    pruner, model, *_ = run
    kept = sum(isinstance(module, GatedResidual) for module in model.modules())
    alone = _restored(run)
    spent = alone.ledger.train_flops
    alone.model.train()
    alone.model(torch.randn(10, 64))
    assert alone.ledger.train_flops - spent == pytest.approx(3 * 10 * (REST + kept * BRANCH))
    assert pruner.ledger.fraction < 1
    assert pruner.ledger.as_dict()["fraction"] == pruner.ledger.fraction


def test_the_ledger_keeps_counting_when_every_section_is_gone(digits):
    """What is left trains on, and its steps are a share of the dense ones."""
    model = _mlp(blocks=3)
    pruner, optimizer = _pruner(model, 200), _sgd(model)
    for step in range(3):
        _step(model, pruner, optimizer, digits, step)
    pruner._eliminate([0, 1, 2], [optimizer])
    assert not any(isinstance(module, GatedResidual) for module in model.modules())
    before = pruner.ledger.as_dict()
    for step in range(3, 200):
        _step(model, pruner, optimizer, digits, step)
    after = pruner.ledger.as_dict()
    assert after["train_flops"] - before["train_flops"] == pytest.approx(3 * 197 * 64 * REST)
    dense = after["dense_train_flops"] - before["dense_train_flops"]
    assert dense == pytest.approx(3 * 197 * 64 * (REST + 3 * BRANCH))
    assert after["test_flops"] == before["test_flops"]
    assert pruner.phase == "cool-down" and not pruner.events
    model.eval()
    _step(model, pruner, optimizer, digits, 200)
    assert pruner.ledger.train_flops == after["train_flops"]


# Bad input


@pytest.mark.parametrize(
    "change, message",
    [
        ({"strength": 0.0}, "strength"),
        ({"strength": -1.0}, "strength"),
        ({"strength": float("nan")}, "strength"),
        ({"total_steps": None}, "total_steps.*None"),
        ({"total_steps": 100.0}, "total_steps.*100.0"),
        ({"total_steps": True}, "total_steps"),
        ({"total_steps": 3}, "total_steps = 3 .*train longer"),
        ({"total_steps": -5}, "total_steps = -5"),
        ({"cost": "speed"}, "cost"),
        ({"loss_reduction": "none"}, "loss_reduction"),
        ({"example_inputs": torch.zeros(2, 65)}, "2 rows of example_inputs"),
        ({"ignored": [GatedResidual]}, "no section"),
        ({"sections": []}, "no section"),
    ],
)
def test_arguments_that_are_refused(change, message):
    """One clear error, and the model is as it was."""
    model = _mlp()
    arguments = {"example_inputs": torch.zeros(2, 64), "total_steps": 300, "strength": 0.1}
    with pytest.raises(ValueError, match=message):
        LayerPruner(model, **(arguments | change))
    assert not model._forward_hooks and not model._forward_pre_hooks


@pytest.mark.parametrize(
    "change",
    [
        {"theta_init": 1.5},
        {"warm_up": -0.1},
        {"learning_end": 2.0},
        {"warm_up": 0.5, "learning_end": 0.4},
        {"warm_up": 0.1, "warm_up_limit": 0.05},
        {"warm_up_limit": 0.4},
        {"warm_up_limit": 1.1},
        {"tolerance": -1.0},
        {"level": 2.0},
        {"noise_factor": -1.0},
        {"confidence": -1.0},
        {"probe_budget": 0.0},
        {"probe_budget": 1.5},
        {"max_descending": 0},
        {"looks": 0},
        {"min_rows": 0},
        {"row_multiple": 0},
        {"estimator": "magic"},
        {"rule": "none"},
        {"scheme": "random"},
    ],
)
def test_settings_that_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        PruneConfig(**change)


def test_a_wrong_optimizer_is_refused_in_the_first_step(digits):
    model = _mlp()
    pruner = _pruner(model, 300)
    with pytest.raises(TypeError, match="LBFGS"):
        pruner.step(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match="none of the model's parameters"):
        pruner.step(_sgd(_mlp()))
    assert pruner.step_count == 0


@pytest.mark.parametrize("rows", [2, 3, 64])
@pytest.mark.parametrize("rule, theta", [("test", 1e-6), ("attraction", 0.0)])
def test_a_batch_smaller_than_min_rows_runs_whole(digits, rows, rule, theta):
    model = _mlp()
    config = PruneConfig(rule=rule, theta_init=theta, min_rows=4, row_multiple=4, probe_budget=1e-9)
    _pruner(model, 300, config=config)
    counts = _row_counter(model)
    x, y = _batch(digits, 0, rows)
    F.cross_entropy(model(x), y).backward()
    assert len(counts) == 6 and set(counts.values()) == {min(rows, 4)}
    assert all(p.grad is not None for p in model.parameters())


def test_a_model_in_evaluation_mode_is_left_alone(digits):
    model = _mlp()
    plain = copy.deepcopy(model).eval()
    pruner = _pruner(model, 300)
    model.eval()
    x, y = _batch(digits, 0)
    assert model(x).equal(plain(x))
    F.cross_entropy(model(x), y).backward()
    before = [info.theta for info in pruner.sections]
    pruner.step(_sgd(model))
    assert [info.theta for info in pruner.sections] == before
    assert pruner.ledger.train_flops == 0


def test_the_difference_of_a_section_is_the_loss_with_it_less_the_loss_without():
    torch.manual_seed(3)
    blocks = [GatedResidual(nn.Linear(6, 6), activation="relu") for _ in range(3)]
    model = nn.Sequential(nn.Linear(4, 6), *blocks, nn.Linear(6, 2))
    pruner = LayerPruner(model, example_inputs=torch.zeros(2, 4), total_steps=100, strength=0.1)
    x, y = torch.randn(9, 4), torch.randint(0, 2, (9,))

    def loss():
        return nn.functional.cross_entropy(model(x), y)

    without = copy.deepcopy(model).eval()
    without[2] = nn.ReLU()
    with torch.no_grad():
        expected = nn.functional.cross_entropy(copy.deepcopy(model).eval()(x), y)
        expected -= nn.functional.cross_entropy(without(x), y)
    assert model.training
    assert pruner.difference("2", loss) == pytest.approx(float(expected), abs=1e-7)
    assert model.training
    with pytest.raises(ValueError, match="'4' is no section"):
        pruner.difference("4", loss)


def test_a_forward_that_raises_leaves_no_measurement_behind():
    class Fails(nn.Sequential):
        bad = False

        def forward(self, x):
            out = super().forward(x)
            if self.bad:
                raise MemoryError
            return out

    def train(failing):
        torch.manual_seed(0)
        model = Fails(*[GatedResidual(nn.Linear(6, 6)) for _ in range(3)], nn.Linear(6, 2))
        pruner = LayerPruner(model, example_inputs=torch.zeros(2, 6), total_steps=60, strength=1.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(1)
        for _ in range(30):
            x = torch.randn(32, 6, generator=generator)
            for model.bad in (True, False) if failing else (False,):
                if model.bad:
                    with pytest.raises(MemoryError):
                        model(100 * torch.randn(17, 6))
                else:
                    F.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
            optimizer.step()
            pruner.step(optimizer)
            optimizer.zero_grad()
        return pruner

    failed, clean = train(True), train(False)
    assert failed.events and clean.events
    for pruner in (failed, clean):
        assert all(abs(event.difference) < 1 for event in pruner.events)
        assert pruner._forwards._path is None


def test_nothing_is_left_open_at_the_end_of_a_run_too_short_to_measure():
    torch.manual_seed(0)
    blocks = [GatedResidual(nn.Linear(6, 6)) for _ in range(8)]
    model = nn.Sequential(*blocks, nn.Linear(6, 2))
    pruner = LayerPruner(model, example_inputs=torch.zeros(2, 6), total_steps=8, strength=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(8):
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
        report = pruner.step(optimizer)
        optimizer.zero_grad()
    assert report.step == 8
    assert all(info.status != "open" and info.theta in (0.0, 1.0) for info in pruner.sections)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in pruner.strip().parameters()}


@pytest.mark.parametrize("opaque", [False, True])
def test_a_second_pruner_is_refused_until_the_first_is_stripped(opaque):
    def block():
        linear = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        return linear if opaque else GatedResidual(linear)

    model = nn.Sequential(block(), block(), nn.Linear(6, 2))
    options = {"example_inputs": torch.zeros(2, 6), "total_steps": 100, "strength": 0.1}
    first = LayerPruner(model, **options)
    with pytest.raises(ValueError, match="already has a pruner"):
        LayerPruner(model, **options)
    first.strip()
    LayerPruner(model, **options)


def test_another_optimizer_is_checked_before_anything_changes():
    torch.manual_seed(0)
    model = nn.Sequential(GatedResidual(nn.Linear(6, 6)), nn.Linear(6, 2))
    pruner = LayerPruner(model, example_inputs=torch.zeros(2, 6), total_steps=100, strength=0.1)
    pruner.step(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="holds none of the model's parameters"):
        pruner.step(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    assert pruner.step_count == 1


def test_a_state_of_another_strength_is_refused():
    def pruner(strength):
        model = nn.Sequential(GatedResidual(nn.Linear(6, 6)), nn.Linear(6, 2))
        options = {"example_inputs": torch.zeros(2, 6), "total_steps": 100}
        return LayerPruner(model, strength=strength, **options)

    with pytest.raises(ValueError, match="another strength"):
        pruner(0.2).load_state_dict(pruner(0.1).state_dict())


@pytest.mark.parametrize("seed", [None, "a", -1, 2**63, True])
def test_a_seed_that_is_none_is_refused_at_once(seed):
    model = nn.Sequential(GatedResidual(nn.Linear(6, 6)), nn.Linear(6, 2))
    options = {"example_inputs": torch.zeros(2, 6), "total_steps": 100, "strength": 0.1}
    with pytest.raises(ValueError, match="seed must be"):
        LayerPruner(model, seed=seed, **options)


def test_a_run_that_went_on_beyond_its_steps_is_restored():
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(GatedResidual(nn.Linear(4, 4)), nn.Linear(4, 1))
        return LayerPruner(model, example_inputs=torch.ones(2, 4), total_steps=20, strength=0.1)

    pruner = make()
    optimizer = torch.optim.SGD(pruner.model.parameters(), lr=0.1)
    for _ in range(25):
        pruner.model(torch.ones(8, 4)).square().mean().backward()
        optimizer.step()
        pruner.step(optimizer)
    resumed = make()
    resumed.load_state_dict(pruner.state_dict())
    assert resumed.step_count == 25 and str(resumed) == str(pruner)
