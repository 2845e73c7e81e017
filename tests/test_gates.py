"""Gates as a model sees them: draws, their life cycle, their place in the random stream."""

import copy
import io
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from layerprune import GatedResidual, LayerPruner, PruneConfig, ops
from layerprune.gate import Gate, SectionDraw
from layerprune.gates import GateBank

ROWS = 24


def _mlp(sections=3):
    torch.manual_seed(0)
    blocks = [GatedResidual(nn.Sequential(nn.Linear(6, 6), nn.Tanh())) for _ in range(sections)]
    return nn.Sequential(nn.Linear(4, 6), *blocks, nn.Linear(6, 2))


def _pruner(model, **options):
    settings = {"total_steps": 1000, "strength": 0.1} | options
    return LayerPruner(model, example_inputs=torch.zeros(2, 4), **settings)


def _draws(model):
    return [
        module._layerprune_gate.draw
        for module in model.modules()
        if isinstance(module, GatedResidual)
    ]


def _gates(model):
    return torch.stack([draw.gate.detach() for draw in _draws(model)])


@pytest.mark.parametrize("scheme", ["systematic", "independent"])
def test_marginals_through_the_bank(scheme):
    """Each row is open with probability theta and a probe with its rate, padded rows stay closed.

    3 sections x 24 rows x 2 frequencies at |z| < 5 for 144 looks: false alarms below 1e-4.
    """
    theta = torch.tensor([0.03, 0.5, 0.9])
    rate = torch.tensor([0.05, 0.2, 0.0])
    config = PruneConfig(min_rows=6, row_multiple=4, scheme=scheme)
    bank = GateBank(["a", "b", "c"], config, seed=5)
    bank.theta.copy_(theta)
    bank.probe_rate.copy_(rate)
    opened, probed, count = torch.zeros(3, ROWS), torch.zeros(3, ROWS), 2500
    for _ in range(count):
        bank.draw(ROWS, record=False)
        for index, gate in enumerate(bank.gates):
            draw = gate.draw
            running = torch.zeros(ROWS, dtype=torch.bool).index_fill_(0, draw.rows, True)
            assert draw.rows.numel() >= 6
            assert draw.rows.numel() % 4 == 0
            assert draw.rows.equal(draw.rows.sort().values)
            assert draw.slot.equal(torch.where(running, running.cumsum(0) - 1, -1).int())
            assert not draw.gate[~running].any()
            probe = torch.zeros(ROWS, dtype=torch.bool).index_fill_(0, draw.probes, True)
            inside = (draw.gate > 0) & (draw.gate < 1)
            assert inside.equal(probe)
            probed[index] += probe
            opened[index] += draw.gate == 1
            if scheme == "systematic":
                others = ROWS - int(probe.sum())
                exact = float(theta[index]) * others
                assert abs(float((draw.gate == 1).sum()) - exact) < 1
                assert abs(float(probe.sum()) - float(rate[index]) * ROWS) < 1
    for found, share in ((opened, theta * (1 - rate)), (probed, rate)):
        expected = share[:, None].expand(3, ROWS)
        # Systematic draws are less variable than Bernoulli ones over rows, as variable for one row.
        error = (expected * (1 - expected) / count).sqrt()
        assert bool(((found / count - expected).abs() <= 5 * error + 1e-9).all())


def test_no_draw_is_repeated_over_forwards_and_a_saved_state():
    model = _mlp()
    pruner = _pruner(model, seed=3)
    seen = []
    for _ in range(40):
        model(torch.randn(ROWS, 4))
        seen.append(tuple(_gates(model).flatten().tolist()))
    state = copy.deepcopy(pruner.state_dict())
    following = []
    for _ in range(20):
        model(torch.randn(ROWS, 4))
        following.append(tuple(_gates(model).flatten().tolist()))
    assert len(set(seen + following)) == 60

    other = _mlp()
    resumed = _pruner(other, seed=99)
    resumed.load_state_dict(state)
    again = []
    for _ in range(20):
        other(torch.randn(ROWS, 4))
        again.append(tuple(_gates(other).flatten().tolist()))
    assert again == following


def test_another_seed_draws_otherwise():
    drawn = []
    for seed in (0, 1, 0):
        model = _mlp()
        _pruner(model, seed=seed)
        model(torch.randn(ROWS, 4))
        drawn.append(_gates(model))
    assert drawn[0].equal(drawn[2]) and not drawn[0].equal(drawn[1])


def _bank(theta, rate=0.0, ranks=None, **config):
    """A bank of one section for each theta."""
    bank = GateBank([f"s{k}" for k in range(len(theta))], PruneConfig(**config), 1, ranks)
    bank.theta.copy_(torch.tensor(theta))
    bank.probe_rate.fill_(rate)
    return bank


def test_what_needs_no_drawing_is_not_drawn():
    """Left out at theta 0; in between, however near, a branch has rows; at theta 1 it has all."""
    bank = _bank([0.0, 1e-6, 0.5, 1 - 1e-6, 1.0], min_rows=4)
    running = bank.draw(ROWS)
    draws = [gate.draw for gate in bank.gates]
    assert draws[0] is False
    assert all(isinstance(draw, SectionDraw) for draw in draws[1:])
    assert running == [0, *[draw.rows.numel() for draw in draws[1:]]]
    assert running[1] == 4 and running[4] == ROWS


def test_probes_keep_a_section_drawn():
    """A gradient wanted at theta 0 or 1 is still measured on the probed rows."""
    bank = _bank([0.0, 1.0], rate=0.25, min_rows=1)
    running = bank.draw(ROWS)
    for gate, count in zip(bank.gates, running, strict=True):
        assert gate.draw.probes.numel() == ROWS // 4 and gate.draw.gate.requires_grad
        assert gate.draw.rows.numel() == count
    assert running == [ROWS // 4, ROWS]


def test_taylor_keeps_no_section_idle_that_it_would_learn_of():
    """Its evidence is the derivative on every running row: min_rows of them at theta 0."""
    bank = _bank([0.0, 1.0], estimator="taylor", min_rows=4)
    assert bank.draw(ROWS) == [4, ROWS]
    assert all(isinstance(gate.draw, SectionDraw) for gate in bank.gates)


def test_the_attraction_rule_keeps_every_branch_running():
    """Its weights must decay, and weight decay asks for a gradient."""
    bank = _bank([0.0, 0.5], rule="attraction", min_rows=4)
    running = bank.draw(ROWS)
    assert running[0] == 4 and not bank.gates[0].draw.gate.any()


@dataclass
class OneOf:
    """One of several ranks, without the others."""

    rank: int
    count: int


def test_other_ranks_are_not_kept_waiting():
    """Where gradients are exchanged, every branch has some on every rank."""
    assert _bank([0.0], ranks=OneOf(1, 2), min_rows=4).draw(ROWS) == [4]


@pytest.mark.parametrize("scheme", ["systematic", "independent"])
def test_ranks_have_equal_loads_and_draws_of_their_own(scheme):
    """Equal numbers of rows and probes on all ranks; no rank repeats another's draw."""
    config = {"rate": 0.1, "scheme": scheme, "min_rows": 1}
    banks = [_bank([0.3, 0.7, 0.5], ranks=OneOf(rank, 3), **config) for rank in range(3)]
    running = [bank.draw(ROWS) for bank in banks]
    gates = [torch.stack([gate.draw.gate for gate in bank.gates]).detach() for bank in banks]
    assert not gates[0].equal(gates[1]) and not gates[1].equal(gates[2])
    if scheme == "systematic":
        assert running[0] == running[1] == running[2]
        probes = [[len(gate.draw.probes) for gate in bank.gates] for bank in banks]
        assert probes[0] == probes[1] == probes[2] and probes[0][0] > 0
    else:
        # Rows are drawn one by one: together the ranks draw what one would.
        alone = _bank([0.3, 0.7, 0.5], **config)
        alone.draw(3 * ROWS)
        expected = torch.stack([gate.draw.gate for gate in alone.gates]).detach()
        assert torch.cat(gates, 1).equal(expected)


def test_rows_of_ranks_with_unequal_batches_have_numbers_of_their_own():
    banks = [_bank([0.5], ranks=OneOf(rank, 2)) for rank in range(2)]
    for bank, rows in zip(banks, (ROWS, ROWS // 4), strict=True):
        bank.draw(rows)
        bank.widest = ROWS  # as the ranks have agreed by the step's end
    ranges = [bank.rows_here(rows) for bank, rows in zip(banks, (ROWS, ROWS // 4), strict=True)]
    assert ranges == [(0, 2 * ROWS), (ROWS, 2 * ROWS)]


def test_given_gates_are_used_but_in_a_forced_section():
    bank = _bank([0.5, 0.5, 0.5], rate=0.25)
    state = torch.tensor([9, 4, 0])
    given = ops.sample_gates(torch.tensor([0.2, 0.9, 1.0]), ROWS, state, torch.zeros(3))
    bank.draw(ROWS, given=given, forced={1: 1.0})
    for index in (0, 2):
        draw = bank.gates[index].draw
        count = int(given.counts[index, 0])
        assert draw.gate.equal(given.gates[index]) and draw.slot.equal(given.slots[index])
        assert draw.rows.equal(given.rows[index, :count]) and not len(draw.probes)
    draw = bank.gates[1].draw
    assert draw.gate.equal(torch.ones(ROWS)) and draw.rows.equal(torch.arange(ROWS))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_forced_and_skipped_sections(value):
    """Forced: all rows at one end, no probes. Skipped: no draw, its branch runs whole."""
    bank = _bank([0.5, 0.5, 0.5], rate=0.25)
    running = bank.draw(ROWS, skip=frozenset([2]), forced={1: value})
    assert isinstance(bank.gates[0].draw, SectionDraw)
    draw = bank.gates[1].draw
    assert draw is False if value == 0 else draw.gate.equal(torch.ones(ROWS))
    assert draw is False or (draw.rows.numel() == ROWS and draw.probes.numel() == 0)
    assert bank.gates[2].draw is None
    assert running[1:] == [ROWS * int(value), ROWS]


@pytest.mark.parametrize("rows", [2, 3, 64])
def test_an_idle_section_costs_nothing_and_learns_nothing(rows):
    """At theta 0 without probes: the branch is not called, its statistics and weights stay."""
    torch.manual_seed(0)
    blocks = [
        GatedResidual(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()))
        for _ in range(3)
    ]
    model = nn.Sequential(nn.Linear(4, 6), *blocks, nn.Linear(6, 2))
    pruner = _pruner(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    pruner._run.bank.theta[1] = 0.0
    pruner._learner.allocate_probes()
    assert pruner._run.bank.probe_rate[1] == 0
    called = []
    for index, block in enumerate(blocks):
        block.branch.register_forward_pre_hook(lambda *_, k=index: called.append(k))
    state = copy.deepcopy(blocks[1].state_dict())
    x = torch.randn(rows, 4)
    out = model(x)
    assert called == [0, 2]
    out.square().sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {f"2.{name}" for name, _ in blocks[1].named_parameters()}
    linear = 2 * 6 * 6
    others = sum(len(block._layerprune_gate.draw.rows) for block in (blocks[0], blocks[2]))
    fixed = rows * (2 * 4 * 6 + 2 * 6 * 2)
    assert pruner.ledger.train_flops == pytest.approx(3 * (fixed + others * linear))
    optimizer.step()
    assert all(value.equal(state[name]) for name, value in blocks[1].state_dict().items())


def test_a_forward_without_gradient_is_no_evidence():
    model = _mlp()
    pruner = _pruner(model)
    spent = pruner.ledger.train_flops
    with torch.no_grad():
        model(torch.randn(ROWS, 4))
    assert pruner._run.bank.collect() is None
    assert pruner.ledger.train_flops == spent
    model(torch.randn(ROWS, 4)).sum().backward()
    with torch.no_grad():
        model(torch.randn(ROWS, 4))
    _, counted = pruner._run.bank.collect().evidence(lambda rows: 1.0, 1.0)
    assert counted.shape[1] == ROWS


def test_evaluation_draws_nothing():
    model = _mlp()
    pruner = _pruner(model)
    number = pruner._run.bank.draw_number
    model.eval()
    x = torch.randn(ROWS, 4)
    assert model(x).equal(model(x))
    assert pruner._run.bank.draw_number == number
    assert pruner._run.bank.collect() is None


@pytest.mark.parametrize("theta, is_open", [(0.0, False), (0.49, False), (0.5, True), (1.0, True)])
def test_evaluation_follows_theta(theta, is_open):
    model = _mlp(1)
    plain = copy.deepcopy(model).eval()
    pruner = _pruner(model)
    pruner._run.bank.theta.fill_(theta)
    pruner._run.bank.advance()
    model.eval()
    x = torch.randn(5, 4)
    expected = plain(x) if is_open else plain[2](plain[0](x))
    assert model(x).equal(expected)


def test_every_forward_before_a_step_counts():
    """Two micro-batches: rows side by side, each with the factor of its own size."""
    model = _mlp()
    pruner = _pruner(model)
    rows = []
    for size in (8, 12):
        model(torch.randn(size, 4)).square().sum(1).mean().backward()
        for index, draw in enumerate(_draws(model)):
            expected = torch.zeros(size)
            expected[draw.probes] = draw.gate.grad[draw.probes] * size / 4.0
            rows.append((index, size, expected, draw.probes))
    slope, counted = pruner._run.bank.collect().evidence(float, 4.0)
    assert slope.shape == counted.shape == (3, 20)
    for index, size, expected, probes in rows:
        part = slice(0, 8) if size == 8 else slice(8, 20)
        torch.testing.assert_close(slope[index, part], expected)
        assert counted[index, part].nonzero().flatten().equal(probes)
    assert pruner._run.bank.collect() is None


def test_a_missing_gradient_is_no_evidence():
    """The last section's output goes nowhere: its probes are not counted as zeros."""

    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = GatedResidual(nn.Linear(4, 4))
            self.unused = GatedResidual(nn.Linear(4, 4))

        def forward(self, x):
            x = self.used(x)
            self.unused(x)
            return x

    model = Partly()
    pruner = LayerPruner(
        model, example_inputs=torch.zeros(2, 4), total_steps=100, strength=0.1, cost="uniform"
    )
    model(torch.randn(ROWS, 4)).square().mean().backward()
    _, counted = pruner._run.bank.collect().evidence(float, 1.0)
    assert bool(counted[0].any()) and not bool(counted[1].any())
    model(torch.randn(ROWS, 4))
    _, counted = pruner._run.bank.collect().evidence(float, 1.0)
    assert not counted.any()


def test_a_module_used_twice_has_one_draw():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = GatedResidual(nn.Linear(4, 4))

        def forward(self, x):
            return self.block(self.block(x))

    model = Twice()
    pruner = LayerPruner(model, example_inputs=torch.zeros(2, 4), total_steps=100, strength=0.1)
    assert len(pruner.sections) == 1
    x = torch.randn(ROWS, 4)
    out = model(x)
    gate = model.block._layerprune_gate.draw.gate.detach()[:, None]
    once = x + gate * model.block.branch(x)
    torch.testing.assert_close(out, once + gate * model.block.branch(once))


def test_another_batch_size_names_the_section():
    class Folds(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = GatedResidual(nn.Linear(4, 4))

        def forward(self, x):
            return self.block(x.view(-1, 4)).view(x.shape)

    model = Folds()
    LayerPruner(model, example_inputs=torch.zeros(2, 8), total_steps=100, strength=0.1)
    with pytest.raises(RuntimeError, match=r"'block' got 12 rows .* 6.*ignored"):
        model(torch.randn(6, 8))


def _pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_copy_is_a_plain_model(copied, training):
    """Gates of a copy are open, whatever theta and the last draw are, and nothing draws for it."""
    model = _mlp()
    plain = copy.deepcopy(model).train(training)
    pruner = _pruner(model)
    pruner._run.bank.theta.fill_(0.1)
    pruner._run.bank.advance()
    x = torch.randn(ROWS, 4)
    model(x).sum().backward()
    twin = copied(model).train(training)
    number = pruner._run.bank.draw_number
    assert twin(x).equal(plain(x))
    assert pruner._run.bank.draw_number == number


def test_a_copied_gate_is_open():
    gate = Gate("name")
    gate.is_open = False
    twin = copy.deepcopy(gate)
    assert twin.is_open and twin.draw is None and twin.name == "name"


def test_the_state_of_a_bank_is_a_copy():
    bank = GateBank(["a"], PruneConfig(), seed=0)
    state = bank.state_dict()
    before = copy.deepcopy(state)
    bank.theta.fill_(1.0)
    bank.probe_rate.fill_(0.5)
    bank.draw(4)
    assert repr(state) == repr(before)
